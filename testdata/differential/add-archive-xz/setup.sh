mkdir -p t/sub t/empty; echo one > t/one; echo two > t/sub/two; ln -s one t/link; ln t/one t/hard; chmod 4750 t/sub/two; chmod 700 t/empty; chown 12:34 t/one; chown 56:78 t/sub
tar -cJf a.tar.xz -C t .; cp a.tar.xz renamed; rm -r t
