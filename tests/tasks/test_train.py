"""The train step's artifacts."""

from __future__ import annotations

from pathlib import Path

from tasks.train import _PROFILE_MAX_BYTES, _profiles


def test_profiles_that_are_small_enough_are_artifacts(tmp_path: Path) -> None:
    assert _profiles(tmp_path / "profile") == []
    small = [tmp_path / "rank-0-steps-3-4.memory.json.gz", tmp_path / "rank-0-steps-3-4.trace.json.gz"]
    for path in small:
        path.write_bytes(b"x")
    with (tmp_path / "rank-1-steps-3-4.trace.json.gz").open("wb") as large:
        large.truncate(_PROFILE_MAX_BYTES + 1)
    assert _profiles(tmp_path) == small
