echo copied > f
