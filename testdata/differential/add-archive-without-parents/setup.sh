mkdir -p t/a/b/c; echo f > t/a/b/c/f; chmod 700 t/a t/a/b; tar -cf a.tar -C t a/b/c/f; rm -r t
