"""`cherry doctor`: checks of versions, GPU, disk, memory, servers and ports, with advice. It changes nothing."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import httpx
import psutil

from base.errors import ConfigError
from flows.prefect_server import URL_VARIABLE, check_address

# The oldest release of each package that the suite has passed with; pyproject.toml holds the whole ranges.
OLDEST = {
    "torch": (2, 11),
    "accelerate": (1, 15),
    "prefect": (3, 8),
    "mlflow": (3, 17),
    "fastapi": (0, 139),
    "pydantic": (2, 11),
    "tokenizers": (0, 22),
    "safetensors": (0, 6),
    "fsspec": (2026, 2),
    "sqlalchemy": (2, 0),
}
# The first release that something does not work with.
TOO_NEW = {"sqlalchemy": ((2, 1), "Prefect's scheduler makes no runs with it")}
# A tiny run writes about 0.2 GiB; below this a run of any size ends in the middle of a checkpoint.
MIN_FREE_DISK_GIB = 2.0
MIN_FREE_MEMORY_GIB = 2.0


@dataclass(frozen=True)
class Check:
    """One check of the report; `advice` is empty when there is nothing to do."""

    name: str
    state: Literal["ok", "note", "fail"]
    found: str
    advice: str = ""


def examine(runs_directory: Path, ports: Iterable[tuple[str, int]]) -> list[Check]:
    """All checks: software, hardware, servers, ports.

    Args:
        runs_directory: directory of the runs; the free space of its file system is checked.
        ports: (program, its port) pairs to check on 127.0.0.1.
    """
    checks = [_python(), *_packages(), _gpu(), _disk(runs_directory), _memory()]
    checks.append(_prefect_server())
    checks.append(_server("MLflow server", os.environ.get("MLFLOW_TRACKING_URI"), "/health", "MLFLOW_TRACKING_URI"))
    checks += [_port(owner, port) for owner, port in ports]
    return checks


def _python() -> Check:
    return Check("Python", "ok", f"{platform.python_version()} ({sys.executable})")


def _packages() -> Iterator[Check]:
    for name, oldest in OLDEST.items():
        wanted = ".".join(map(str, oldest))
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Check(name, "fail", "not installed", f"Run `make install`, or install {name}>={wanted}.")
            continue
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
        limit, reason = TOO_NEW.get(name, ((sys.maxsize,), ""))
        if numbers < oldest:
            yield Check(name, "fail", version, f"{name}>={wanted} is needed.")
        elif numbers >= limit:
            below = ".".join(map(str, limit))
            yield Check(name, "fail", version, f"{reason}: {name}<{below} is needed.")
        else:
            yield Check(name, "ok", version)


def _gpu() -> Check:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Check("GPU", "note", "none (no nvidia-smi)", "The tiny model trains on the CPU; 16b and up need GPUs.")
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("GPU", "fail", str(error), "The driver does not answer.")
    if answer.returncode:
        return Check("GPU", "fail", answer.stderr.strip() or answer.stdout.strip(), "The driver does not answer.")
    gpus = answer.stdout.strip().splitlines()
    return Check("GPU", "ok", f"{len(gpus)} x {gpus[0]}")


def _disk(directory: Path) -> Check:
    existing = next(path for path in [directory.absolute(), *directory.absolute().parents] if path.exists())
    free_gib = shutil.disk_usage(existing).free / 2**30
    found = f"{free_gib:.1f} GiB free at {existing}"
    if not os.access(existing, os.W_OK):
        return Check("Disk", "fail", f"{existing} is not writable", "Choose another runs_directory.")
    if free_gib < MIN_FREE_DISK_GIB:
        return Check("Disk", "fail", found, f"At least {MIN_FREE_DISK_GIB} GiB are needed.")
    return Check("Disk", "ok", found)


def _memory() -> Check:
    free_gib = psutil.virtual_memory().available / 2**30
    found = f"{free_gib:.1f} GiB available, {os.cpu_count()} cores"
    if free_gib < MIN_FREE_MEMORY_GIB:
        return Check("Memory", "fail", found, f"At least {MIN_FREE_MEMORY_GIB} GiB are needed.")
    return Check("Memory", "ok", found)


def _prefect_server() -> Check:
    url, name = os.environ.get(URL_VARIABLE), "Prefect server"
    try:
        check_address(url or "http://127.0.0.1:4200/api")
    except ConfigError as error:
        return Check(name, "fail", f"{url}: no server's address", str(error))
    return _server(name, url, "/health", URL_VARIABLE)


def _server(name: str, url: str | None, path: str, variable: str) -> Check:
    if not url:
        return Check(name, "note", f"{variable} is not set", "A local default is used; set it to share runs.")
    if not url.startswith("http"):
        return Check(name, "ok", f"{url} (no server needed)")
    try:
        answer = httpx.get(url.rstrip("/") + path, timeout=5)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Check(name, "fail", f"{url}: {error}", f"Start it, or unset {variable} to use the local default.")
    state: Literal["ok", "fail"] = "ok" if answer.is_success else "fail"
    advice = "" if answer.is_success else f"{path} should answer 200; check {variable}."
    return Check(name, state, f"{url} answers {answer.status_code}", advice)


def _port(owner: str, port: int) -> Check:
    name = f"Port {port}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return Check(
                name, "note", f"in use (default of {owner})", "Fine if it is running; else choose another port."
            )
    return Check(name, "ok", f"free for {owner}")
