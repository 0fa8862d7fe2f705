"""The version of the code: digests of a step's own sources, and git's view of a real checkout."""

from __future__ import annotations

import ast
import shutil
import subprocess
from pathlib import Path

import pytest

from cherry.remote.source_digest import source_digest, source_files
from tasks.code_version import PACKAGES, STEP_SOURCES, code_version, git_version
from tasks.processes.programs import PACKAGES_FOLDER


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the packages."""
    for name in PACKAGES:
        shutil.copytree(PACKAGES_FOLDER / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "steps"),
    [
        ("cherry/trainer.py", {"provision", "train", "export", "evaluate"}),
        ("model/quantize.py", {"export", "quantize", "evaluate"}),
        ("model/quantization/folder.py", {"export", "quantize", "evaluate"}),
        ("model/calibration/gptq.py", {"export", "quantize", "evaluate"}),
        ("cherry/calibration/quantize.py", {"provision", "export", "quantize", "evaluate"}),
        ("cherry/calibration/documents.py", {"provision", "export", "quantize", "evaluate"}),
        ("cherry/planner/plan.py", {"provision", "export", "evaluate"}),
        ("anything/statistics/compare.py", {"evaluate"}),
        ("tasks/export.py", {"export"}),
        ("flows/cli.py", set()),
        ("base/storage.py", set(STEP_SOURCES)),
    ],
)
def test_a_changed_file_changes_the_steps_that_compute_with_it_and_no_other(
    checkout: Path, changed: str, steps: set[str]
) -> None:
    def digests() -> dict[str, str]:
        return {step: source_digest(checkout, sources) for step, sources in STEP_SOURCES.items()}

    before = digests()
    assert digests() == before
    with (checkout / changed).open("a") as handle:
        handle.write("# another line\n")
    after = digests()
    assert {step for step in before if before[step] != after[step]} == steps


def test_a_file_that_moves_is_another_digest(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    before = source_digest(tmp_path, ["."])
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert source_digest(tmp_path, ["."]) != before


def test_every_source_of_a_step_exists() -> None:
    missing = {
        source
        for sources in STEP_SOURCES.values()
        for source in sources
        if not (PACKAGES_FOLDER / source.removeprefix("!")).exists()
    }
    assert missing == set()


def imported_files(start: str) -> set[Path]:
    """Files of the packages that a module imports, directly or not, inside functions too."""
    todo, found = [start], set()
    while todo:
        name = todo.pop()
        path = PACKAGES_FOLDER.joinpath(*name.split("."))
        file = next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
        if name.split(".")[0] not in PACKAGES or file is None or file in found:
            continue
        found.add(file)
        todo.append(name.rpartition(".")[0])
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def test_training_depends_on_all_that_its_program_imports() -> None:
    imported = imported_files("cherry.rank_main") | imported_files("cherry.launcher")
    assert PACKAGES_FOLDER / "cherry" / "trainer.py" in imported
    assert imported <= source_files(PACKAGES_FOLDER, STEP_SOURCES["train"])


def test_quantizing_depends_on_what_its_program_imports() -> None:
    """Of cherry's own files: the program, and what makes a calibration set; the config's are in the flags."""
    imported = imported_files("cherry.calibration.quantize")
    others = {PACKAGES_FOLDER / "cherry" / f"{name}.py" for name in _CONFIGURATION}
    assert imported <= source_files(PACKAGES_FOLDER, STEP_SOURCES["quantize"]) | others


_CONFIGURATION = ("__init__", "job_config", "parallel_rules", "train_config", "loss", "triton_loss")


def git(folder: Path, *arguments: str) -> str:
    own = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=trunk"]
    command = [str(shutil.which("git")), *own, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_checkout_has_its_commit_its_branch_its_remote_without_credentials_and_whether_it_is_clean(
    tmp_path: Path,
) -> None:
    assert git_version(tmp_path) is None
    git(tmp_path, "init")
    assert git_version(tmp_path) is None, "there is no commit yet"
    (tmp_path / "a.py").write_text("x = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    found = git_version(tmp_path)
    assert found is not None
    assert (found.commit, found.branch, found.repository, found.dirty) == (
        git(tmp_path, "rev-parse", "HEAD"),
        "trunk",
        None,
        False,
    )
    git(tmp_path, "remote", "add", "origin", "https://me:secret@example.org/x.git")
    git(tmp_path, "checkout", "--detach")
    (tmp_path / "a.py").write_text("x = 2\n")
    found = git_version(tmp_path)
    assert found is not None
    assert (found.branch, found.repository, found.dirty) == (None, "https://***@example.org/x.git", True)
    (tmp_path / "inside").mkdir()
    assert git_version(tmp_path / "inside") is None, "an environment in another project's checkout is none of ours"


def test_the_code_of_this_process_has_a_version() -> None:
    assert len(code_version().digest) == 64
    assert code_version() is code_version()
