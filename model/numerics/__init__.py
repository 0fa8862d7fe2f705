"""Number formats of weights: the registry of quantization formats, their implementations, fp8 block scales."""
