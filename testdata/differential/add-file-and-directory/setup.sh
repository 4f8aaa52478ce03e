echo hi > f; mkdir -p d/sub; echo g > d/sub/g; chmod 750 d/sub
