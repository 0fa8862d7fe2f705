"""Model configuration of the DeepSeek-V3 architecture: fields of the released config.json, presets, parameter counts.

It needs no torch, so the planner and Prefect workers can import it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from base.config import Problem, Section


class YarnConfig(Section):
    """YaRN context extension (arXiv 2309.00071), with the released model's defaults."""

    factor: PositiveFloat = 40.0
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: PositiveFloat | None = 1.0
    mscale_all_dim: PositiveFloat | None = 1.0
    """Correction of the softmax scale; `None` leaves the scale as it is without YaRN."""
    original_max_position_embeddings: PositiveInt = 4096
    attention_factor: PositiveFloat | None = None
    """Factor on cosine and sine; `None` derives it from factor, mscale and mscale_all_dim."""
    truncate: bool = True
    """Round the first and last pair of the interpolation ramp to whole pairs."""

    @property
    def rotary_factor(self) -> float:
        """Factor on cosine and sine (transformers' attention factor); 1.0 for the released models.

        It is derived as transformers does: mscale counts only together with mscale_all_dim.
        """
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is None or self.mscale_all_dim is None:
            return yarn_mscale(self.factor, 1.0)
        return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)


# Released config.json of DeepSeek-V3 (671b) and DeepSeek-V2-Lite (16b). `tiny` has every part of the
# architecture at a size that two CPU cores train in minutes.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 384,
        "moe_intermediate_size": 96,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "q_lora_rank": 64,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "rope_scaling": None,
        "max_position_embeddings": 4096,
        "num_nextn_predict_layers": 1,
        "initializer_range": 0.02,
    },
    "16b": {
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "first_k_dense_replace": 1,
        "num_attention_heads": 16,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_scaling": {"mscale": 0.707, "mscale_all_dim": 0.707},
        "max_position_embeddings": 163840,
        "num_nextn_predict_layers": 0,
        "bos_token_id": 100000,
        "eos_token_id": 100001,
    },
    "671b": {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_scaling": {},
        "max_position_embeddings": 163840,
        "num_nextn_predict_layers": 1,
        "initializer_range": 0.006,
    },
}


