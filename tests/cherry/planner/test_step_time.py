"""Time of an optimizer step: MFU, its parts, and which communication compute hides."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cherry.planner.step_time import step_time
from tests.cherry.planner.workloads import released, released_fp8


def test_mfu_counts_attention_causal_or_in_full() -> None:
    step = step_time(released())
    for causal, gigaflops in ((True, 250.5), (False, 281.2)):
        assert step.mfu(causal=causal) * 989.4e12 / step.tokens_per_s_gpu / 1e9 == pytest.approx(gigaflops, abs=0.1)


def test_a_step_is_faster_and_its_mfu_is_of_the_fp8_peak() -> None:
    narrow, wide = step_time(released_fp8()), step_time(released_fp8(precision="bf16"))
    assert 1.05 < wide.total / narrow.total < 1.5
    share = narrow.mfu(causal=True) / wide.mfu(causal=True)
    assert share == pytest.approx(wide.total / narrow.total * 989.4 / 1978.9, rel=1e-3)


def test_a_step_is_its_compute_and_what_compute_does_not_hide() -> None:
    step = step_time(released(replicate=2, shard=2))
    assert step.total == pytest.approx(sum(step.busy.values()) + sum(step.exposed.values()))
    assert step.tokens_per_s * step.total == pytest.approx(step.work.batch_sequences * step.work.sequence_length)
    assert 0 <= step.exposed["replicas"] < step.collectives["all-reduce of replicas"]
    gathered = step.collectives["all-gather, forward"] + step.collectives["all-gather, backward"]
    hidden = gathered + step.collectives["reduce-scatter"]
    assert step.exposed["gathering"] + step.exposed["gathering and reducing"] < hidden
    for name in ("all-to-all in a node", "all-to-all across nodes", "context"):
        assert step.exposed[name] == step.collectives[name], f"nothing overlaps with {name}"


def test_one_gpu_has_no_communication() -> None:
    step = step_time(released(shard=1, expert=1, gpus_per_node=1))
    assert set(step.collectives.values()) == {0.0}
    assert sum(step.exposed.values()) == pytest.approx(step.exposed["host"])


def test_context_ranks_exchange_latents_in_every_pass() -> None:
    work = released(expert=32, context=2)
    full, none = (step_time(replace(work, recompute=kind)).collectives["context"] for kind in ("full", "none"))
    assert full == pytest.approx(none * 3 / 2)
    assert step_time(released()).collectives["context"] == 0
