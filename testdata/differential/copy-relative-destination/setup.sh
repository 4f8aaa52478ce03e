echo hi > f; mkdir d; echo g > d/g
