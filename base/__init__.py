"""Foundation of all packages: strict configuration, one error family, storage through fsspec, JSON lines, progress."""
