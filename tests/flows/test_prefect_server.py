"""The Prefect server of a command that has none: who starts one, who it answers, and when it ends."""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from flows.prefect_server import _for_a_while

ROOT = Path(__file__).resolve().parents[2]
STARTS = """
import os, sys
from flows.offline import set_offline_defaults
from flows.prefect_server import TemporaryServer
set_offline_defaults()
server = TemporaryServer()
server.start()
import psutil
children = psutil.Process().children()
"""
ASKS = """
from prefect import flow
from prefect.client.orchestration import get_client

@flow
def doubled(number: int) -> int:
    return 2 * number

with server.answering():
    assert doubled(4) == 8
    with get_client(sync_client=True) as client:
        print(client.read_flow_runs()[0].state_name, [child.pid for child in children])
"""
WAITS = """
with server.answering():
    print(children[0].pid, flush=True)
    sys.stdin.read()
"""
FAILS = """
from base.errors import OperationalError
try:
    with server.answering():
        pass
except OperationalError as error:
    print(error)
"""
LEAVES = """
from prefect.settings import PREFECT_API_URL
children[0].wait()
with server.answering():
    print(PREFECT_API_URL.value())
"""
# Prefect makes its worker through this name of this module, or the one that takes its place would never be asked.
LEAVES_REFUSED = """
from base.errors import ConfigError
try:
    with server.answering():
        pass
except ConfigError as error:
    print(error)
"""
WORKER = """
import asyncio
from prefect.server.api import server

class Asked(Exception):
    pass

def worker(*_, **__):
    raise Asked

server.background_worker = worker

async def live():
    app = server.create_app()
    async with app.router.lifespan_context(app):
        raise AssertionError("it lives without")

try:
    asyncio.run(live())
except Asked:
    print("asked")
"""


@pytest.fixture
def environment(tmp_path):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    return kept | {"PREFECT_HOME": str(tmp_path / "prefect"), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}


def ended(program, environment, directory):
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=directory, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_a_flow_is_recorded_by_a_server_that_ends_with_the_process(environment, tmp_path):
    state, pids = ended(STARTS + ASKS, environment, tmp_path).split(" ", 1)
    assert state == "Completed"
    (pid,) = map(int, pids.strip("[]").split(","))
    assert not psutil.pid_exists(pid)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process that its parent is gone")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_killed_leaves_no_server_behind(environment, tmp_path, how):
    command = [sys.executable, "-c", STARTS + WAITS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, cwd=tmp_path, **pipes) as running:
        server = psutil.Process(int(running.stdout.readline()))
        assert "flows.prefect_server" in server.cmdline()
        running.send_signal(how)
        running.wait()
    server.wait(timeout=30)


@pytest.mark.slow
def test_a_server_that_cannot_have_its_database_is_an_error_that_names_the_directory(environment, tmp_path):
    (tmp_path / "file").touch()
    environment["PREFECT_HOME"] = str(tmp_path / "file" / "prefect")
    message = ended(STARTS + FAILS, environment, tmp_path)
    assert "NotADirectoryError" in message
    assert "Traceback" not in message
    assert f"PREFECT_HOME ({environment['PREFECT_HOME']})" in message


@pytest.mark.slow
def test_a_database_that_does_not_answer_is_an_error_that_names_the_variable(environment, tmp_path):
    environment["PREFECT_API_DATABASE_CONNECTION_URL"] = "postgresql+asyncpg://somebody:secret@127.0.0.1:9/prefect"
    message = ended(STARTS + FAILS, environment, tmp_path)
    assert "PREFECT_API_DATABASE_CONNECTION_URL must name a database that answers" in message
    assert "refused" in message.lower()
    assert "secret" not in message


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        {"PREFECT_SERVER_API_AUTH_STRING": "admin:pass"},
        {"PREFECT_API_KEY": "pnu_key"},
        {"PREFECT_PROFILE": "nosuch"},
        {"http_proxy": "http://127.0.0.1:9"},
        {"ALL_PROXY": "socks5h://127.0.0.1:9"},
        {"HTTPS_PROXY": "http://127.0.0.1:9"},
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_a_flow_is_recorded_whatever_the_environment_says_of_other_servers(environment, tmp_path, variables):
    del environment["NO_PROXY"]
    done = subprocess.run(
        [sys.executable, "-c", STARTS + ASKS],
        capture_output=True,
        text=True,
        env=environment | variables,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Completed")
    assert "EventsWorker failed" not in done.stderr


@pytest.mark.slow
def test_servers_that_start_at_once_in_a_new_home_all_answer(environment, tmp_path):
    command = [sys.executable, "-c", STARTS + ASKS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen(command, env=environment, cwd=tmp_path, **pipes) for _ in range(3)]
    output = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], "\n".join(output)


def test_a_server_that_is_named_is_the_one(environment, tmp_path):
    environment["PREFECT_API_URL"] = "http://127.0.0.1:9/api"
    assert ended(STARTS + "print(children, server.starting)", environment, tmp_path) == "[] False"


@pytest.mark.parametrize(
    "wrong",
    ["garbage", "127.0.0.1:4200/api", "http://", "http://host:port/api", "http://[::1/api", "ftp://host/api", "x y"],
)
def test_what_is_no_server_s_address_is_the_caller_s(code, monkeypatch, capsys, tmp_path, wrong):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_API_URL", wrong)
    assert code("run", "tiny") == 11
    told = f"PREFECT_API_URL: must be the address of Prefect's server, like http://127.0.0.1:4200/api (got {wrong!r})"
    assert told in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_an_address_of_a_profile_that_is_none_is_the_caller_s_and_hides_its_password(environment, tmp_path):
    home = Path(environment["PREFECT_HOME"])
    home.mkdir()
    address = "http://me:secret@host:port/api"
    (home / "profiles.toml").write_text(f'active = "own"\n[profiles.own]\nPREFECT_API_URL = "{address}"\n')
    told = ended(STARTS + LEAVES_REFUSED, environment, tmp_path)
    assert "PREFECT_API_URL: must be" in told and "secret" not in told


def test_a_server_that_a_profile_names_is_the_one(environment, tmp_path):
    home = Path(environment["PREFECT_HOME"])
    home.mkdir()
    address = "http://127.0.0.1:9/api"
    (home / "profiles.toml").write_text(f'active = "own"\n[profiles.own]\nPREFECT_API_URL = "{address}"\n')
    assert ended(STARTS + LEAVES, environment, tmp_path) == address


@pytest.mark.slow
def test_prefect_takes_its_background_worker_from_where_ours_replaces_it(environment, tmp_path):
    assert ended(WORKER, environment, tmp_path) == "asked"


@pytest.mark.parametrize(("seconds", "before", "after"), [(0.0, ["came", "left"], []), (3600.0, ["came"], ["left"])])
def test_the_background_worker_leaves_after_a_while_or_with_the_server(monkeypatch, seconds, before, after):
    monkeypatch.setattr("flows.prefect_server._WORKER_S", seconds)
    events: list[str] = []

    @asynccontextmanager
    async def worker():
        events.append("came")
        try:
            yield
        finally:
            events.append("left")

    async def live():
        async with _for_a_while(worker()):
            while len(events) < len(before):
                await asyncio.sleep(0)
            events.append("the server ends")

    asyncio.run(live())
    assert events == [*before, "the server ends", *after]
