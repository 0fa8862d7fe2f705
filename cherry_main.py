"""Console scripts `cherry`, `cherry-launch` and `anything`, behind a check that Python finds this project's packages.

`base`, `model`, `tasks` and `flows` are common names. Where another distribution has one of them earlier on sys.path,
the command ends with a sentence about it instead of an ImportError from somewhere inside.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

PACKAGES = ("base", "model", "cherry", "anything", "tasks", "flows")
# Those of base/errors.py, which may be the very module that is not found.
_CONFIG_EXIT_CODE, _INTERRUPTED_EXIT_CODE = 11, 130


def shadowed_packages() -> dict[str, str]:
    """Where Python finds each of the project's packages that it does not take from beside this file."""
    root = Path(__file__).resolve().parent
    found: dict[str, str] = {}
    for name in PACKAGES:
        spec = find_spec(name)
        origin = spec.origin if spec is not None else None
        if origin is None or Path(origin).resolve() != root / name / "__init__.py":
            found[name] = origin or "nowhere"
    return found


def _check_packages() -> None:
    shadowed = shadowed_packages()
    if not shadowed:
        return
    places = ", ".join(f"{name} is {where}" for name, where in shadowed.items())
    print(
        f"error: Python finds other packages under the names of this project's: {places}; they should be in "
        f"{Path(__file__).resolve().parent}. Install cherry-framework into an environment of its own "
        "(pipx install cherry-framework), and look at PYTHONPATH.",
        file=sys.stderr,
    )
    raise SystemExit(_CONFIG_EXIT_CODE)


def explain_missing(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A sys.excepthook: one sentence about a Python without the dependencies; any other error keeps its traceback.

    Ctrl-C has none, as it ends the process by its signal.
    """
    if issubclass(kind, KeyboardInterrupt):
        return
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if not package or package in PACKAGES:
        sys.__excepthook__(kind, error, trace)
        return
    print(
        f"error: this Python ({sys.executable}) has no package {package}. Activate the environment of this checkout "
        "(. .venv/bin/activate), or make it first (make install).",
        file=sys.stderr,
    )
    raise SystemExit(_CONFIG_EXIT_CODE)


@contextmanager
def _started() -> Iterator[None]:
    """Context of a command's start, whose imports take long enough for a Ctrl-C."""
    try:
        _check_packages()
        yield
    except KeyboardInterrupt:
        raise SystemExit(_INTERRUPTED_EXIT_CODE) from None


@_started()
def cherry() -> None:
    """Run the `cherry` command."""
    from flows.cli import main

    main()


@_started()
def cherry_launch() -> None:
    """Run the `cherry-launch` command: on the hosts of --cluster, or on this node."""
    if any(word.partition("=")[0] == "--cluster" for word in sys.argv[1:]):
        from cherry.slurm.cluster_launch import main
    else:
        from cherry.launcher import main

    main()


@_started()
def anything() -> None:
    """Run the `anything` command."""
    from anything.cli import main

    raise SystemExit(main())


if __name__ == "__main__":
    cherry()
