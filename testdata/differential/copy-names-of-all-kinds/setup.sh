mkdir d; for name in 'with blank' 'ümlaut' '日本' "quote'" 'double"' 'back\slash' 'star*' 'a,b=c;d' '-dash' '%percent' '~' '#hash' '$dollar' 'new
line'; do echo "$name" > "d/$name"; done
echo 1 > ünïcode; echo 2 > 日本語
