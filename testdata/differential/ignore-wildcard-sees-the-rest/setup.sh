mkdir d; echo a > a.txt; echo b > b.txt; echo c > d/c.txt; echo e > d/e
printf 'b.txt\nd/*.txt\n' > .dockerignore
