"""SkyPilot's own parser, in the environment that has it: SkyPilot needs other versions of libraries than this project.

Its parser is asked in a process of its own, which needs no network and starts no server.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

from base.errors import ConfigError

VERSION = "0.14.1"
"""Release whose parser and recovery by exit codes were tried, 2026-11-30. Older ones may ignore such keys."""
_TIMEOUT_S = 120.0
_INSTALL = (
    "Make an environment for it alone, with your clouds in the brackets (python -m venv DIR && DIR/bin/pip install "
    f"'skypilot[aws,kubernetes]=={VERSION}'), and set sky.client to DIR/bin/python in the cluster file."
)
# Answers by a file: SkyPilot prints what it likes.
_PROGRAM = """\
import json, sys
answer = {}
try:
    import sky
    answer["version"] = sky.__version__
    try:
        sky.Task.from_yaml(sys.argv[1])
    except Exception as error:
        answer["error"] = str(error) or type(error).__name__
except ImportError as error:
    answer["missing"] = str(error)
with open(sys.argv[2], "w") as file:
    json.dump(answer, file)
"""


def check(task: str, python: str) -> None:
    """Check that SkyPilot's parser takes a task. It looks at local files that the task names, and at no cloud.

    Args:
        task: the task file's text.
        python: interpreter of the environment with SkyPilot.

    Raises:
        ConfigError: the parser refuses the task, or the environment has no SkyPilot or an older one; tells how to
            install it.
    """
    with tempfile.TemporaryDirectory(prefix="cherry-sky-") as folder:
        file, answered = Path(folder) / "task.yaml", Path(folder) / "answer.json"
        file.write_text(task)
        answer = _ask(python, str(file), answered)
    version = answer.get("version")
    if version is None or _release(version) < _release(VERSION):
        found = f"has SkyPilot {version}" if version else f"has no SkyPilot ({answer.get('missing')})"
        raise ConfigError(f"sky.client: {python} {found}. {_INSTALL}")
    if "error" in answer:
        raise ConfigError(f"SkyPilot {version} refuses the task: {' '.join(answer['error'].split())}")


def _ask(python: str, file: str, answered: Path) -> dict[str, str]:
    environment = {**os.environ, "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    try:
        ended = subprocess.run(
            [os.path.expanduser(python), "-I", "-c", _PROGRAM, file, str(answered)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            env=environment,
            check=False,
        )
    except OSError as error:
        raise ConfigError(f"sky.client: {python} does not start ({error.strerror}). {_INSTALL}") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"sky.client: SkyPilot's parser in {python} gave no answer in {_TIMEOUT_S:.0f} s") from error
    if not answered.exists():
        told = (ended.stderr.strip().splitlines() or ["nothing"])[-1]
        raise ConfigError(f"sky.client: {python} ended with exit code {ended.returncode} and said: {told}. {_INSTALL}")
    answer: dict[str, str] = json.loads(answered.read_text())
    return answer


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
