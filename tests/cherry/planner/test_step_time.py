"""Time of an optimizer step: MFU, its parts, and which communication compute hides."""

from __future__ import annotations

import pytest

from cherry.planner.step_time import step_time
from tests.cherry.planner.workloads import released, released_fp8


def test_mfu_is_told_in_both_conventions() -> None:
    step = step_time(released())
    for causal, gigaflops in ((True, 250.5), (False, 281.2)):
        assert step.mfu(causal=causal) * 989.4e12 / step.tokens_per_s_gpu / 1e9 == pytest.approx(gigaflops, abs=0.1)


def test_a_step_is_faster_and_its_mfu_is_of_the_fp8_peak() -> None:
    narrow, wide = step_time(released_fp8()), step_time(released_fp8(precision="bf16"))
    assert 1.05 < wide.total / narrow.total < 1.5
    share = narrow.mfu(causal=True) / wide.mfu(causal=True)
    assert share == pytest.approx(wide.total / narrow.total * 989.4 / 1978.9, rel=1e-3)
