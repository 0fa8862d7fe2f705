"""Number formats of weights: FP8 block scales, int8."""
