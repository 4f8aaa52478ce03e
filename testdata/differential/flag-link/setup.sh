echo f > f; mkdir d; echo new > d/new
