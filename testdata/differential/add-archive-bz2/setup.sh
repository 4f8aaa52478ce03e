mkdir -p t/sub t/empty; echo one > t/one; echo two > t/sub/two; ln -s one t/link; ln t/one t/hard; chmod 4750 t/sub/two; chmod 700 t/empty; chown 12:34 t/one; chown 56:78 t/sub
tar -cjf a.tar.bz2 -C t .; cp a.tar.bz2 renamed; rm -r t
