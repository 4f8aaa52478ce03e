echo hi > f; mkdir d; echo d > d/in-d
