mkdir d; echo hi > d/f; echo hi > f; ln -s f d/link; chown 1234:5678 d d/f f; chown -h 12:34 d/link; chmod 755 f
