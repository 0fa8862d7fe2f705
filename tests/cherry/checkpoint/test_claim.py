"""A directory of checkpoints is one run's, whatever leads there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from base import storage
from base.errors import ConfigError
from cherry.checkpoint.claim import CLAIM_FILE, claim_checkpoints, fenced_directories
from cherry.data.shards import Manifest, read_manifest
from cherry.job_config import JobConfig


@pytest.fixture
def manifest(prepared_data: Path) -> Manifest:
    """Manifest of the runs' data."""
    return read_manifest(str(prepared_data))


@pytest.fixture(params=["disk", "s3"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A directory that several runs name, on a disk and on an object store."""
    return str(tmp_path / "shared") if request.param == "disk" else f"{request.getfixturevalue('s3')}/shared"


def run_of(tmp_path: Path, name: str) -> str:
    (tmp_path / name).mkdir(exist_ok=True)
    return str(tmp_path / name)


def test_two_runs_that_share_a_directory_are_refused_by_both_their_names(
    mini: Callable[..., JobConfig], manifest: Manifest, tmp_path: Path, shared: str
) -> None:
    at = f"checkpoint.directory={shared}"
    claim_checkpoints(mini("name=first", at), manifest, run_of(tmp_path, "first"))
    held = storage.read_json(f"{shared}/{CLAIM_FILE}")
    for config in (mini("name=second", at), mini("name=first", at)):
        with pytest.raises(ConfigError) as caught:
            claim_checkpoints(config, manifest, run_of(tmp_path, "second"))
        text = str(caught.value)
        assert f"run 'first' ({tmp_path}/first)" in text
        assert f"this is run {config.name!r} ({tmp_path}/second)" in text
    assert storage.read_json(f"{shared}/{CLAIM_FILE}") == held
    longer = mini("name=first", at, "train.steps=99", "checkpoint.every_steps=7", "launch.nproc_per_node=2")
    claim_checkpoints(longer, manifest, run_of(tmp_path, "first"))
    assert storage.read_json(f"{shared}/{CLAIM_FILE}") == held


def test_of_runs_that_begin_together_in_one_directory_one_has_it(
    mini: Callable[..., JobConfig], manifest: Manifest, tmp_path: Path, shared: str
) -> None:
    names = [f"run-{number}" for number in range(8)]
    runs = [run_of(tmp_path, name) for name in names]
    configs = [mini(f"name={name}", f"checkpoint.directory={shared}") for name in names]

    def outcome(number: int) -> str:
        try:
            claim_checkpoints(configs[number], manifest, runs[number])
        except ConfigError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(outcome, range(8)))
    winner = storage.read_json(f"{shared}/{CLAIM_FILE}")["name"]
    assert told[names.index(winner)] == ""
    assert sum(f"holds the checkpoints of run {winner!r}" in text for text in told) == 7


def test_the_fence_is_in_every_directory_that_a_run_writes_to(mini: Callable[..., JobConfig], tmp_path: Path) -> None:
    run, apart = run_of(tmp_path, "run"), str(tmp_path / "apart")
    assert fenced_directories(mini(), run) == [f"{run}/train"]
    assert fenced_directories(mini(f"checkpoint.directory={run}/kept"), run) == [f"{run}/train"]
    assert fenced_directories(mini(f"checkpoint.directory={apart}"), run) == [f"{run}/train", apart]
    assert fenced_directories(mini("checkpoint.directory=s3://b/c/"), run) == [f"{run}/train", "s3://b/c"]
    (tmp_path / "run" / "train").mkdir()
    (tmp_path / "run" / "train" / "checkpoints").symlink_to(apart)
    assert fenced_directories(mini(), run) == [f"{run}/train", apart], "a link leads outside too"


def test_a_run_whose_directory_was_lost_goes_on_and_another_one_does_not(
    mini: Callable[..., JobConfig], manifest: Manifest, tmp_path: Path, shared: str
) -> None:
    at = f"checkpoint.directory={shared}"
    claim_checkpoints(mini("name=first", at), manifest, run_of(tmp_path, "lost"))
    shutil.rmtree(tmp_path / "lost")
    anew = run_of(tmp_path, "anew")
    for other in (mini("name=second", at), mini("name=first", at, "seed=1"), mini("name=first", at, "train.beta2=0.9")):
        with pytest.raises(ConfigError, match="holds the checkpoints of run 'first'"):
            claim_checkpoints(other, manifest, anew)
    claim_checkpoints(mini("name=first", at), manifest, anew)
    assert storage.read_json(f"{shared}/{CLAIM_FILE}")["run_directory"] == anew


def test_a_link_to_another_run_s_checkpoints_is_a_shared_directory_too(
    mini: Callable[..., JobConfig], manifest: Manifest, tmp_path: Path
) -> None:
    first, second = run_of(tmp_path, "first"), run_of(tmp_path, "second")
    claim_checkpoints(mini(), manifest, first)
    assert storage.list_names(first) == [], "a run's own directory needs no claim"
    for run in (first, second):
        (Path(run) / "train").mkdir()
        (Path(run) / "train" / "checkpoints").symlink_to(tmp_path / "scratch")
    claim_checkpoints(mini(), manifest, first)
    with pytest.raises(ConfigError, match="holds the checkpoints of run"):
        claim_checkpoints(mini(), manifest, second)


@pytest.mark.parametrize("left", [b"", b"\0\0\0", b"[]"])
def test_a_claim_that_a_power_cut_left_is_made_again(
    mini: Callable[..., JobConfig], manifest: Manifest, tmp_path: Path, left: bytes
) -> None:
    shared = tmp_path / "shared"
    storage.write_bytes(f"{shared}/{CLAIM_FILE}", left)
    claim_checkpoints(mini(f"checkpoint.directory={shared}"), manifest, run_of(tmp_path, "run"))
    assert storage.read_json(f"{shared}/{CLAIM_FILE}")["run_directory"] == f"{tmp_path}/run"
