echo f > f; mkdir -p d/sub; echo g > d/sub/g; ln -s g d/sub/l
