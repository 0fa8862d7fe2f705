"""DeepSeek-V3 model: configuration, modules, weights on disk, fp8 training, and quantization numerics."""
