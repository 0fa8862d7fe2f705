"""bf16 as a format: a folder of another type becomes one that loads plainly."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from base import storage
from model.model_config import ModelConfig
from model.numerics.bf16 import Bf16Format
from model.numerics.formats import detect_format
from model.quantize import quantize_folder
from model.transformer import DeepseekV3
from model.weights.pretrained import WeightsReader, load_pretrained, save_pretrained, state_to_hf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_every_weight_but_the_biases_is_rounded_to_bf16(
    dtype: torch.dtype, tmp_path: Path, make_config: Callable[..., ModelConfig], make_model: Callable[..., DeepseekV3]
) -> None:
    source, target = str(tmp_path / "source"), str(tmp_path / "target")
    model = make_model(make_config())
    named = [pair for name, value in model.state_dict().items() for pair in state_to_hf(name, value, model.config)]
    save_pretrained(named, source, model.config, dtype=dtype)
    quantize_folder(source, target, format_name="bf16")
    before, after = WeightsReader(source), WeightsReader(target)
    assert set(after.names) == {name for name in before.names if not before.is_scale(name)}
    for name in after.names:
        kept = torch.float32 if name.endswith("correction_bias") else torch.bfloat16
        assert torch.equal(after.read(name), before.read_weight(name).to(kept)), name
    config = storage.read_json(storage.join(target, "config.json"))
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "bfloat16"
    assert detect_format(config, "config.json") == "bf16"
    loaded = load_pretrained(target, dtype=torch.bfloat16)
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_what_it_rounds_is_given_back_in_fp32(make_config: Callable[..., ModelConfig]) -> None:
    bf16 = Bf16Format(make_config())
    weights = {"a": torch.randn(3, 4), "b": torch.randn(4)}
    restorers, out = bf16.restorers(bf16.quantize(weights)), torch.empty(2, 4)
    restorers["a"](slice(1, 3), out)
    assert torch.equal(out, weights["a"][1:].bfloat16().float())
    restorers["b"](slice(0, 1), out[:1])
    assert torch.equal(out[0], weights["b"].bfloat16().float())
    assert bf16.replacement("model.norm.weight", torch.nn.Linear(1, 1), torch.float32) is None
