"""What a DeepSeek-V3 model is: its configuration, modules, weights on disk, and quantization numerics."""
