echo inside > f; ln -s ../../../../../../../f up
