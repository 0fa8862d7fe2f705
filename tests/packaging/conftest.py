"""The wheel, built from this checkout and installed into an environment that has nothing else of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    *("base", "model", "cherry", "anything", "tasks", "flows", "configs"),
    *("cherry_main.py", "pyproject.toml", "README.md", "LICENSE"),
)


def dependencies() -> list[str]:
    """The folders of installed packages that this interpreter looks in, without those of the checkout."""
    folders = [Path(entry) for entry in [*sys.path, sysconfig.get_path("purelib")] if entry]
    return list(dict.fromkeys(str(folder) for folder in folders if folder.name == "site-packages"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel. The sources are copied first, so that no build folder is left in the checkout."""
    sources, target = tmp_path_factory.mktemp("sources") / "checkout", tmp_path_factory.mktemp("wheel")
    sources.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, sources)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    search = {**os.environ, "PYTHONPATH": os.pathsep.join(dependencies())}
    ended = subprocess.run(
        [*command, "--wheel-dir", str(target), str(sources)], env=search, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts' folder of a fresh virtual environment that holds the wheel, and sees this one's dependencies."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    scripts = home / "bin"
    (site_packages,) = home.glob("lib/python*/site-packages")
    # A line of a .pth file adds a folder, but not what .pth files in that folder add: no editable install.
    (site_packages / "dependencies.pth").write_text("\n".join(dependencies()) + "\n")
    search = {**os.environ, "PYTHONPATH": os.pathsep.join(dependencies())}
    command = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "install", "--quiet"]
    command += ["--no-deps", "--no-index", str(wheel)]
    ended = subprocess.run(command, env=search, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return scripts


@pytest.fixture
def outside(tmp_path: Path) -> dict[str, str]:
    """The environment variables of a person who never saw the checkout."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PREFECT_API_URL")}
    return {**kept, "PREFECT_HOME": str(tmp_path / "prefect"), "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
