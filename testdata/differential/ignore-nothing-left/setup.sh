echo a > a; printf '*\n' > .dockerignore
