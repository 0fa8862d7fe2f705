"""Command line and environment of this project's programs, started with the interpreter that runs this process."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

# The folder that holds the packages: a checkout, or where a wheel was installed.
_PACKAGES_FOLDER = Path(__file__).resolve().parent.parent


def module_command(module: str, arguments: Sequence[str]) -> list[str]:
    """The command line `python -P -m module arguments`.

    Without -P, a package called `tasks` or `model` in the working directory would be taken for this project's.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def module_environment() -> dict[str, str]:
    """This process's environment, in which a program finds the project's packages where this process found them.

    site-packages is left out of PYTHONPATH: the interpreter finds it by itself, and there it would come before the
    standard library.
    """
    environment = dict(os.environ)
    if Path(sysconfig.get_path("purelib")) != _PACKAGES_FOLDER:
        paths = filter(None, [str(_PACKAGES_FOLDER), environment.get("PYTHONPATH")])
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment
