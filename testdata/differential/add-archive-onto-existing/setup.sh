mkdir -p t/sub; echo new > t/f; echo new > t/sub/g; echo plain > t/link; chmod 755 t/sub; echo file > t/file; echo x > t/tofile
tar -cf a.tar -C t sub f link tofile; rm -r t
