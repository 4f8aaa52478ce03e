printf '[\n' > .dockerignore
