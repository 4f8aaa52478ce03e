echo hush > secret
