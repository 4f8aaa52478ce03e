echo t > t; tar --format=ustar --mtime=@0 --owner=root:0 --group=root:0 --mode=644 -cf a.tar t; rm t
