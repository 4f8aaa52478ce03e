mkdir -p d/sub/deeper d/empty
echo one > d/one; : > d/nothing; echo two > d/sub/two; echo three > d/sub/deeper/three
