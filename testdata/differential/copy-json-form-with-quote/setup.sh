echo 2 > "c'd"
