mkdir d; echo in > d/f
