"""Cluster providers: they take hosts for a run, start programs on them, and release them."""
