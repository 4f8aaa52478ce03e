mkdir -p d/.hidden; echo h > .hidden; echo g > d/.hidden/g; echo f > f
