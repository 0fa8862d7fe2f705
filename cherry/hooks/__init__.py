"""Trainer hooks: the protocol, metrics.jsonl and printed lines, profiles."""
