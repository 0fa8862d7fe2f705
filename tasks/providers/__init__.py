"""Cluster providers: what can take hosts for a run, start programs on them, and give them back."""
