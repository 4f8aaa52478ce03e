mkdir sub dir; echo a > a; echo b > b; echo c > sub/c; echo d > dir/d
