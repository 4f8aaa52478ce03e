mkdir -p d/etc d/new; chmod 700 d; echo x > d/etc/x; echo y > d/new/y; echo f > f; chmod 711 d/etc
