"""The report of a plan: every matmul of a step by size, what hides each collective, saves, and GPUs left idle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from base.config import load
from cherry.cluster import ClusterSpec
from cherry.planner.plan import Plan, make_plan
from cherry.planner.report import Row, cost, sections_of, summary_line, unused
from cherry.planner.step_time import step_time
from tasks.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[3]


def plan_for(*overrides: str, nodes: int = 32) -> Plan:
    config = load(ROOT / "configs" / "671b.yaml", RunConfig, list(overrides))
    return make_plan(config, ClusterSpec(kind="nodes", gpu="H100", nodes=nodes, gpus_per_node=8))


def section_rows(plan: Plan, section: str) -> dict[str, Row]:
    rows = next(rows for title, rows in sections_of(plan) if title.startswith(section))
    return {row.name: row for row in rows}


def test_matmuls_by_size_add_up_to_the_steps() -> None:
    for overrides in ([], ["train.gradient_accumulation_steps=2"], ["train.activation_checkpointing=none"]):
        step = plan_for(*overrides).step
        busy = step.busy["matmuls"] + step.busy["experts' matmuls"]
        assert sum(matmul.seconds for matmul in step.matmuls) == pytest.approx(busy)
    rows = section_rows(plan_for(), "matmuls")
    assert next(iter(rows)) == "experts_gate_up", "the largest first"
    assert "7,168 x 4,096, bf16" in rows["experts_gate_up"].note
    narrow = section_rows(plan_for("train.precision=fp8"), "matmuls")
    assert "fp8" in narrow["experts_gate_up"].note and "bf16" in narrow["lm_head"].note


def test_each_collective_stands_with_what_it_overlaps() -> None:
    rows = section_rows(plan_for(), "communication")
    assert rows["all-gather, forward"].note.startswith("the forward pass, 0.0")
    assert rows["reduce-scatter"].note.startswith("the backward pass")
    assert rows["all-to-all across nodes"].note == "nothing"
    assert "all-reduce of replicas" not in rows
    copies = section_rows(plan_for("launch.nnodes=64", "parallel.replicate=2", nodes=64), "communication")
    assert copies["all-reduce of replicas"].note.startswith("the last backward pass")


def test_what_average_ranks_wait_for_the_busiest_is_reported() -> None:
    plan = plan_for()
    even = step_time(replace(plan.work, assumed_imbalance=1.0))
    assert 0 < plan.step.bubbles == pytest.approx(plan.step.total - even.total)
    assert section_rows(plan, "a step")["EP load imbalance"].value == f"{plan.step.bubbles:.3f}"
    assert even.bubbles == 0


def test_both_classes_of_ranks_stand_in_one_table() -> None:
    plan = plan_for()
    rows, (worst, other) = section_rows(plan, "memory of busiest ranks, GiB"), plan.memory
    assert rows["all"].value == f"{worst.total / 2**30:.2f}"
    assert rows["all"].note == f"{other.total / 2**30:.2f} average ranks"
    assert (rows["parameters"].note, rows["optimizer states"].note) == ("", "")


def test_a_save_in_the_foreground_is_not_reported_as_one_behind_the_steps() -> None:
    behind, before = plan_for(), plan_for("checkpoint.asynchronous=false")
    assert section_rows(behind, "the run")["save"].note == "asynchronous, but for the stall"
    rows = section_rows(before, "the run")
    assert (rows["save"].note, rows["save"].value) == ("", "2.7 min")
    assert before.run.stall_s == pytest.approx(behind.run.save_s)
    assert rows["checkpoint stall"].note == f"{before.run.stall_s / 100:.2g} s a step"


def test_gpus_that_a_job_leaves_idle_are_reported() -> None:
    assert unused(plan_for()) == ""
    assert unused(plan_for(nodes=64)) == "takes 256 of the cluster's 512 GPUs; all with launch.nnodes=64"


def test_the_short_line_has_the_peak_that_the_tracker_gets() -> None:
    plan = plan_for()
    predicted = plan.predictions()["predicted_peak_memory_gib"]
    assert f"{predicted:.2f} GiB at the peak of a GPU" in summary_line(plan)


@pytest.mark.parametrize(("amount", "told"), [(9.994, "9.99 EUR"), (12_345.6, "12,346 EUR")])
def test_a_cost_has_its_currency(amount: float, told: str) -> None:
    assert cost(amount, ClusterSpec(kind="nodes", gpu="H100", nodes=2, gpus_per_node=8, currency="EUR")) == told
