"""Quantized folders in transformers, which reads dense layers of compressed-tensors' layouts.

Its routed experts are fused, so it finds none of those that are stored one by one. Unless it is told to dequantize, it
leaves int8 and fp8 of channels as they are stored, and multiplies by those numbers without scales (transformers 5.23).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.model_config import ModelConfig
from model.numerics.modules import round_inputs_of
from model.quantization.folder import quantize_folder
from model.transformer import DeepseekV3
from model.weights.pretrained import load_pretrained, save_pretrained, state_to_hf

# Earlier ones (5.17) leave all formats as they are stored, told or not.
transformers = pytest.importorskip("transformers", minversion="5.23")
pytest.importorskip("compressed_tensors")
# Blocks of 128 fill every weight, and every input of a layer.
SIZES = {
    **{"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 256, "q_lora_rank": 128},
    **{"kv_lora_rank": 128, "num_attention_heads": 4, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 32},
    **{"first_k_dense_replace": 3, "num_nextn_predict_layers": 0},
}


@pytest.fixture
def dense(tmp_path: Path, make_config: Callable[..., ModelConfig], make_model: Callable[..., DeepseekV3]) -> str:
    """Folder of a model without experts, in bf16."""
    model = make_model(make_config(**SIZES))
    named = (pair for name, tensor in model.state_dict().items() for pair in state_to_hf(name, tensor, model.config))
    save_pretrained(named, str(tmp_path / "plain"), model.config, dtype=torch.bfloat16)
    return str(tmp_path / "plain")


@torch.no_grad()
def logits(model: DeepseekV3, tokens: torch.Tensor) -> torch.Tensor:
    return model.logits(model(tokens).hidden_BTD)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("name", ["int8", "fp8_channel", "fp8_block", "w4a16", "nvfp4"])
def test_dense_layers_are_read_in_every_format(
    name: str, dense: str, tmp_path: Path, make_tokens: Callable[..., torch.Tensor]
) -> None:
    folder = str(tmp_path / name)
    quantize_folder(dense, folder, format_name=name)
    ours = load_pretrained(folder, dtype=torch.float32)
    dequantized = transformers.CompressedTensorsConfig(run_compressed=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=dequantized
    )
    tokens = make_tokens(ours.config, 2, 33)
    with torch.no_grad():
        expected = theirs.eval()(tokens, use_cache=False).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(ours, tokens), expected, rtol=0.0, atol=1e-4)


def test_inputs_are_rounded_as_compressed_tensors_rounds_them(
    dense: str, tmp_path: Path, make_tokens: Callable[..., torch.Tensor]
) -> None:
    """fp8 blocks are the format whose layers transformers runs as config.json describes them."""
    folder = str(tmp_path / "fp8_block")
    quantize_folder(dense, folder, format_name="fp8_block")
    ours = load_pretrained(folder, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = make_tokens(ours.config, 2, 33)
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
    plain = logits(ours, tokens)
    round_inputs_of(ours)
    rounded = logits(ours, tokens)
    # A sum in another order, as other processors have it, takes an input over a rounding boundary now and then, and
    # with it all positions that look back at it: most must be near.
    near, far = ((one - expected).square().mean(-1).sqrt().median() for one in (rounded, plain))
    assert near < 0.05 * far
