mkdir -p real/deep; echo hi > real/f; echo deep > real/deep/g; ln -s real/f link; ln -s link tofile; ln -s real todir
ln -s /real/f absolute
