mkdir -p d/sub; echo f > d/f; echo g > d/sub/g; ln -s f d/l; chmod 700 d/sub
