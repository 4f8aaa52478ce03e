mkdir t d; echo t > t/t; echo f > f; echo d > d/in-d; tar -cf a.tar -C t t; rm -r t
