for n in a b; do echo $n > $n; tar -cf $n.tar $n; rm $n; done
