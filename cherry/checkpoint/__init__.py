"""Distributed checkpoints: asynchronous saves, digests, fencing, and resume rules."""
