echo s > secret; echo secret > .dockerignore
