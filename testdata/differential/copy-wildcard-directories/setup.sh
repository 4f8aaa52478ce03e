mkdir -p d1/sub d2/sub; echo 1 > d1/one; echo 2 > d2/two; echo 1 > d1/sub/s1; echo 2 > d2/sub/s2
