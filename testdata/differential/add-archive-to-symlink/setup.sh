echo t > t; tar -cf a.tar t; rm t
