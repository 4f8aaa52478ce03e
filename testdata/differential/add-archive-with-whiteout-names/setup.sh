mkdir t; : > t/.wh.old; echo f > t/f; tar -cf a.tar -C t .wh.old f; rm -r t
