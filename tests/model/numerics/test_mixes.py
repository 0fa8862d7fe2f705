"""Which scheme each kind of weight gets, for the sizes of released and of tiny models."""

from collections.abc import Callable
from typing import Any

import pytest

from base.errors import ConfigError
from model.model_config import ModelConfig
from model.numerics import mixes
from model.numerics.formats import FORMATS
from model.numerics.fp8_blocks import Fp8Blocks
from model.numerics.fp8_channel import Fp8Channel
from model.numerics.int4_groups import Int4Groups
from model.numerics.nvfp4 import Nvfp4
from model.numerics.schemes import Scheme

BLOCKS, CHANNEL = Fp8Blocks(), Fp8Channel()
NAMES = {
    "latent": "model.layers.5.self_attn.kv_a_proj_with_mqa.weight",
    "attention": "model.layers.5.self_attn.o_proj.weight",
    "dense": "model.layers.0.mlp.up_proj.weight",
    "shared": "model.layers.5.mlp.shared_experts.gate_proj.weight",
    "routed": "model.layers.5.mlp.experts.3.down_proj.weight",
}


@pytest.mark.parametrize(
    ("preset", "build", "expected"),
    [
        ("671b", mixes.fp8_block, [BLOCKS] * 5),
        ("671b", mixes.w4a16, [*[BLOCKS] * 4, Int4Groups(128)]),
        ("671b", mixes.nvfp4, [*[BLOCKS] * 4, Nvfp4()]),
        # 10,944 = 85.5 blocks
        ("16b", mixes.fp8_block, [BLOCKS, BLOCKS, CHANNEL, BLOCKS, BLOCKS]),
        ("16b", mixes.w4a16, [BLOCKS, BLOCKS, CHANNEL, BLOCKS, Int4Groups(128)]),
        ("16b", mixes.fp8, [Fp8Blocks("_scale_inv")] * 5),
        # q_lora_rank 64, intermediate_size 384, experts 96
        ("tiny", mixes.fp8_block, [CHANNEL, BLOCKS, BLOCKS, CHANNEL, CHANNEL]),
        ("tiny", mixes.w4a16, [CHANNEL, BLOCKS, BLOCKS, CHANNEL, Int4Groups(32)]),
        ("tiny", mixes.nvfp4, [CHANNEL, BLOCKS, BLOCKS, CHANNEL, Nvfp4()]),
    ],
)
def test_schemes_by_size(preset: str, build: Callable[[ModelConfig], Any], expected: list[Scheme]) -> None:
    quantization = build(ModelConfig(preset=preset))
    assert [quantization.scheme(name) for name in NAMES.values()] == expected
    assert quantization.scheme("model.layers.5.mlp.gate.weight") is None


@pytest.mark.parametrize(
    ("name", "multiple", "sizes"),
    [
        ("w4a16", 32, {"hidden_size": 48}),
        ("w4a16", 32, {"hidden_size": 64, "moe_intermediate_size": 40}),
        ("nvfp4", 16, {"moe_intermediate_size": 40}),
    ],
)
def test_experts_that_fit_no_group_are_refused(
    name: str, multiple: int, sizes: dict[str, int], make_config: Callable[..., ModelConfig]
) -> None:
    with pytest.raises(ConfigError, match=rf"multiples of {multiple}.*are {sizes.get('hidden_size', 48)} and .*int8"):
        FORMATS[name].load(make_config(**sizes))
