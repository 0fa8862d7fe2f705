"""Quantization of weights folders: shard by shard, by several processes, resumable, with an error report."""
