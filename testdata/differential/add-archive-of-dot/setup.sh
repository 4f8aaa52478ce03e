mkdir t; chmod 751 t; chown 3:4 t; echo f > t/f; tar -cf a.tar -C t .; rm -r t
