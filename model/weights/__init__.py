"""Weights on disk: released names, safetensors files, ranged reads, import and export."""
