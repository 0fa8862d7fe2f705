"""`cherry doctor` against real sockets, servers, directories and programs."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from flows import doctor
from flows.doctor import Check, examine


@pytest.fixture(autouse=True)
def no_servers_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_a_wrong_address_of_prefect_s_server_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "garbage")
    found = check("Prefect server", tmp_path)
    assert found.state == "fail"
    assert found.advice.startswith("PREFECT_API_URL: must be the address of Prefect's server")


def check(name: str, runs_directory: Path, *ports: tuple[str, int]) -> Check:
    (found,) = [one for one in examine(runs_directory, ports) if one.name == name]
    return found


@contextmanager
def server(status: int) -> Iterator[tuple[str, list[str]]]:
    """URL of a server that answers every GET with `status`, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()
        thread.join()


def test_this_machine_which_runs_the_suite_has_what_is_needed(tmp_path: Path) -> None:
    checks = examine(tmp_path, [])
    assert [one.name for one in checks[:2]] == ["Python", "torch"]
    assert {one.name for one in checks} >= {"Python", *doctor.OLDEST, "GPU", "Disk", "Memory"}
    assert [one for one in checks if one.name in {"Python", *doctor.OLDEST} and one.state != "ok"] == []
    assert all(one.advice for one in checks if one.state == "fail")


def test_a_package_that_is_missing_too_old_or_too_new_fails_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "OLDEST", {"no-such-package": (1, 2), "httpx": (99, 0), "pydantic": (2, 11)})
    monkeypatch.setattr(doctor, "TOO_NEW", {"pydantic": ((2, 11), "It is another")})
    missing, old, new = (check(name, tmp_path) for name in ("no-such-package", "httpx", "pydantic"))
    assert (missing.state, missing.found) == ("fail", "not installed")
    assert "no-such-package>=1.2" in missing.advice
    assert (old.state, old.advice) == ("fail", "httpx>=99.0 is needed.")
    assert (new.state, new.advice) == ("fail", "It is another: pydantic<2.11 is needed.")


def test_a_listening_port_is_noted_and_a_free_one_is_free(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        taken = check(f"Port {port}", tmp_path, ("the gateway", port))
        assert taken.state == "note"
        assert "in use (default of the gateway)" in taken.found
    freed = check(f"Port {port}", tmp_path, ("the gateway", port))
    assert (freed.state, freed.found) == ("ok", "free for the gateway")


def test_a_server_is_asked_for_its_health(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server(200) as (url, asked):
        monkeypatch.setenv("PREFECT_API_URL", f"{url}/api/")
        found = check("Prefect server", tmp_path)
    assert (found.state, found.advice) == ("ok", "")
    assert asked == ["/api/health"]


def test_a_server_that_answers_with_a_failure_or_not_at_all_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(503) as (url, _):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        sick = check("MLflow server", tmp_path)
    assert sick.state == "fail"
    assert "answers 503" in sick.found
    gone = check("MLflow server", tmp_path)
    assert gone.state == "fail"
    assert "unset MLFLOW_TRACKING_URI" in gone.advice
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://[broken")
    assert check("MLflow server", tmp_path).state == "fail"


def test_no_server_and_a_tracking_file_need_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check("Prefect server", tmp_path).state == "note"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs/mlflow.db")
    found = check("MLflow server", tmp_path)
    assert (found.state, found.found) == ("ok", "sqlite:///runs/mlflow.db (no server needed)")


def test_the_disk_of_a_directory_that_does_not_exist_yet_is_its_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "MIN_FREE_DISK_GIB", 0.0)
    found = check("Disk", tmp_path / "not" / "yet")
    assert found.state == "ok"
    assert found.found.endswith(f"GiB free at {tmp_path}")
    assert not (tmp_path / "not").exists()
    monkeypatch.setattr(doctor, "MIN_FREE_DISK_GIB", 1e9)
    assert check("Disk", tmp_path).state == "fail"


def test_too_little_memory_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_FREE_MEMORY_GIB", 1e9)
    assert check("Memory", tmp_path).state == "fail"


@pytest.mark.parametrize(
    ("script", "state", "found"),
    [
        (
            "#!/bin/sh\necho 'H100, 81559 MiB, 580.1'\necho 'H100, 81559 MiB, 580.1'\n",
            "ok",
            "2 x H100, 81559 MiB, 580.1",
        ),
        ("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2\nexit 9\n", "fail", "NVIDIA-SMI has failed"),
        ("#!/no/such/interpreter\n", "fail", "No such file"),
        (None, "note", "none (no nvidia-smi)"),
    ],
)
def test_gpus_are_what_the_drivers_program_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, state: str, found: str
) -> None:
    tool = tmp_path / "nvidia-smi"
    if script is not None:
        tool.write_text(script)
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/nowhere")
    result = check("GPU", tmp_path)
    assert result.state == state
    assert found in result.found
