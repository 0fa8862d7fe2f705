"""The version of the code that runs: git's where there is a checkout, the package's, and digests of source files."""

from __future__ import annotations

import functools
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from base.errors import without_credentials
from cherry import __version__
from cherry.remote.source_digest import source_digest
from tasks.processes.programs import PACKAGES_FOLDER

PACKAGES = ("base", "model", "cherry", "anything", "tasks", "flows")
STEP_SOURCES: dict[str, tuple[str, ...]] = {
    "provision": (
        "base",
        "model/model_config.py",
        "cherry",
        "tasks/provision.py",
        "tasks/providers",
        "tasks/plan_record.py",
    ),
    "data": ("base", "cherry/data", "tasks/data.py", "tasks/files/data_store.py"),
    # Training is what costs most to repeat: what its program does not import is left out.
    "train": (
        *("base", "model", "cherry", "tasks/train.py"),
        *(
            "!model/calibration",
            "!model/quantize.py",
            "!model/quantization",
            "!cherry/calibration",
            "!cherry/cluster.py",
            "!cherry/remote",
            "!cherry/sky",
            "!cherry/slurm",
            "!cherry/export.py",
            "!cherry/planner",
            "!cherry/scoring.py",
        ),
    ),
    "export": ("base", "model", "cherry", "tasks/export.py"),
    "quantize": ("base", "model", "cherry/calibration", "cherry/data", "tasks/quantize.py"),
    "evaluate": ("base", "model", "cherry", "anything/statistics", "tasks/evaluate.py"),
    "register": ("base", "tasks/records/model_card.py", "tasks/register.py", "tasks/tracking"),
}
"""Sources that a step's output depends on: its program's packages and the task's file, less those with a leading `!`.
A step that is not listed depends on all packages."""


@dataclass(frozen=True)
class GitVersion:
    """The checkout that the code runs from."""

    commit: str
    branch: str | None
    """`None` for a detached head."""
    repository: str | None
    """URL of the remote `origin`, without credentials; `None` where there is none."""
    dirty: bool
    """Whether tracked files are changed or new ones are not tracked."""


@dataclass(frozen=True)
class CodeVersion:
    """The version of the code; `git` is `None` for an installed package."""

    package: str
    digest: str
    """SHA-256 over every source file."""
    git: GitVersion | None


@functools.cache
def code_version() -> CodeVersion:
    """The version of the code of this process, looked up once."""
    return CodeVersion(__version__, source_digest(PACKAGES_FOLDER, PACKAGES), git_version(PACKAGES_FOLDER))


@functools.cache
def step_digest(step: str) -> str:
    """Digest of the code that computes a step, SHA-256: a part of its fingerprint. Looked up once a process."""
    return source_digest(PACKAGES_FOLDER, STEP_SOURCES.get(step, PACKAGES))


def git_version(root: Path) -> GitVersion | None:
    """The checkout whose top is `root`; `None` when it is none, or git is not installed."""
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD")
    # An environment inside another project's checkout is none of ours.
    if not top or not commit or Path(top).resolve() != root.resolve():
        return None
    remote = _git(root, "remote", "get-url", "origin")
    return GitVersion(
        commit=commit,
        branch=_git(root, "symbolic-ref", "--short", "-q", "HEAD") or None,
        repository=without_credentials(remote) if remote else None,
        dirty=bool(_git(root, "status", "--porcelain")),
    )


def _git(root: Path, *arguments: str) -> str:
    """Output of a git command, stripped; empty when it fails or git is not installed."""
    program = shutil.which("git")
    if program is None:
        return ""
    done = subprocess.run([program, "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
