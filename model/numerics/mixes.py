"""The quantization formats: which scheme each kind of projection gets, for a model's sizes.

Engines fuse gate_proj with up_proj, and q_a_proj with kv_a_proj_with_mqa. vLLM takes the first of a fused pair in fp8
blocks only where its rows fill whole blocks, and a layer's routed experts only in one scheme. Kinds that do not fit get
one fp8 scale per channel: of the released models that is the dense layer of DeepSeek-V2-Lite, 10,944 wide.
"""

from __future__ import annotations

from model.model_config import ModelConfig
from model.numerics.fp8_blocks import BLOCK, SCALE_SUFFIX, Fp8Blocks, quantization_config
from model.numerics.fp8_channel import Fp8Channel
from model.numerics.int4_groups import Int4Groups
from model.numerics.int8_channel import Int8Channel
from model.numerics.nvfp4 import Nvfp4
from model.numerics.scheme_format import SchemeFormat
from model.numerics.schemes import Scheme
from model.numerics.weight_kinds import Kind

# Group sizes of vLLM's W4A16 kernels (Marlin), the field's choice first; a whole number of groups makes a row (the
# registry refuses others).
_INT4_GROUPS = (128, 64, 32)


def int8(config: ModelConfig) -> SchemeFormat:
    """int8 per output channel for all projections."""
    return SchemeFormat(dict.fromkeys(Kind, Int8Channel()))


def fp8(config: ModelConfig) -> SchemeFormat:
    """DeepSeek's own fp8 blocks for all projections, whatever their sizes, as it releases them."""
    return SchemeFormat(dict.fromkeys(Kind, Fp8Blocks(SCALE_SUFFIX)), quantization_config())


def fp8_channel(config: ModelConfig) -> SchemeFormat:
    """fp8 per output channel for all projections."""
    return SchemeFormat(dict.fromkeys(Kind, Fp8Channel()))


def fp8_block(config: ModelConfig) -> SchemeFormat:
    """fp8 blocks for all projections that they fit."""
    return SchemeFormat(_blocks(config))


def w4a16(config: ModelConfig) -> SchemeFormat:
    """int4 groups for routed experts, fp8 blocks for the rest."""
    width, intermediate = config.hidden_size, config.moe_intermediate_size
    group = next(group for group in _INT4_GROUPS if width % group == intermediate % group == 0)
    return SchemeFormat({**_blocks(config), Kind.ROUTED: Int4Groups(group)})


def nvfp4(config: ModelConfig) -> SchemeFormat:
    """NVFP4 for routed experts, fp8 blocks for the rest."""
    return SchemeFormat({**_blocks(config), Kind.ROUTED: Nvfp4()})


def _blocks(config: ModelConfig) -> dict[Kind, Scheme]:
    """fp8 blocks in compressed-tensors' layout, and channels where a fused pair's first rows fill no whole blocks."""
    first_rows = {
        Kind.LATENT: config.q_lora_rank or 0,
        Kind.DENSE: config.intermediate_size,
        Kind.SHARED: config.n_shared_experts * config.moe_intermediate_size,
        Kind.ROUTED: config.moe_intermediate_size,
    }
    return {kind: Fp8Channel() if first_rows.get(kind, 0) % BLOCK else Fp8Blocks() for kind in Kind}
