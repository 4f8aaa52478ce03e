mkdir -p a/b; chmod 750 a; chmod 711 a/b; echo f > a/b/f; echo g > a/g; printf 'a\n!a/b/f\n' > .dockerignore
