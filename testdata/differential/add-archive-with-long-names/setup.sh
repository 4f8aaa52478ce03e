n=$(printf '%0180d' 7); mkdir -p "t/$n"; echo deep > "t/$n/$n"; ln -s "$n/$n" t/link; ln "t/$n/$n" "t/$n/hard"; echo u > t/größe
tar --format=pax -cf pax.tar -C t .; tar --format=gnu -cf gnu.tar -C t .; rm -r t
