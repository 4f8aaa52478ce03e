mkdir -p d/sub; echo f > d/f; echo g > d/sub/g; chmod 700 d; chmod 1777 d/sub
