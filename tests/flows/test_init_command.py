"""`cherry init`: what it writes is complete, loads, can be planned, and overwrites nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from base.config import load
from base.errors import InvalidInputError
from cherry.cluster import ClusterSpec, read_cluster
from flows.cli import main
from flows.init_command import init
from flows.schema_command import schema_text
from tasks.run_config import RunConfig


def test_what_is_written_loads_and_can_be_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = init(Path("new/project"))
    assert [path.name for path in paths] == ["run.yaml", "cluster.yaml", "schema.json"]
    config = load(paths[0], RunConfig)
    assert read_cluster(config.cluster) == ClusterSpec(kind="local")
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(paths[0])])
    assert ended.value.code == 0
    assert "mine on" in capsys.readouterr().out


def test_every_key_stands_below_its_description(tmp_path: Path) -> None:
    text = " ".join(init(tmp_path)[0].read_text().replace("#", " ").split())
    values = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert {"model", "data", "train", "parallel", "launch", "checkpoint", "tracking"} <= values.keys()
    for key in values["train"]:
        description = RunConfig.model_fields["train"].annotation.model_fields[key].description  # type: ignore[union-attr]
        assert f"{' '.join(description.split())} {key}: " in text


def test_the_nodes_that_are_commented_out_are_a_cluster_too(tmp_path: Path) -> None:
    text = init(tmp_path)[1].read_text().split("instead:\n")[1]
    path = tmp_path / "nodes.yaml"
    path.write_text("".join(line.removeprefix("# ") for line in text.splitlines(keepends=True)))
    assert load(path, ClusterSpec).gpus == 32


def test_the_editor_finds_the_schema_beside_the_config(tmp_path: Path) -> None:
    first = init(tmp_path)[0].read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=schema.json"
    assert (tmp_path / "schema.json").read_text() == schema_text()


@pytest.mark.parametrize("name", ["run.yaml", "cluster.yaml", "schema.json"])
def test_a_file_that_is_there_is_not_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InvalidInputError, match=name):
        init(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]
