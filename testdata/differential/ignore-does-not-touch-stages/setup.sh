printf '*.md\nd\n' > .dockerignore
