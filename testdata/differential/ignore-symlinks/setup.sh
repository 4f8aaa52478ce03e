mkdir real; echo f > real/f; ln -s real link; ln -s real/f l2; printf 'real/f\nl2\n' > .dockerignore
