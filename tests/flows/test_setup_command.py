"""`cherry setup`: what it refuses, and the file of automations; tests/e2e/ runs it against a server."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from prefect.events.schemas.automations import AutomationCore

from base.errors import ConfigError, MissingFileError, OperationalError
from flows import setup_command
from flows.setup_command import POOL, set_up

ROOT = Path(__file__).resolve().parents[2]


def test_a_folder_without_the_files_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"no prefect\.yaml in .*Run `cherry setup` in a checkout"):
        set_up(tmp_path)


def test_without_a_server_it_says_how_to_start_one():
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings(restore_defaults={PREFECT_API_URL}), pytest.raises(ConfigError, match="--no-prompt"):
        set_up(ROOT)


def test_a_wrong_address_is_the_caller_s():
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with (
        temporary_settings({PREFECT_API_URL: "garbage"}),
        pytest.raises(ConfigError, match=r"PREFECT_API_URL: must be"),
    ):
        set_up(ROOT)


class ServerThatStarts:
    """A clock for the command, on which a server that answers 404 starts to listen after `after_s` seconds."""

    def __init__(self, after_s: float) -> None:
        self.now, self.after_s, self.asked = 0.0, after_s, []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.server: HTTPServer | None = None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now >= self.after_s and self.server is None:
            self.start()

    def start(self) -> None:
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_error(404)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                """Nothing: the test's output is not the server's log."""

        self.server = HTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()


def test_a_server_that_takes_minutes_to_start_is_waited_for(monkeypatch, capsys):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    clock = ServerThatStarts(after_s=120.0)
    monkeypatch.setattr(setup_command, "time", clock)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    try:
        with (
            temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{clock.port}/api"}),
            pytest.raises(OperationalError, match="404"),
        ):
            set_up(ROOT)
    finally:
        clock.close()
    assert (clock.now, clock.asked[0]) == (120.0, "/api/health")
    assert capsys.readouterr().err.count("waiting for Prefect's server") == 1


def test_the_automations_are_prefects_and_of_this_pool_alone():
    written = yaml.safe_load((ROOT / "automations.yaml").read_text())["automations"]
    for values in written:
        trigger = AutomationCore.model_validate(values).trigger
        assert trigger.match_related.root == {"prefect.resource.role": "work-pool", "prefect.resource.name": POOL}
