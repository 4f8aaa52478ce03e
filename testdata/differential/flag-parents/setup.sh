mkdir -p a/b a/c/deep; echo f > a/b/f; echo g > a/c/g; echo t > a/c/deep/t.txt; echo u > u.txt; chmod 750 a/c
