mkdir ..a ...; echo 1 > ..a/f; echo 2 > .../f
