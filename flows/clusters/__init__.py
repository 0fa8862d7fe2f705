"""`cherry cluster`: what is taken of clusters, taking and giving back, and checks of their hosts."""
