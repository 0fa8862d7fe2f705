"""Search over parallel layouts: the order of those that fit, the keys it varies, the nearest that would fit."""

from __future__ import annotations

import pytest

from base.config import load
from cherry.cluster import read_cluster
from cherry.planner import search as searching
from cherry.planner.plan import Plan, make_plan
from cherry.planner.search import nearest_that_fit, search
from tasks.run_config import RunConfig
from tests.cherry.planner.workloads import ROOT, plan_for


def test_without_expert_parallel_the_671b_model_does_not_fit_and_the_nearest_layout_has_it() -> None:
    plan = plan_for("h100-256", "parallel.expert=1")
    assert not plan.fits
    assert "no room for gathered layers" in plan.why_not()
    nearest = nearest_that_fit(plan)
    assert {"parallel.expert": 64} in [layout.changes for layout in nearest]
    assert all(layout.total_bytes <= plan.worst.usable for layout in nearest)
    # The change as a person would write it leads to the very same plan.
    again = plan_for("h100-256", "parallel.expert=1", "parallel.expert=64")
    assert again.worst.total == next(
        layout.total_bytes for layout in nearest if layout.changes == {"parallel.expert": 64}
    )


def test_where_one_change_is_not_enough_two_are_named() -> None:
    plan = plan_for("h100-256", "parallel.expert=1", "train.activation_checkpointing=none")
    assert not plan.fits
    nearest = nearest_that_fit(plan)
    assert nearest
    assert all(len(layout.changes) == 2 for layout in nearest)


@pytest.mark.parametrize(
    ("name", "cluster_name", "overrides"),
    [
        ("671b", "h100-256", []),
        ("16b", "h100-512", ["launch.nnodes=64", "train.batch_size=3072", "train.gradient_accumulation_steps=6"]),
    ],
)
def test_a_search_ranks_layouts_that_the_configuration_takes(
    name: str, cluster_name: str, overrides: list[str]
) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    config = load(path, RunConfig, overrides)
    cluster = read_cluster(str(ROOT / "configs" / "clusters" / f"{cluster_name}.yaml"))
    found = search(make_plan(config, cluster))
    speeds = [layout.tokens_per_s_gpu for layout in found]
    assert speeds == sorted(speeds, reverse=True)
    own = next(layout for layout in found if not layout.changes)
    assert own.tokens_per_s_gpu == make_plan(config, cluster).step.tokens_per_s_gpu
    for layout in found[:: max(1, len(found) // 12)]:
        config = load(path, RunConfig, [*overrides, *layout.overrides.split()])
        plan = make_plan(config, cluster)
        assert plan.fits
        assert plan.step.tokens_per_s_gpu == pytest.approx(layout.tokens_per_s_gpu)
        assert plan.worst.total == layout.total_bytes


def test_a_search_goes_over_every_key_that_a_layout_has() -> None:
    """Replicas as far as they fit, and every micro-batch that divides the batch."""
    overrides = ["launch.nnodes=64", "train.batch_size=3072", "train.gradient_accumulation_steps=6"]
    cluster = read_cluster(str(ROOT / "configs" / "clusters" / "h100-512.yaml"))

    def made(more: list[str]) -> Plan:
        return make_plan(load(ROOT / "configs" / "16b.yaml", RunConfig, [*overrides, *more]), cluster)

    found = search(made([]))
    values: dict[str, set[object]] = {}
    for layout in found:
        for key, value in layout.changes.items():
            values.setdefault(key, set()).add(value)
    assert {2, 4, 8, 16, 32} <= values["parallel.replicate"]
    assert values["parallel.expert"] == {1, 2, 4, 16, 32, 64}
    assert values["parallel.context"] == {2, 4, 8}
    assert {1, 2, 3} <= values["train.gradient_accumulation_steps"]
    assert values["train.activation_checkpointing"] == {"none"}
    assert "fp32" in values["train.precision"]
    assert values["parallel.reshard_after_forward"] == {False}
    assert found[0].changes["parallel.reshard_after_forward"] is False, "where it fits it is the fastest"
    freed = [layout for layout in search(made(["parallel.reshard_after_forward=false"])) if layout.changes]
    assert any(layout.changes.get("parallel.reshard_after_forward") is True for layout in freed)


def test_a_search_offers_it_where_the_configuration_and_the_gpu_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(ROOT / "configs" / "671b.yaml", RunConfig)
    plans = {
        gpu: make_plan(config, read_cluster(str(ROOT / "configs" / "clusters" / f"{gpu}-256.yaml")))
        for gpu in ("h100", "b200")
    }
    monkeypatch.setattr(searching, "_PRECISIONS", ("fp32", "bf16", "fp8"))
    assert searching.search(plans["h100"])[0].changes["train.precision"] == "fp8"
    assert not any(layout.changes.get("train.precision") == "fp8" for layout in searching.search(plans["b200"]))
    monkeypatch.setattr(searching, "_PRECISIONS", ("fp32", "bf16"))
    assert not any(layout.changes.get("train.precision") == "fp8" for layout in searching.search(plans["h100"]))
