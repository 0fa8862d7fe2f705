"""Releases: which version is served, and how traffic is shifted to it."""
