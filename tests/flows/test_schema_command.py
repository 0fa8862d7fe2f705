"""The JSON schema of a config: the file in configs/ is the one that is printed, and it says what the loader says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from base.yaml_config import read_yaml
from cherry import job_config
from flows.cli import main
from flows.schema_command import schema_text
from tasks import run_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(schema_text())
    Draft202012Validator.check_schema(found)
    return found


def test_the_file_in_configs_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """Else: cherry schema --write configs."""
    with pytest.raises(SystemExit):
        main(["schema"])
    assert capsys.readouterr().out == (ROOT / "configs" / "schema.json").read_text()


def test_it_is_written_to_a_directory(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["schema", "--write", str(tmp_path)])
    assert (tmp_path / "schema.json").read_text() == schema_text()
    with pytest.raises(SystemExit) as ended:
        main(["schema", "--write", str(tmp_path / "missing")])
    assert ended.value.code == 12


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_shipped_configs_name_the_schema_and_follow_it(path: Path, schema: dict[str, Any]) -> None:
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")
    assert list(Draft202012Validator(schema).iter_errors(read_yaml(path))) == []


@pytest.mark.parametrize(
    "change", [{"trian": {}}, {"train": {"stpes": 3}}, {"train": {"steps": "many"}}, {"model": {"preset": "huge"}}]
)
def test_a_mistake_is_an_error_in_the_editor_too(change: dict[str, Any], schema: dict[str, Any]) -> None:
    raw = read_yaml(ROOT / "configs" / "tiny.yaml") | change
    assert list(Draft202012Validator(schema).iter_errors(raw))


@pytest.mark.parametrize("module", [job_config, run_config])
def test_every_key_has_a_description(module: Any, schema: dict[str, Any]) -> None:
    sections = {**schema["$defs"], "RunConfig": schema}
    names = [name for name, cls in vars(module).items() if getattr(cls, "__module__", "") == module.__name__]
    checked = [name for name in names if name in sections]
    assert checked
    for name in checked:
        for key, value in sections[name]["properties"].items():
            section = schema["$defs"].get(value.get("$ref", "").rpartition("/")[2], {})
            assert value.get("description") or section.get("description"), f"{name}.{key}"
