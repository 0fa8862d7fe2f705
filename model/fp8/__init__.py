"""FP8 training: linear layers and experts with DeepSeek's scales, kernels, and their reference in plain torch."""
