mkdir d; mkfifo -m 640 d/pipe; echo f > d/f
