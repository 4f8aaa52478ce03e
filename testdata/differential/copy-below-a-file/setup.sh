echo hi > f
