mkdir -p d/sub; echo f > d/f; chmod 600 d/f; chmod 700 d/sub d; echo x > d/exec; chmod 711 d/exec; echo f > f
