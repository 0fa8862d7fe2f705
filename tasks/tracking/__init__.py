"""Recording runs: the tracker protocol, MLflow behind it, and the relay of training metrics."""
