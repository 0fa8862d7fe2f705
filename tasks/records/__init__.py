"""What is recorded of a run beside its outputs: names of figures, the environment, model cards."""
