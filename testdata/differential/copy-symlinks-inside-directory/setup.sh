mkdir -p d/sub; echo hi > d/sub/f; ln -s sub/f d/relative; ln -s /etc/passwd d/absolute; ln -s nowhere d/dangling
ln -s sub d/todir; ln -s ../../../etc d/up; ln -s loop d/loop
