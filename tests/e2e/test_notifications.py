"""Notifications from a real server, of a run that a real worker let fail: to a webhook, and by e-mail."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.long


@contextmanager
def served(server: socketserver.BaseServer) -> Iterator[int]:
    """The port of a server that runs."""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def webhook(got: list[tuple[str, dict]]) -> ThreadingHTTPServer:
    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.headers["Content-Type"], json.loads(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing: the test's output is not the server's log."""

    return ThreadingHTTPServer(("127.0.0.1", 0), Receiver)


def mail_server(got: list[str]) -> socketserver.ThreadingTCPServer:
    """As much of RFC 5321 as a client needs."""

    class Session(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"220 here\r\n")
            while line := self.rfile.readline():
                word = line.split()[0].upper() if line.split() else b""
                if word == b"DATA":
                    self.wfile.write(b"354 go on\r\n")
                    got.append(b"".join(iter(self.rfile.readline, b".\r\n")).decode())
                self.wfile.write(b"221 bye\r\n" if word == b"QUIT" else b"250 ok\r\n")
                if word == b"QUIT":
                    return

    return socketserver.ThreadingTCPServer(("127.0.0.1", 0), Session)


def set_up(project, *addresses: str) -> str:
    file = Path(project.home) / "addresses"
    file.write_text("\n".join(addresses))
    ended = project.call("flows.cli", "setup", "--notify-file", str(file))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def set_state(project, run: str, kind: str, name: str) -> None:
    answer = project.api(f"flow_runs/{run}/set_state", {"state": {"type": kind, "name": name}, "force": True})
    assert answer["status"] == "ACCEPT", answer


def told(hooked: list[tuple[str, dict]], state: str) -> bool:
    return any(f": {state}. " in body["text"] for _, body in hooked)


def test_a_failed_run_is_told_of_by_webhook_and_by_mail_until_that_is_ended(project, worker):
    hooked: list[tuple[str, dict]] = []
    mailed: list[str] = []
    with served(webhook(hooked)) as hook_port, served(mail_server(mailed)) as mail_port:
        hook = f"http://127.0.0.1:{hook_port}/s3cret"
        mail = (
            f"mailto://127.0.0.1:{mail_port}?smtp=127.0.0.1&mode=insecure&from=cherry@example.com&to=team@example.com"
        )
        said = set_up(project, hook, mail)
        assert "notifications: to 1 webhooks and 1 other addresses" in said and "s3cret" not in said
        assert set_up(project, hook, mail) == said, "a second time changes nothing"
        ours = {"automations": {"name": {"any_": ["cherry tells of failures"]}}}
        assert len(project.api("automations/filter", ours)) == 1
        kept = project.api("block_documents/filter", {"include_secrets": False})
        assert [one["name"] for one in kept if one["name"].startswith("cherry-notify-")] == [
            "cherry-notify-1", "cherry-notify-2",
        ]  # fmt: skip
        assert "s3cret" not in json.dumps(kept)
        ended = project.deployment_run("train-flow/train-tiny", config=str(project.home / 'no"such.yaml'))
        run = next(line for line in ended.stdout.splitlines() if "UUID:" in line).split("UUID:")[1].strip()
        assert project.end_of(run) == "FAILED"
        project.wait_for(lambda: hooked and mailed, "the notifications")
        # As the automation does after a crash; then a good end.
        set_state(project, run, "SCHEDULED", "AwaitingRetry")
        project.wait_for(lambda: told(hooked, "AwaitingRetry"), "the restart")
        project.wait_for(lambda: project.state(run) == "FAILED", "the worker, for which the config is still missing")
        set_state(project, run, "COMPLETED", "Completed")
        project.wait_for(lambda: told(hooked, "Completed"), "the recovery")
    content_type, body = hooked[0]
    assert content_type == "application/json"
    assert list(body) == ["text"]
    for words in ("train-flow no", ": Failed. ", "no config file at", run):
        assert words in body["text"], body
    assert "Failed" in mailed[0] and "To: team@example.com" in mailed[0]
    assert "notifications: none" in set_up(project)
    assert project.api("automations/filter", ours) == []
    kept = project.api("block_documents/filter", {"include_secrets": False})
    assert not [one for one in kept if one["name"].startswith("cherry-notify-")]
