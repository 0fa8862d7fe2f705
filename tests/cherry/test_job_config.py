"""Layouts checked against the number of ranks, every broken rule at once, and the settings of communication."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import ValidationError

from base.errors import ConfigError
from cherry.job_config import CommunicationConfig, JobConfig, NetworkConfig, over_network

Make = Callable[..., JobConfig]


def axes(**sizes: int | None) -> list[str]:
    return [f"parallel.{name}={'null' if size is None else size}" for name, size in sizes.items()]


@pytest.mark.parametrize(
    ("ranks", "sizes", "shard"),
    [
        (1, {}, 1),
        (4, {}, 4),
        (8, {"replicate": 2, "expert": 2}, 2),
        (8, {"replicate": 2, "shard": 1, "expert": 2, "context": 2}, 1),
        (8, {"shard": 8}, 8),
    ],
)
def test_shard_takes_what_the_other_axes_leave(mini: Make, ranks: int, sizes: dict[str, int], shard: int) -> None:
    config = mini(*axes(**sizes), f"launch.nproc_per_node={ranks}")
    assert config.parallel.shard_ranks(ranks) == shard


@pytest.mark.parametrize(
    ("ranks", "flags", "problems"),
    [
        (4, axes(replicate=3), ["parallel.replicate: must divide the number of ranks (4) (got 3)"]),
        (
            8,
            axes(expert=3, context=5),
            ["parallel.expert: must divide the number of ranks (8)", "parallel.context: must divide the number"],
        ),
        (8, axes(replicate=4, expert=4), ["parallel: replicate * shard * expert * context must be"]),
        (8, axes(shard=4, expert=4), ["parallel.shard: replicate * shard * expert * context must be the number of"]),
        (8, [*axes(expert=8), "model.n_routed_experts=4"], ["parallel.expert: must divide model.n_routed_experts (4)"]),
        (4, axes(shard=3), ["parallel.shard: "]),
        (4, [*axes(context=2), "data.sequence_length=30"], ["data.sequence_length: must be divisible by 2 * parallel"]),
        (4, ["parallel.reshard_after_forward=3"], ["parallel.reshard_after_forward: a number must divide"]),
        (
            8,
            [*axes(context=2), "train.batch_size=6"],
            ["train.batch_size: must be divisible by ranks / parallel.context * train.gradient_accumulation_steps (4"],
        ),
        # 3 ranks are to share 4 experts of 32 x 2 * 16: neither divides
        (6, [*axes(expert=2), "train.batch_size=6"], ["parallel.expert: leaves 3 ranks (shard * context) to share 4"]),
    ],
)
def test_a_layout_that_cannot_be_is_refused(mini: Make, ranks: int, flags: list[str], problems: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        mini(*flags, f"launch.nproc_per_node={ranks}")
    for problem in problems:
        assert problem in str(refused.value)
    assert str(refused.value).count("parallel.shard:") <= 1


@pytest.mark.parametrize(("size", "expected"), [("8MiB", 8 << 20), ("256MB", 256_000_000), (77, 77)])
def test_a_buffer_s_size(size, expected):
    assert CommunicationConfig(buffer_size=size).variables() == {"NCCL_BUFFSIZE": str(expected)}


def test_invalid_settings_are_refused(mini):
    for wrong in ({"buffer_size": "8mb"}, {"buffer_size": 0}, {"environment": {"PATH": "/"}}, {"replicate": "int4"}):
        with pytest.raises(ValidationError):
            CommunicationConfig(**wrong)
    with pytest.raises(ConfigError, match=r"communication\.replicate: compresses between replicas"):
        mini("communication.replicate=int8")
    assert mini("communication.reduce_dtype=bf16").communication.variables() == {}


def test_what_a_job_sets_comes_before_its_cluster_s_and_what_it_leaves_out_after():
    network = NetworkConfig(
        buffer_size="256MB", interface="ib0", environment={"NCCL_IB_HCA": "mlx5", "NCCL_IB_TC": "1"}
    )
    own = CommunicationConfig(interface="eth0", reduce_dtype="bf16", environment={"NCCL_IB_TC": "106"})
    merged = CommunicationConfig(**over_network(own.model_dump(), network.given()))
    assert merged == CommunicationConfig(
        buffer_size=256_000_000,
        interface="eth0",
        reduce_dtype="bf16",
        environment={"NCCL_IB_HCA": "mlx5", "NCCL_IB_TC": "106"},
    )


def test_a_job_without_a_section_takes_the_cluster_s_and_one_without_a_cluster_its_own():
    network = NetworkConfig(timeout_s=30.0)
    assert over_network(None, network.given()) == {"timeout_s": 30.0}
    assert over_network({"timeout_s": 5.0}, NetworkConfig().given()) == {"timeout_s": 5.0}
