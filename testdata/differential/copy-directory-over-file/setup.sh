mkdir -p d/sub; echo in > d/sub/f
