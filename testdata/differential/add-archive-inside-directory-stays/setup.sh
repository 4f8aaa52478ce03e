mkdir d; echo t > t; tar --sort=name --mtime=@0 --owner=0 --group=0 -cf d/a.tar t; rm t
