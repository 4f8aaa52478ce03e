echo f > f; echo g > g; mkdir d