class ModelConfig(Section):
    """Architecture of a model. `preset` fills every key that is not given; given keys override it."""

    preset: str | None = None
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    moe_intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    first_k_dense_replace: int = Field(ge=0)
    num_attention_heads: PositiveInt
    n_routed_experts: PositiveInt
    n_shared_experts: int = Field(default=1, ge=0)
    num_experts_per_tok: PositiveInt
    n_group: PositiveInt = 1
    topk_group: PositiveInt = 1
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    norm_topk_prob: bool = True
    """Divide the chosen scores by their sum. Left out, it is true for sigmoid scores and false for softmax scores."""
    routed_scaling_factor: PositiveFloat = 1.0
    q_lora_rank: PositiveInt | None = None
    kv_lora_rank: PositiveInt
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt
    rms_norm_eps: PositiveFloat = 1e-6
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: YarnConfig | None = None
    max_position_embeddings: PositiveInt = 4096
    num_nextn_predict_layers: int = Field(default=0, ge=0, le=1)
    initializer_range: PositiveFloat = 0.02
    bos_token_id: int = Field(default=0, ge=0)
    eos_token_id: int = Field(default=1, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        name = raw.get("preset")
        if name is not None and name not in [*PRESETS]:  # a list, as what YAML gives need not be hashable
            raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
        filled = raw if name is None else {**PRESETS[name], **raw}
        if "norm_topk_prob" not in filled and filled.get("scoring_func") == "softmax":
            filled = {**filled, "norm_topk_prob": False}
        return filled

    def problems(self) -> Iterator[Problem]:
        """Combinations of keys that the router, RoPE or the layer stack do not support."""
        if self.n_routed_experts % self.n_group:
            rule = f"must be divisible by n_group ({self.n_group})"
            yield Problem("n_routed_experts", rule, self.n_routed_experts)
        if self.topk_group > self.n_group:
            yield Problem("topk_group", f"must be at most n_group ({self.n_group})", self.topk_group)
        kept = self.n_routed_experts // self.n_group * min(self.topk_group, self.n_group)
        if self.num_experts_per_tok > kept:
            rule = f"must be at most the {kept} experts of the kept groups (n_routed_experts / n_group * topk_group)"
            yield Problem("num_experts_per_tok", rule, self.num_experts_per_tok)
        if self.scoring_func == "sigmoid" and self.n_routed_experts // self.n_group < 2:
            rule = "a group's score is the sum of its top 2, so each group needs at least 2 experts"
            yield Problem("n_group", rule, self.n_group)
        if self.scoring_func == "softmax":
            yield from self._v2_problems()
        if self.rope_scaling is not None and self.rope_theta <= 1:
            yield Problem("rope_theta", "must be above 1 with YaRN", self.rope_theta)
        if self.qk_rope_head_dim % 2:
            yield Problem("qk_rope_head_dim", "must be even: RoPE rotates pairs", self.qk_rope_head_dim)
        if self.first_k_dense_replace > self.num_hidden_layers:
            rule = f"must be at most num_hidden_layers ({self.num_hidden_layers})"
            yield Problem("first_k_dense_replace", rule, self.first_k_dense_replace)
        for key in ("bos_token_id", "eos_token_id"):
            if getattr(self, key) >= self.vocab_size:
                yield Problem(key, f"must be below vocab_size ({self.vocab_size})", getattr(self, key))

    def _v2_problems(self) -> Iterator[Problem]:
        """Settings that the softmax-scored architecture, transformers' `deepseek_v2`, does not compute or load."""
        if self.norm_topk_prob:
            rule = "must be false with softmax scores: transformers' deepseek_v2 never normalises them"
            yield Problem("norm_topk_prob", rule, self.norm_topk_prob)
        if self.hidden_size % self.num_attention_heads:
            rule = f"must be divisible by num_attention_heads ({self.num_attention_heads}) with softmax scores"
            yield Problem("hidden_size", rule, self.hidden_size)

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def n_moe_layers(self) -> int:
        """Main-stack layers with routed experts (the MTP module is one more)."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5, times mscale_all_dim's correction squared under YaRN (0.135234 for the release)."""
        scale = 1.0 / math.sqrt(self.qk_head_dim)
        if self.rope_scaling is not None and self.rope_scaling.mscale_all_dim is not None:
            scale *= yarn_mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2
        return scale

    def attention_linears(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of the projections of one attention block, by name."""
        width, query = self.hidden_size, self.num_attention_heads * self.qk_head_dim
        shapes: dict[str, tuple[int, int]] = {}
        if self.q_lora_rank is None:
            shapes["q_proj"] = (query, width)
        else:
            shapes |= {"q_a_proj": (self.q_lora_rank, width), "q_b_proj": (query, self.q_lora_rank)}
        shapes["kv_a_proj_with_mqa"] = (self.kv_lora_rank + self.qk_rope_head_dim, width)
        keys_and_values = self.num_attention_heads * (self.qk_nope_head_dim + self.v_head_dim)
        shapes["kv_b_proj"] = (keys_and_values, self.kv_lora_rank)
        return shapes | {"o_proj": (width, self.num_attention_heads * self.v_head_dim)}

    def attention_norms(self) -> tuple[int, ...]:
        """Widths of the low-rank norms of one attention block."""
        return tuple(width for width in (self.kv_lora_rank, self.q_lora_rank) if width is not None)

    def shared_expert_linears(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of the fused shared experts' projections of one layer, by name; empty without them."""
        width, inner = self.hidden_size, self.n_shared_experts * self.moe_intermediate_size
        return {"shared_gate_up": (2 * inner, width), "shared_down": (width, inner)} if inner else {}

    def attention_parameters(self) -> int:
        """Parameters of one attention block, its two low-rank norms included."""
        return sum(map(math.prod, self.attention_linears().values())) + sum(self.attention_norms())

    def expert_parameters(self) -> int:
        """Parameters of one routed expert: gate, up and down."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    def layer_parameters(self, *, moe: bool) -> int:
        """Parameters of one decoder layer, the router's selection bias included (the released files store it)."""
        norms = 2 * self.hidden_size
        if not moe:
            return self.attention_parameters() + norms + 3 * self.hidden_size * self.intermediate_size
        experts = (self.n_routed_experts + self.n_shared_experts) * self.expert_parameters()
        router = self.n_routed_experts * self.hidden_size + self._bias_parameters()
        return self.attention_parameters() + norms + experts + router

    def _bias_parameters(self) -> int:
        return self.n_routed_experts if self.scoring_func == "sigmoid" else 0

    def mtp_parameters(self) -> int:
        """Parameters of the MTP modules, their shared embedding and head not counted again."""
        module = self.layer_parameters(moe=True) + 2 * self.hidden_size**2 + 3 * self.hidden_size
        return self.num_nextn_predict_layers * module

    def parameters(self, *, with_mtp: bool = False) -> int:
        """All parameters, embedding and head included."""
        dense = self.first_k_dense_replace * self.layer_parameters(moe=False)
        moe = self.n_moe_layers * self.layer_parameters(moe=True)
        total = 2 * self.vocab_size * self.hidden_size + self.hidden_size + dense + moe
        return total + (self.mtp_parameters() if with_mtp else 0)

    def active_parameters(self) -> int:
        """Parameters that one token is multiplied with, embedding and head included, MTP and selection bias not."""
        return self.parameters() - self.n_moe_layers * (self._idle_expert_parameters() + self._bias_parameters())

    def _idle_expert_parameters(self) -> int:
        return (self.n_routed_experts - self.num_experts_per_tok) * self.expert_parameters()

    def matmul_parameters(self) -> int:
        """Active parameters without the embedding, which is a lookup (the norms' 0.003 % are included)."""
        return self.active_parameters() - self.vocab_size * self.hidden_size

    def flops_per_token(self, sequence_length: int, *, causal: bool = True, with_mtp: bool = False) -> float:
        """Training FLOPs (forward and backward) for one token at `sequence_length`.

        6 N_matmul + c 6 L H (d_qk + d_v) s with c = 1/2 when only the causal half is counted and 1 for the full
        square. Name the convention beside every MFU.
        """
        half = 0.5 if causal else 1.0
        heads = self.num_attention_heads * (self.qk_head_dim + self.v_head_dim)
        attention = half * 6 * heads * sequence_length
        flops = 6 * self.matmul_parameters() + self.num_hidden_layers * attention
        if with_mtp:
            module = self.mtp_parameters() // max(self.num_nextn_predict_layers, 1)
            module -= self._idle_expert_parameters() + self._bias_parameters()
            head = self.vocab_size * self.hidden_size
            flops += self.num_nextn_predict_layers * (6 * (module + head) + attention)
        return flops


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 mscale ln(factor) + 1, and 1 without context extension."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
