"""Object stores of the tests, real S3 servers over HTTP: one honours a conditional put, the other ignores it."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

KEY, SECRET = "test", "testtest"


def _program(name: str) -> str:
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    found = shutil.which(name, path=scripts)
    assert found, f"no {name}: install the development dependencies"
    return found


@contextmanager
def _serving(command: list[str], ready: str) -> Iterator[str]:
    """The line with `ready` on the server's stderr; the server ends with the context."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        told = next((line for line in server.stderr if ready in line), None)
        assert told, f"{command[0]} ended with {server.wait()}"
        # What it says from now on is read, so that it never waits for a reader.
        drain = threading.Thread(target=server.stderr.read, daemon=True)
        drain.start()
        try:
            yield told
        finally:
            server.kill()  # at once: SeaweedFS takes 10 s and more to end by itself
            drain.join()


class SeaweedFS:
    """SeaweedFS's S3 server in front of a folder. Of two puts with `If-None-Match: *` the second fails.

    Args:
        address: IP address that it listens at.
    """

    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        self._folder, self._address = folder, address
        names = [f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
        self._ports = dict(zip(names, free_ports(len(names)), strict=True))
        self._running = ExitStack()
        self.url = f"http://{address}:{self._ports['s3.port']}"

    def start(self) -> None:
        """Start it, for the first time or after it was killed, and wait until it answers."""
        keys = {"accessKey": KEY, "secretKey": SECRET}
        identity = {"name": "test", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        (self._folder / "keys.json").write_text(json.dumps({"identities": [identity]}))
        (self._folder / "data").mkdir(exist_ok=True)
        options = {
            **self._ports,
            "dir": self._folder / "data",
            "ip": self._address,
            "ip.bind": self._address,
            "master.telemetry": "false",
            "volume.max": 0,
            "volume.minFreeSpace": 0,
            "s3.autoCreateBucket": "false",
            "s3.config": self._folder / "keys.json",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
        }
        flags = [f"-{name}={value}" for name, value in options.items()]
        command = [_program("weed"), "-logtostderr=true", "server", "-s3", *flags]
        self._running.enter_context(_serving(command, "Start Seaweed S3 API Server"))

    def kill(self) -> None:
        """Kill it outright; what it holds stays on the disk."""
        self._running.close()
        for port in self._ports.values():  # it makes these beside each port
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket_file.unlink()


@contextmanager
def seaweedfs(folder: Path, address: str = "127.0.0.1") -> Iterator[str]:
    """URL of a SeaweedFS server in front of a folder; see `SeaweedFS`."""
    server = SeaweedFS(folder, address)
    try:
        server.start()
        yield server.url
    finally:
        server.kill()


@contextmanager
def rclone(folder: Path) -> Iterator[str]:
    """URL of rclone's S3 server in front of a folder. It ignores the condition of a put, as some real stores do."""
    options = ["--addr", "127.0.0.1:0", "--auth-key", f"{KEY},{SECRET}", "--config", os.devnull]
    with _serving([_program("rclone"), "serve", "s3", *options, str(folder)], "http://") as told:
        yield "http://" + told.partition("http://")[2].split("/")[0].strip(" []\n")


def make_bucket(url: str) -> None:
    """Make the bucket called `bucket` in the store at a URL."""
    from s3fs import S3FileSystem

    S3FileSystem(endpoint_url=url, key=KEY, secret=SECRET, skip_instance_cache=True).mkdir("bucket")


@contextmanager
def leading_to(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lead the environment to the store at a URL, also that of programs."""
    from s3fs import S3FileSystem

    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("NO_PROXY", ",".join(dict.fromkeys(("127.0.0.1", str(urlsplit(url).hostname)))))
    S3FileSystem.clear_instance_cache()  # a client keeps the address that it was made with
    yield
    S3FileSystem.clear_instance_cache()


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, outside of those that Linux gives to connections before a server takes them."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 32_000), 1000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")
