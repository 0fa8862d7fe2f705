"""FSDP2 communication hooks on one of four ranks: bytes of every collective by closed form, and residuals.

What they compute is checked on four real ranks: tests/dist/test_reductions.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from cherry.distributed.fsdp_hooks import Communication, Traffic, install
from cherry.job_config import CommunicationConfig
from tests.cherry.fake_ranks import as_rank

RANKS = 4


@pytest.fixture(autouse=True)
def four_ranks() -> Iterator[None]:
    """This process as the first of four."""
    with as_rank(0, RANKS):
        yield


def hooked(replicas: int, **settings: Any) -> tuple[nn.Module, Communication]:
    """A layer of 51 rows, which ranks cannot share evenly, sharded and with hooks."""
    mesh = init_device_mesh("cpu", (replicas, RANKS // replicas), mesh_dim_names=("replicate", "shard"))
    network = nn.Linear(37, 51)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    module = fully_shard(network, mesh=mesh if replicas > 1 else mesh["shard"], mp_policy=policy)
    assert isinstance(module, FSDPModule)
    module.set_force_sum_reduction_for_comms(True)
    module.set_gradient_divide_factor(1.0)
    return network, install(network, CommunicationConfig(**settings))


def backward(network: nn.Module) -> None:
    network(torch.ones(2, 37)).sum().backward()


@pytest.mark.parametrize(
    ("reduce_dtype", "kind", "ratio"),
    [("fp32", "reduce_scatter", 1.0), ("bf16", "all_to_all", 0.5)],  # bf16 is summed in fp32 where it arrives
)
def test_a_step_over_shards_gathers_fp32_and_reduces_in_the_configured_type(
    reduce_dtype: str, kind: str, ratio: float
) -> None:
    network, communication = hooked(1, reduce_dtype=reduce_dtype)
    backward(network)
    # 13 of 52 padded rows of weight and bias are this rank's; the root is not gathered again for its backward pass.
    sent = (RANKS - 1) * 13 * (37 + 1) * 4
    by_collective = {"shard.all_gather": sent, f"shard.{kind}": int(ratio * sent)}
    assert communication.traffic.totals() == (by_collective, int((1 + ratio) * sent), ratio)


def test_replicas_reduce_in_the_last_micro_batch_only() -> None:
    network, communication = hooked(2)
    for last in (False, True):
        communication.traffic.clear()
        communication.micro_batch(last=last)
        backward(network)
        sent = communication.traffic.totals().by_collective
        # 26 of 52 padded rows in fp32, twice for a ring's reduce-scatter and all-gather, half of it to the other rank.
        assert sent.get("replicate.all_reduce", 0) == (26 * (37 + 1) * 4 if last else 0)
        assert sent["shard.reduce_scatter"] == 26 * (37 + 1) * 4


@pytest.mark.parametrize(("codec", "feedback"), [("int8", True), ("fp8", True), ("bf16", False)])
def test_residuals_are_laid_out_by_parameter_and_dropped_after_a_skipped_step(codec: str, feedback: bool) -> None:
    _, communication = hooked(2, replicate=codec)
    if not feedback:
        assert communication.state() == {}
        return
    (reduction,) = communication.reductions
    reduction.residual_N = torch.arange(26.0 * (37 + 1))
    (stored,) = communication.state().values()
    assert {name: tuple(residual.shape) for name, residual in stored.items()} == {
        "weight": (2, 51, 37),
        "bias": (2, 51),
    }
    flat = torch.cat([residual.to_local().flatten() for residual in stored.values()])  # type: ignore[attr-defined]
    assert flat.equal(reduction.residual_N)
    communication.reset_error_feedback()
    (dropped,) = communication.state().values()
    assert not any(residual.to_local().any() for residual in dropped.values())  # type: ignore[attr-defined]


def test_traffic_adds_up_by_axis_and_kind_and_knows_what_fp32_would_have_sent() -> None:
    traffic = Traffic()
    assert traffic.totals().reduction_over_fp32 == 1.0
    traffic.add("shard", "all_gather", 100)
    traffic.add("replicate", "all_reduce", 10, fp32=40)
    traffic.add("replicate", "all_reduce", 20, fp32=40)
    assert traffic.totals() == ({"replicate.all_reduce": 30, "shard.all_gather": 100}, 130, 30 / 80)
    traffic.clear()
    assert traffic.totals().total == 0
