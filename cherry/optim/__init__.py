"""Optimizers, learning-rate schedule, gradient norm and clipping, expert-bias load balancing."""
