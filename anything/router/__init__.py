"""Routing over replicas: weights, stickiness, and the engine that forwards over HTTP."""
