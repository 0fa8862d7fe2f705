"""A tiny model saved as a released one is: safetensors, config and tokenizer."""

import torch

from model.transformer import DeepseekV3
from model.weights.hf_names import state_to_hf
from model.weights.pretrained import save_pretrained


def release(config, folder, prepared_data):
    """Save a model as it is released; the tensors that it holds."""
    model = DeepseekV3(config)
    model.init_weights(7)
    tensors = dict(pair for name, value in model.state_dict().items() for pair in state_to_hf(name, value, config))
    tokenizer = str(prepared_data / "tokenizer.json")
    save_pretrained(tensors.items(), str(folder), config, dtype=torch.float32, tokenizer_uri=tokenizer)
    return {name: value.clone() for name, value in tensors.items()}
