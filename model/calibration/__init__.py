"""Calibrated quantization: int4 weights that keep a layer's output rather than its weights, block by block."""
