mkdir -p a/b/c d node_modules/x; for f in f.txt g.md a/f.txt a/g.md a/b/f.txt a/b/c/f.txt a/b/c/g.md d/f.txt node_modules/x/y .hidden Makefile; do echo $f > $f; done
