"""Progress lines: shards, bytes, rate and time left; what an earlier start did is no part of the rate."""

from __future__ import annotations

import re

import pytest

from model.quantization import meter


def test_lines_of_shards_and_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(meter.time, "monotonic", lambda: now)
    lines: list[tuple[str, float]] = []
    found = meter.Meter(
        {"a": 4_000_000_000, "b": 2_000_000_000, "c": 2_000_000_000}, {"a"}, lambda *line: lines.append(line)
    )
    found.read("b", 100_000_000)
    assert lines == [], "too soon"
    now = 110.0
    found.read("b", 900_000_000)
    assert lines[-1] == ("quantizing 1/3 shards, 5 of 8 GB, 0.1 GB/s, 30 s left", 0.625)
    now = 120.0
    found.finish("b")
    assert lines[-1] == ("quantized 2/3 shards, 6 of 8 GB, 0.1 GB/s, 20 s left", 0.75)
    now = 1120.0
    found.read("c", 5_000_000_000)  # other files' members of its groups are no part of its size
    assert lines[-1][1] == 0.999
    found.finish("c")
    assert re.fullmatch(r"quantized 3/3 shards, 8 of 8 GB, 0\.0039 GB/s", lines[-1][0])
    assert lines[-1][1] == 1.0


@pytest.mark.parametrize(("seconds", "text"), [(119, "119 s"), (121, "2 min"), (7201, "2 h")])
def test_time_left(seconds: float, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(meter.time, "monotonic", lambda: now)
    lines: list[str] = []
    found = meter.Meter({"a": 10, "b": int(10 * seconds)}, set(), lambda line, _: lines.append(line))
    now = 1.0
    found.finish("a")
    assert lines == [f"quantized 1/2 shards, {1e-8:.3g} of {(10 + 10 * seconds) / 1e9:.3g} GB, 1e-08 GB/s, {text} left"]
