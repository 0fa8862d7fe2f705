"""The services as they are: started, used as their clients use them, their programs killed, stopped."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from base.errors import MissingFileError, PortInUseError
from flows.services import start
from flows.services.layout import Ports, open_services
from flows.services.programs import database_user, postgres_program
from tests.object_stores import free_ports
from tests.processes import every, is_alive
from tests.project import ROOT, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.long]

# As a client: the variables of the environment file, and nothing else.
CLIENT = """
import pathlib, mlflow
from prefect.client.orchestration import get_client
mlflow.set_experiment("services")
with mlflow.start_run() as run:
    mlflow.log_metric("loss", 1.5)
    pathlib.Path("note.txt").write_text("kept")
    mlflow.log_artifact("note.txt")
assert mlflow.get_run(run.info.run_id).data.metrics == {"loss": 1.5}
print(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/note.txt"), run.info.artifact_uri.partition(":")[0])
with get_client(sync_client=True) as client:
    print(client.hello().status_code, len(client.read_work_pools()))
"""


@pytest.fixture(scope="module")
def _installed():
    """Skips where PostgreSQL, which is no Python package, or its user is missing."""
    try:
        postgres_program("initdb")
        database_user()
    except MissingFileError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def services(_installed):
    """Services on free ports, in a directory that PostgreSQL's user reaches too."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        made = open_services(Path(name) / "s", Ports(*free_ports(len(Ports.__dataclass_fields__))))
        try:
            start.up(made, print)
        except Exception:
            start.down(made)
            raise
        yield made
        start.down(made)
        assert not [p for p in every("cmdline") if name in " ".join(p.info["cmdline"] or [])]


@pytest.fixture
def client(services, tmp_path):
    def call():
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_", "AWS_"))}
        environment = kept | {"PREFECT_HOME": str(tmp_path / "prefect"), "PYTHONPATH": str(ROOT)}
        script = f'. "{services.directory}/environment"; exec "$0" -c "$1"'
        return subprocess.run(
            ["/bin/sh", "-c", script, sys.executable, CLIENT],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    return call


def test_clients_record_with_the_passwords_of_the_environment_file_and_nobody_without(services, client):
    ended = client()
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-2:] == ["kept mlflow-artifacts", "200 0"]
    assert (services.directory / "environment").stat().st_mode & 0o077 == 0
    import httpx

    for url in (
        f"{services.prefect_url}/work_pools/filter",
        f"{services.mlflow_url}/api/2.0/mlflow/experiments/search",
    ):
        assert httpx.post(url, json={}, trust_env=False, timeout=60).status_code == 401


def test_a_program_that_is_killed_is_started_again_with_what_it_held(services, client):
    for state in start.states(services):
        assert state.state == "RUNNING"
        pid = int(state.description.split()[1].rstrip(","))
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: all(one.state == "RUNNING" for one in start.states(services)), "all programs")
    start.up(services, print)  # waits until they answer
    ended = client()
    assert ended.returncode == 0, ended.stderr


def test_the_programs_of_a_supervisord_that_was_killed_are_ended_and_started_again(services, client):
    for again in (lambda: start.up(services, print), lambda: start.down(services)):
        supervisord = psutil.Process(int((services.directory / "supervisord.pid").read_text()))
        family = supervisord.children(recursive=True)
        supervisord.kill()
        supervisord.wait()
        again()
        assert [one for one in family if is_alive(one)] == []
    assert start.down(services) is False
    start.up(services, print)
    ended = client()
    assert ended.returncode == 0, ended.stderr


def test_a_port_of_another_program_is_named(_installed, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        services = open_services(tmp_path, Ports(s3=port))
        with pytest.raises(PortInUseError, match=f"port {port} on 127.0.0.1, for s3"):
            start.up(services, print)
    assert start.states(services) == []
