mkdir t; echo f > t/f; chown 5:6 t/f; tar -cf a.tar -C t f; rm -r t
