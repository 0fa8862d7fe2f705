"""`cherry run` and `cherry deploy` without a server that answers: the error, and where to look and how to resume."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from rich.console import Console

from base.errors import OperationalError
from flows import commands
from flows.prefect_server import TemporaryServer
from tasks.overrides import resolve
from tasks.run_config import RunConfig


@pytest.fixture
def server() -> Iterator[TemporaryServer]:
    """A named server that does not answer: nothing listens on the discard port."""
    named = {PREFECT_API_URL: "http://somebody:secret@127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}
    with temporary_settings(named):
        yield TemporaryServer()


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return resolve("configs/tiny.yaml", {"name": "mine", "runs_directory": str(tmp_path)})


@pytest.fixture
def screen() -> Console:
    return Console(file=io.StringIO(), width=400, color_system=None)


def shown(screen: Console) -> str:
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_a_run_without_its_server_names_it_without_the_password_and_says_how_to_resume(
    screen: Console, server: TemporaryServer, config: RunConfig, tmp_path: Path
) -> None:
    with pytest.raises(OperationalError, match=r"http://127\.0\.0\.1:9/api does not answer") as caught:
        commands.run(screen, server, config, ["configs/tiny.yaml"])
    assert "secret" not in str(caught.value)
    text = shown(screen)
    assert f"run mine in {tmp_path / 'mine'}" in text
    assert "resume:   the same command" in text
    assert "train/" not in text, "there are no logs of training yet"


def test_a_release_without_its_server_says_where_its_logs_are(
    screen: Console, server: TemporaryServer, config: RunConfig, tmp_path: Path
) -> None:
    with pytest.raises(OperationalError, match="does not answer"):
        commands.deploy(screen, server, config, version=3)
    assert f"logs:  {tmp_path}/serving/*.log" in shown(screen)


def test_a_finished_run_shows_its_formats_with_their_verdicts(capsys):
    row = {"bytes_ratio": 0.5, "dnll": 0.001, "top1": 0.98, "passed": True, "format": "int8"}
    assert commands._quantized({"formats": [row, row | {"format": "w4a16", "passed": False}]}).splitlines() == [
        "int8: 0.50 of the bytes, +0.0010 nats per token, likeliest token the same for 98.0%: passed",
        "w4a16: 0.50 of the bytes, +0.0010 nats per token, likeliest token the same for 98.0%: not to be served",
    ]
