mkdir -p d/sub; echo hi > d/sub/f
