"""Names and paths that stand for a packaged config, and those that do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from base.errors import MissingFileError
from base.yaml_config import PACKAGED_CONFIGS, packaged_config, read_yaml


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("named", "file"),
    [
        ("configs/tiny.yaml", "tiny.yaml"),
        ("./configs/tiny.yaml", "tiny.yaml"),
        ("tiny.yaml", "tiny.yaml"),
        ("tiny", "tiny.yaml"),
        ("configs/clusters/h100-256.yaml", "clusters/h100-256.yaml"),
        ("h100-256", "clusters/h100-256.yaml"),
    ],
)
def test_a_name_stands_for_a_packaged_file(named: str, file: str) -> None:
    assert packaged_config(named) == PACKAGED_CONFIGS / file
    assert read_yaml(named) == read_yaml(PACKAGED_CONFIGS / file)


@pytest.mark.parametrize("named", ["configs/tinny.yaml", "configs", "", ".", "../base/configs/tiny.yaml", "/tiny.yaml"])
def test_anything_else_is_missing_and_what_there_is_is_named(named: str) -> None:
    assert packaged_config(named) is None
    with pytest.raises(MissingFileError, match=r"(no config file at|is a folder, and a config is) .*tiny\.yaml"):
        read_yaml(named)


def test_a_file_of_ones_own_wins(empty_folder: Path) -> None:
    own = empty_folder / "configs" / "tiny.yaml"
    own.parent.mkdir()
    own.write_text("name: own\n")
    assert packaged_config("configs/tiny.yaml") is None
    assert read_yaml("configs/tiny.yaml") == {"name": "own"}
    assert packaged_config("tiny") == PACKAGED_CONFIGS / "tiny.yaml"
