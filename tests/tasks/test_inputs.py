"""What a config points at is checked before anything exists for the run, every missing thing in one error."""

from __future__ import annotations

from pathlib import Path

import pytest

from base.errors import ConfigError, MissingFileError
from tasks.inputs import check_inputs
from tasks.overrides import resolve


def test_everything_that_is_missing_is_named_at_once(tmp_path: Path) -> None:
    wrong = {"source": str(tmp_path / "nowhere"), "tokenizer": str(tmp_path / "no.json")}
    config = resolve("configs/tiny.yaml", {"data": wrong, "init_from": str(tmp_path / "weights")})
    with pytest.raises(MissingFileError) as refused:
        check_inputs(config)
    for name in ("data.source", "nowhere", "data.tokenizer", "no.json", "init_from", "weights"):
        assert name in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_missing_cluster_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"gone\.yaml"):
        check_inputs(resolve("configs/tiny.yaml", {"cluster": str(tmp_path / "gone.yaml")}))


def test_a_path_that_hosts_without_a_shared_file_system_would_not_have_is_named(tmp_path: Path) -> None:
    cluster = tmp_path / "apart.yaml"
    cluster.write_text("nodes: [{host: node1}]\nssh: {runs_directory: /data/runs}\n")
    with pytest.raises(ConfigError, match=r"share no file system .* checkpoint\.directory: must be a URI"):
        check_inputs(resolve("configs/tiny.yaml", {"cluster": str(cluster)}))
    assert list(tmp_path.iterdir()) == [cluster]


def test_what_is_there_passes(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words")
    check_inputs(resolve("configs/tiny.yaml", {"data": {"source": str(tmp_path)}}))
