mkdir -p d/sub; echo g > d/sub/g; echo f > d/f
