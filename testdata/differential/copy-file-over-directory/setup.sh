mkdir d; echo file > d/f
