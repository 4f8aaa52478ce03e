truncate -s 2M t; echo middle >> t; truncate -s 4M t; tar -S --format=gnu -cf a.tar t; rm t
