mkdir -p t/d; echo f > t/d/f; tar -P -cf a.tar --transform 's,^d,/d,' -C t d/f; rm -r t
