#include <stdio.h>

int main(int argc, char **argv) {
    const char *name = argc > 1 ? argv[1] : "world";
    unsigned long sum = 0;
    for (unsigned long i = 1; i <= 1000; i++)
        sum += i;
    printf("hello, %s: the numbers from 1 to 1000 add up to %lu\n", name, sum);
    return 0;
}
