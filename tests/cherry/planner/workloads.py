"""Workloads and plans that several tests of the planner start from."""

from __future__ import annotations

from pathlib import Path

from base.config import load
from cherry.cluster import read_cluster
from cherry.hardware import GPUS
from cherry.planner.plan import Plan, make_plan
from cherry.planner.workload import Workload
from model.model_config import PRESETS, ModelConfig
from tasks.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[3]


def plan_for(cluster: str, *overrides: str) -> Plan:
    config = load(ROOT / "configs" / "671b.yaml", RunConfig, list(overrides))
    return make_plan(config, read_cluster(str(ROOT / "configs" / "clusters" / f"{cluster}.yaml")))


def released(**keys: object) -> Workload:
    """The 671B model without its MTP module on 256 H100."""
    model = ModelConfig.model_validate({**PRESETS["671b"], "num_nextn_predict_layers": 0})
    known: dict[str, object] = {
        "model": model,
        "gpu": GPUS["H100"],
        "gpus_per_node": 8,
        "replicate": 1,
        "shard": 4,
        "context": 1,
        "expert": 64,
        "micro_sequences": 1,
        "accumulation": 1,
        "sequence_length": 4096,
        "precision": "bf16",
        "recompute": "full",
    }
    return Workload(**{**known, **keys})  # type: ignore[arg-type]


def released_fp8(**keys: object) -> Workload:
    """The 671B release in fp8 on 256 H100."""
    known: dict[str, object] = {
        "model": ModelConfig.model_validate(PRESETS["671b"]),
        "gpu": GPUS["H100"],
        "gpus_per_node": 8,
        "replicate": 1,
        "shard": 8,
        "context": 1,
        "expert": 32,
        "micro_sequences": 2,
        "accumulation": 1,
        "sequence_length": 4096,
        "precision": "fp8",
        "recompute": "full",
        "expert_ranks_per_node": 8,
    }
    return Workload(**{**known, **keys})  # type: ignore[arg-type]
