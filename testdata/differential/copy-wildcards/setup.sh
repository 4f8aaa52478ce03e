mkdir -p d1 d2/deep d3/deep; echo 1 > a.txt; echo 2 > b.txt; echo 3 > c.md
echo a > d1/fa; echo b > d2/fb; echo c > d1/fc; echo 4 > d2/deep/four; echo 5 > d3/deep/five
echo xa > xa; echo x1 > x1; echo star > 'lit*eral'; echo no > litXeral
