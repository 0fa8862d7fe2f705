"""Training data: corpus readers, tokenization, packed token shards, the sampler and micro-batches."""
