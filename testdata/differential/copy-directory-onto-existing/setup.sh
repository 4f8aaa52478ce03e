mkdir -p d/sub; chmod 750 d d/sub; echo new > d/sub/replaced; echo new > d/added
