"""FP8 training: linear layers and routed experts in block-scaled e4m3, their kernels, and a torch reference."""
