"""Commands as a user without a name, home or group, as containers run them; tests of root start them.

The interpreter and the files of a test may lie in directories that only root may enter. In a mount namespace of the
command's own, these are replaced by empty ones in which only what the command needs is seen.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
UID = 54321
_NAMES = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME")


def run_as_stranger(command: Sequence[str], *, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The ended command, run in `folder` as uid 54321, with `HOME` and names only if `variables` have them.

    The folder is opened to others; pytest makes it the user's own. The test is skipped where this user may not change
    uids and mounts.
    """
    tools = [shutil.which(name) for name in ("unshare", "setpriv")]
    if os.geteuid() or None in tools:
        pytest.skip("only root, with unshare and setpriv, can run a command as somebody else")
    folder.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key not in _NAMES and "XDG" not in key}
    environment = {key: value for key, value in environment.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **variables}
    user = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]

    def call(program: Sequence[str]) -> subprocess.CompletedProcess[str]:
        lines = [*_mounts(_needed(folder)), shlex.join(["cd", str(folder)]), shlex.join(["exec", *program])]
        namespace = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", "\n".join(lines)]
        return subprocess.run(namespace, capture_output=True, text=True, env=environment, check=False)

    allowed = call([*user, "true"])
    if allowed.returncode:
        pytest.skip(f"mounting is not allowed here: {allowed.stderr.strip()}")
    return call([*user, *command])


def _needed(folder: Path) -> list[Path]:
    """What the command must see: the interpreter, its packages, this project, and its folder."""
    packages = [Path(place) for place in sys.path if place and Path(place).is_dir()]
    found = {Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), ROOT, folder.resolve(), *packages}
    return sorted(path for path in found if not any(other in path.parents for other in found))


def _mounts(needed: Sequence[Path]) -> list[str]:
    """Shell lines that replace directories which others may not enter by ones that hold only what is needed."""
    closed = {parent for path in needed for parent in _closed(path)}
    hidden = [path for path in sorted(closed) if not any(parent in closed for parent in path.parents)]
    behind = [path for path in needed if any(parent in hidden for parent in path.parents)]
    lines = ["mount -t tmpfs none /mnt"]
    for number, path in enumerate(behind):
        lines += [f"mkdir /mnt/{number}", f"mount --rbind {shlex.quote(str(path))} /mnt/{number}"]
    lines += [f"mount -t tmpfs -o mode=755 none {shlex.quote(str(path))}" for path in hidden]
    for number, path in enumerate(behind):
        lines += [f"mkdir -p {shlex.quote(str(path))}", f"mount --rbind /mnt/{number} {shlex.quote(str(path))}"]
    return lines


def _closed(path: Path) -> list[Path]:
    """Directories above `path` that others may not enter."""
    return [parent for parent in path.parents if not parent.stat().st_mode & 0o001]
