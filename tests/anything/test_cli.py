"""The `anything` command as a person runs it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from anything.cli import main
from anything.keys import load_keys, revoke_key
from anything.testing import EchoEngine
from base.errors import ConfigError


def test_key_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "keys.json")
    assert main(["key", "create", "--key_file", path]) == 0
    key = capsys.readouterr().out.strip()
    record = load_keys(path).find(key)
    assert main(["key", "revoke", "--key_file", path, record.key_id]) == 0
    assert main(["key", "list", "--key_file", path]) == 0
    assert capsys.readouterr().out == f"{record.key_id} revoked\n"
    assert load_keys(path).find(key).revoked
    assert main(["key", "revoke", "--key_file", path, "nobody"]) == ConfigError.exit_code
    with pytest.raises(ConfigError, match="nobody"):
        revoke_key(path, "nobody")


def test_infer_prints_the_answer(
    serve: Callable[..., str],
    key_file: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = serve(EchoEngine())
    monkeypatch.setenv("ANYTHING_API_KEY", key_file[1])
    assert main(["infer", "one two", "--url", url]) == 0
    assert main(["infer", "one two", "--url", url, "--stream", "--max_tokens", "1"]) == 0
    assert capsys.readouterr().out == "one two\none \n"
    # What str.splitlines ends a line at is text.
    assert main(["infer", "a\u2028b\x85c\x0cd", "--url", url, "--stream"]) == 0
    assert capsys.readouterr().out == "a\u2028b\x85c\x0cd\n"
    monkeypatch.setenv("ANYTHING_API_KEY", "wrong")
    assert main(["infer", "one two", "--url", url]) == 17
    assert "error: " in capsys.readouterr().err


def test_serve_says_what_is_wrong_before_it_loads(
    tmp_path: Path, key_file: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ANYTHING_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ["--key_file", key_file[0]]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--model_path", str(tmp_path), "--port", port, *keys]) == 33
        assert f"port {port} on 127.0.0.1 is in use" in capsys.readouterr().err
    assert main(["serve", "--model_path", str(tmp_path), "--port", "0", *keys]) == 12
    assert "holds no model" in capsys.readouterr().err
    assert main(["serve", "--model_path", str(tmp_path), "--port", "0"]) == 11
    assert "at least one API key" in capsys.readouterr().err
    assert main(["serve", "--routes", str(tmp_path / "routes.json"), "--port", "0", *keys]) == 12
    assert main(["serve", "--model_path", "x", "--port", "70000", *keys]) == 11
    config = tmp_path / "config.yaml"
    config.write_text("serve:\n  prot: 8080\n")
    assert main(["serve", "--model_path", "x", "--config", str(config), *keys]) == 11
    assert "did you mean port?" in capsys.readouterr().err


def test_serve_a_folder_that_is_no_model(tmp_path: Path, model_folder: str, key_file: tuple[str, str]) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    command = [sys.executable, "-m", "anything.cli", "serve", "--model_path", str(broken), "--port", "0"]
    done = subprocess.run([*command, "--key_file", key_file[0]], capture_output=True, text=True, timeout=120)
    assert 10 <= done.returncode < 30
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") or "error: " in done.stderr


@pytest.mark.slow
def test_serve_a_model_and_route_to_it(tmp_path: Path, model_folder: str, key_file: tuple[str, str]) -> None:
    """Two processes: a replica with a model, and a gateway in front; both end with 0 on SIGTERM."""
    key, client_key = tmp_path / "key", key_file[1]
    key.write_text(client_key)
    command = [sys.executable, "-m", "anything.cli", "serve", "--port", "0", "--key_file", key_file[0]]
    config = tmp_path / "config.yaml"
    config.write_text("name: run\nserve:\n  engine:\n    cache_blocks: 64\n    threads: 1\n    device: cpu\n")
    replica_port, front_port = tmp_path / "replica.json", tmp_path / "front.json"
    replica = [*command, "--model_path", model_folder, "--port_file", str(replica_port), "--config", str(config)]
    with subprocess.Popen(replica) as first:
        try:
            url = _wait_for(replica_port, first)["url"]
            route = {"name": "a", "version": "v1", "url": url, "weight_percent": 100, "api_key_file": str(key)}
            routes = tmp_path / "routes.json"
            routes.write_text(json.dumps({"salt": "s", "replicas": [route]}))
            with subprocess.Popen([*command, "--routes", str(routes), "--port_file", str(front_port)]) as second:
                try:
                    front = str(_wait_for(front_port, second)["url"])
                    environment = {**os.environ, "ANYTHING_API_KEY": client_key, "ANYTHING_URL": front}
                    ask = [sys.executable, "-m", "anything.cli", "infer", "hello", "--max_tokens", "8"]
                    asked = [
                        subprocess.run([*ask, *more], env=environment, capture_output=True, check=True).stdout
                        for more in ([], ["--stream"], ["--url", str(url)])
                    ]
                    assert asked[0]
                    assert asked[0] == asked[1] == asked[2]
                finally:
                    second.terminate()
                assert second.wait(60) == 0
        finally:
            first.terminate()
        assert first.wait(60) == 0


def _wait_for(port_file: Path, process: subprocess.Popen[bytes]) -> dict[str, object]:
    while not port_file.exists():
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
    record: dict[str, object] = json.loads(port_file.read_text())
    return record
