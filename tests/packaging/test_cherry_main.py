"""The check in front of the console scripts."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import cherry_main


def test_the_packages_lie_beside_it() -> None:
    assert cherry_main.shadowed_packages() == {}


def test_a_package_of_another_place_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.py").touch()
    root = str(Path(cherry_main.__file__).parent)
    monkeypatch.delitem(sys.modules, "model", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(entry for entry in sys.path if entry != root), root])

    assert cherry_main.shadowed_packages() == {"model": str(tmp_path / "model.py")}
    monkeypatch.setattr(sys, "argv", ["cherry", "--version"])
    with pytest.raises(SystemExit) as ended:
        cherry_main.cherry()
    assert ended.value.code == 11
    assert f"model is {tmp_path / 'model.py'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "arguments", "code"),
    [
        (cherry_main.cherry, ["run", "nowhere.yaml"], 12),
        (cherry_main.cherry_launch, ["--nproc_per_node=none", "train.py"], 11),
        (cherry_main.cherry_launch, ["--cluster=nowhere.yaml", "train.py"], 12),
        (cherry_main.anything, ["infer"], 11),
    ],
)
def test_a_command_ends_with_the_code_of_its_error(
    program: Callable[[], None], arguments: list[str], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # commands set defaults for the programs that they start
    monkeypatch.delenv("ANYTHING_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(SystemExit) as ended:
        program()
    assert ended.value.code == code


def test_ctrl_c_while_a_command_is_imported_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pressed:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "flows.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "flows.cli", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Pressed(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        cherry_main.cherry()
    assert ended.value.code == 130


@pytest.mark.parametrize("how", [["-m", "flows.cli"], ["flows/cli.py"]])
@pytest.mark.parametrize(("present", "missing"), [([], "click"), (["click", "psutil"], "rich")])
def test_a_python_without_the_dependencies_is_told_in_a_sentence(
    how: list[str], present: list[str], missing: str, tmp_path: Path
) -> None:
    for package in present:
        (tmp_path / package).symlink_to(Path(str(importlib.import_module(package).__file__)).parent)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # Without site-packages: an interpreter that nothing is installed for.
    ended = subprocess.run(
        [sys.executable, "-S", *how, "doctor"],
        cwd=Path(cherry_main.__file__).parent,
        env=environment | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 11
    assert ended.stderr.startswith(f"error: this Python ({sys.executable}) has no package {missing}. Activate the")
    assert ended.stderr.count("\n") == 1
