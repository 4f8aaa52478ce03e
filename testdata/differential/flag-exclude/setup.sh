mkdir -p d/sub/deep; echo 1 > d/a.md; echo 2 > d/a.txt; echo 3 > d/sub/b.md; echo 4 > d/sub/deep/c; echo 5 > d/sub/keep.md
echo a > home.txt; echo b > home.md
