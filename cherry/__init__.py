"""Training a DeepSeek-V3-class model: data, sharding, checkpoints, the trainer and its launcher."""

__version__ = "0.1.0"
