"""Distributed checkpoints: background saves, digests, fencing, and what a resume may change."""
