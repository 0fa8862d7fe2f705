"""The installed wheel, used from an empty folder."""

from __future__ import annotations

import json
import subprocess
import zipfile
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("base", "model", "cherry", "anything", "tasks", "flows")
FEW_STEPS = (
    *("name=mine", "train.steps=6", "train.warmup_steps=2", "train.evaluate_every_steps=6", "checkpoint.every_steps=6"),
    *("data.max_documents=60", "data.sequence_length=64", "evaluate.documents=4", "evaluate.max_document_tokens=64"),
)
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(installed: Path, outside: dict[str, str], tmp_path: Path) -> Command:
    """Runs an installed script in an empty folder."""
    folder = tmp_path / "empty"
    folder.mkdir()

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        program = [str(installed / words[0]), *words[1:]]
        return subprocess.run(program, cwd=folder, env=outside, capture_output=True, text=True, check=False)

    return run


def test_the_wheel_holds_code_types_configs_and_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        configs = {name for name in names if name.endswith(".yaml")}
        contents = {name: archive.read(name) for name in configs}
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    modules = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert modules - names == set()
    assert {f"{package}/py.typed" for package in PACKAGES} - names == set()
    shipped = {f"base/{path.relative_to(ROOT)}": path.read_bytes() for path in (ROOT / "configs").rglob("*.yaml")}
    assert contents == shipped
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {*PACKAGES, "cherry_main.py"}
    fields = Parser().parsestr(metadata)
    assert (fields["License-Expression"], fields["License-File"]) == ("Apache-2.0", "LICENSE")


def test_light_commands_need_no_checkout(command: Command, installed: Path) -> None:
    planned = command("cherry", "plan", "configs/671b.yaml", "--cluster", "configs/clusters/h100-256.yaml", "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["fits"]
    packaged = installed.parent.glob("lib/python*/site-packages/base/configs/671b.yaml")
    assert f"configs/671b.yaml: taken from the package, {next(packaged)}" in planned.stderr
    assert command("cherry", "plan", "671b", "--cluster", "h100-256", "--json").stdout == planned.stdout
    examined = command("cherry", "doctor")
    assert examined.returncode == 0, examined.stdout
    for program in ("cherry", "cherry-launch", "anything"):
        assert "usage" in command(program, "--help").stdout.lower()


def test_a_run_needs_no_checkout(command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty" / "tasks.py").write_text("raise SystemExit('not this one')\n")
    ended = command("cherry", "run", "configs/tiny.yaml", *FEW_STEPS)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    run = tmp_path / "empty" / "runs" / "mine"
    assert len((run / "train" / "metrics.jsonl").read_text().splitlines()) == 6
    assert json.loads((run / "summary.json").read_text())["verdict"]
    again = command(
        "cherry-launch", "--nproc_per_node=1", "train.py", "--config", f"{run}/config.yaml", "--run_dir", str(run)
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "starting the installed one (-m cherry.rank_main)" in again.stdout
    assert "step_6" in again.stdout


def test_a_package_that_is_shadowed_is_named(command: Command, outside: dict[str, str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "tasks").mkdir(parents=True)
    (other / "tasks" / "__init__.py").write_text("")
    outside["PYTHONPATH"] = str(other)
    for program in ("cherry", "cherry-launch", "anything"):
        ended = command(program, "--help")
        assert ended.returncode == 11
        assert f"tasks is {other}/tasks/__init__.py" in ended.stderr
        assert "environment of its own" in ended.stderr
