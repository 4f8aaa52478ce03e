echo text > fake.tar; : > empty.tar.gz; echo just compressed | gzip -n > text.gz
