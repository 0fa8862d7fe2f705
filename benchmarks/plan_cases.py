"""Planner workloads of the rows in benchmarks/results."""

from __future__ import annotations

from collections.abc import Callable

from cherry.hardware import Gpu, find_gpu
from cherry.planner.workload import Workload
from model.model_config import PRESETS, ModelConfig

# The sizes of benchmarks.train_step, which needs torch.
_SLICE_3B = {
    **PRESETS["16b"],
    "num_hidden_layers": 6,
    "rope_scaling": None,
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
}
# Implementations of benchmarks.train_step that keep AdamW's moments in bf16.
_BF16_MOMENTS = ("cherry-fp8", "cherry, bf16 moments")
# `benchmarks.train_step --layout` on several GPUs of one host.
_LAYOUTS: dict[str, Callable[[int], dict]] = {
    "shard": lambda ranks: {"shard": ranks},
    "expert": lambda ranks: {"expert": ranks},
    "replicate": lambda ranks: {"replicate": ranks},
}
SIZES = {"3b": _SLICE_3B, "tiny": {**PRESETS["tiny"], "num_nextn_predict_layers": 0, "n_group": 1}}


def benchmark_workload(row: dict) -> Workload:
    """Workload of a row of `benchmarks.train_step` on GPUs that the planner knows; keys that `benchmarks.plan_gpu` adds
    to a row override the defaults."""
    gpu = gpu_of(row["gpu"])
    assert gpu is not None, row["gpu"]
    keys = SIZES[row["size"]]
    keys = {**keys, "num_hidden_layers": row.get("layers", keys["num_hidden_layers"])}
    keys = {**keys, "num_nextn_predict_layers": int(row.get("mtp", False))}
    model = {**keys, "n_routed_experts": row["experts"], "max_position_embeddings": max(4096, row["length"])}
    layout, _, kept = row.get("layout", "shard").partition(", ")
    layout, kept = ("shard", "kept") if layout == "kept" else (layout, kept)
    ranks = row.get("world", 1)
    return Workload(
        model=ModelConfig.model_validate(model),
        gpu=gpu,
        gpus_per_node=ranks,
        **({"replicate": 1, "shard": 1, "context": 1, "expert": 1} | _LAYOUTS[layout](ranks)),
        kept_share=1.0 if kept else 0.0,
        micro_sequences=row["batch"],
        accumulation=1,
        sequence_length=row["length"],
        precision=row["precision"],
        recompute=row.get("recompute", "none"),
        compile=row.get("compile", "eager" not in row["impl"]),
        moment_bytes=2 if row.get("moments") == "bf16" or row["impl"] in _BF16_MOMENTS else 4,
        loss_chunk_tokens=row.get("chunk", row["batch"] * row["length"]),
    )


def gpu_of(name: str) -> Gpu | None:
    """By the name that torch gives it; `None` where plans know none."""
    return find_gpu(name)
