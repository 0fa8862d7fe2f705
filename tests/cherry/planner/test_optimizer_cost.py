"""The plan of a run by Muon: its states and workspace against simulated ranks, its figures at their corners."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from base.config import validate
from benchmarks.simulated_step import simulate, slice_of_671b
from cherry.cluster import ClusterSpec
from cherry.hardware import GPUS
from cherry.job_config import JobConfig, ParallelConfig
from cherry.optim.adamw import OwnGradients
from cherry.optim.build import build_optimizer, hidden_matrices
from cherry.optim.newton_schulz import orthogonalize
from cherry.planner.memory import memory_of
from cherry.planner.optimizer_cost import (
    checkpoint_state_bytes,
    orthogonalize_seconds,
    row_exchange_seconds,
    state_bytes,
)
from cherry.planner.plan import make_plan
from cherry.planner.step_time import step_time
from cherry.planner.units import network_of, whole_network
from cherry.planner.workload import Workload
from cherry.train_config import TrainConfig
from model.model_config import PRESETS, ModelConfig
from model.transformer import DeepseekV3


def workload(model: ModelConfig, **options: Any) -> Workload:
    base: dict[str, Any] = {
        "gpu": GPUS["H100"],
        "gpus_per_node": 8,
        "replicate": 1,
        "shard": 1,
        "context": 1,
        "expert": 1,
        "micro_sequences": 1,
        "accumulation": 1,
        "sequence_length": 4096,
        "precision": "bf16",
        "recompute": "full",
        "optimizer": "muon",
    }
    return Workload(model=model, **{**base, **options})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "axes"),
    [(256, {"expert": 64}), (512, {"expert": 32, "replicate": 2}), (256, {})],
    ids=["experts whole on a rank", "replicas, experts by width", "no expert axis"],
)
def test_a_simulated_rank_holds_the_planned_states(ranks: int, axes: dict[str, int]) -> None:
    config, parallel = slice_of_671b(), ParallelConfig(**axes)
    train = TrainConfig(precision="bf16", activation_checkpointing="full", optimizer="muon")
    held = simulate(config, ranks, parallel, train, sequences=1, length=4096)
    axes_of = {"replicate": parallel.replicate, "shard": parallel.shard_ranks(ranks), "expert": parallel.expert}
    work = workload(config, **axes_of)
    assert state_bytes(work) == pytest.approx(held.states, rel=0.01)
    saved = state_bytes(replace(work, optimizer="adamw")) - state_bytes(work)
    assert saved == 4 * network_of(work).total("padded_matrices") > 0.4 * state_bytes(work)


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2)])
def test_a_run_on_one_rank_holds_the_planned_states(dtype: str, size: int) -> None:
    options = {"preset": "tiny", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2}
    model = DeepseekV3(ModelConfig.model_validate(options))
    model.init_weights(0)
    train = TrainConfig.model_validate({"optimizer": "muon", "optimizer_state_dtype": dtype})
    optimizer = build_optimizer(model, train)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.ready_step(OwnGradients(), None)()
    states = optimizer.state_dict()["state"].values()
    held = sum(value.nbytes for state in states for name, value in state.items() if name != "step")
    work = workload(model.config, moment_bytes=size)
    assert state_bytes(work) == checkpoint_state_bytes(whole_network(model.config, None), train) == held
    adamw = state_bytes(replace(work, optimizer="adamw"))
    assert adamw - held == size * sum(parameter.numel() for parameter in hidden_matrices(model))


def test_a_plan_of_muon_needs_a_moment_less_a_matrix() -> None:
    train = {"precision": "bf16", "batch_size": 64, "warmup_steps": 1}
    raw = {"name": "test", "model": {"preset": "16b"}}
    launch = {"launch": {"nproc_per_node": 8, "nnodes": 8, "master_port": 29500}, "parallel": {"expert": 8}}
    cluster = validate(
        {"kind": "nodes", "gpu": "H100", "nodes": 8, "gpus_per_node": 8}, ClusterSpec, origin="cluster.yaml"
    )
    plans = {}
    for optimizer in ("adamw", "muon"):
        job = {**raw, **launch, "train": {**train, "optimizer": optimizer}}
        plans[optimizer] = make_plan(validate(job, JobConfig, origin="test"), cluster)
    adamw, muon = plans["adamw"], plans["muon"]
    key = "optimizer states"
    fallen = adamw.memory[0].components[key] - muon.memory[0].components[key]
    assert fallen == 4 * network_of(muon.work).total("padded_matrices") > 0
    matrices = whole_network(muon.work.model, None).total("matrix_elements")
    assert adamw.run.checkpoint_bytes - muon.run.checkpoint_bytes == 4 * matrices
    assert muon.step.total > adamw.step.total
    assert muon.step.exposed["optimizer's matrices"] > 0
    assert "optimizer's matrices" not in adamw.step.exposed


def test_flops_are_those_that_torch_counts() -> None:
    for sides in ((12, 40), (40, 12), (16, 16)):
        with FlopCounterMode(display=False) as counted:
            orthogonalize(torch.ones(3, *sides), 5)
        short, long = sorted(sides)
        assert counted.get_total_flops() == 3 * 5 * (4 * short**2 * long + 2 * short**3)


def test_ranks_share_the_products_of_sharded_matrices_and_no_rank_exchanges_with_itself() -> None:
    model = ModelConfig.model_validate(PRESETS["16b"])
    alone, eight, many = (workload(model, shard=shard) for shard in (1, 8, 4096))
    assert row_exchange_seconds(alone) == 0 < row_exchange_seconds(eight)
    assert orthogonalize_seconds(eight) == pytest.approx(orthogonalize_seconds(alone) / 8, rel=0.05)
    # At the end of sharing, the costliest matrix takes its time on its owner.
    assert orthogonalize_seconds(many) > orthogonalize_seconds(alone) / 4096
    assert orthogonalize_seconds(replace(alone, optimizer="adamw")) == 0
    assert memory_of(alone)[0].stages["optimizer"]["activations"] > 0
    assert step_time(alone).busy["optimizer"] > step_time(replace(alone, optimizer="adamw")).busy["optimizer"]
