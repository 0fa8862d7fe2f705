"""Where a program that a task starts finds this project's packages."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tasks import programs
from tasks.programs import module_command, module_environment

ROOT = Path(__file__).resolve().parents[2]


def test_a_module_of_the_working_directory_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for name in ("tasks", "base"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')\n")
    command = module_command("flows.prefect_server", ["--help"])
    ended = subprocess.run(command, cwd=tmp_path, env=module_environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "--parent" in ended.stdout


def test_the_packages_folder_comes_first_unless_python_finds_it_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert module_environment()["PYTHONPATH"] == os.pathsep.join([str(ROOT), "/elsewhere"])
    monkeypatch.setattr(programs, "_PACKAGES_FOLDER", Path(sysconfig.get_path("purelib")))
    assert module_environment()["PYTHONPATH"] == "/elsewhere"
