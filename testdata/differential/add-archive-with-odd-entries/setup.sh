mkdir t; mkfifo -m 640 t/pipe; mknod -m 666 t/null c 1 3; mknod -m 600 t/disk b 7 9; ln -s /abs t/abs; ln -s ../../up t/up
chown -h 3:4 t/abs; echo deep > t/f; mkdir -m 3777 t/d
tar -cf a.tar -C t pipe null disk abs up f d; rm -r t
