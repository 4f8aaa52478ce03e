seq 1 100000 > big; truncate -s 3M sparse; : > empty; truncate -s 1M holes; echo end >> holes
