"""Start, state and end of the services, through supervisord's own interface on a socket in their directory."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault, ServerProxy

import httpx
import psutil

from base.errors import MissingFileError, OperationalError, PortInUseError
from flows.services.layout import ADMIN, BUCKET, DATABASES, ENVIRONMENT_FILE, HOST, SOCKET_FILE, Services
from flows.services.programs import CONFIG_FILE, DIRECTORY_VARIABLE, database_user, postgres_program, write_config

# A first start of MLflow on a busy machine took 65 s, of Prefect 20 s (migrations).
START_LIMIT_S = 300.0
_POLL_S = 0.2
_ORPHANS_S = 10.0


@dataclass(frozen=True)
class State:
    """One program as supervisord sees it."""

    name: str
    state: str
    description: str


def up(services: Services, say: Callable[[str], None]) -> Path:
    """Path of the clients' environment file, after starting what does not run yet, and waiting until it answers.

    Raises:
        MissingFileError: a program is not installed.
        PortInUseError: another program has one of the ports.
        OperationalError: a program does not start.
    """
    folder = services.directory
    (folder / "logs").mkdir(exist_ok=True)
    write_config(services)
    if not is_up(services):
        _end_orphans(services)
        _check_ports(services)
        _init_database(services)
        _start_supervisord(services)
    with _supervisor(services) as supervisor:
        _start(services, supervisor, "postgres", lambda: _listens(services.ports.postgres), say)
        _make_databases(services)
        _start(services, supervisor, "s3", lambda: _listens(services.ports.s3), say)
        _make_bucket(services)
        _start(services, supervisor, "prefect", lambda: _answers(f"{services.prefect_url}/health"), say)
        _start(services, supervisor, "mlflow", lambda: _answers(f"{services.mlflow_url}/health"), say)
    lines = [f"export {name}={value!r}" for name, value in services.client_environment.items()]
    return services.write_private(ENVIRONMENT_FILE, "\n".join(lines) + "\n")


def down(services: Services) -> bool:
    """Whether anything ran; afterwards nothing does. Data and passwords stay."""
    if not is_up(services):
        return _end_orphans(services)
    with _supervisor(services) as supervisor:
        pid = supervisor.supervisor.getPID()
        supervisor.supervisor.shutdown()
    _wait(lambda: not _is_running(pid), f"the end of supervisord (pid {pid})", services)
    return True


def states(services: Services) -> list[State]:
    """State of each program; empty when supervisord does not run."""
    if not is_up(services):
        return []
    with _supervisor(services) as supervisor:
        found = supervisor.supervisor.getAllProcessInfo()
    return [State(one["name"], one["statename"], one["description"]) for one in found]


def is_up(services: Services) -> bool:
    """Whether the supervisord of this directory answers."""
    try:
        with _supervisor(services) as supervisor:
            return bool(supervisor.supervisor.getState()["statecode"] == 1)
    except (OSError, Fault):
        return False


@contextmanager
def _supervisor(services: Services) -> Iterator[Any]:
    from supervisor.xmlrpc import SupervisorTransport

    transport = SupervisorTransport(None, None, f"unix://{services.directory / SOCKET_FILE}")
    with ServerProxy(f"http://{HOST}", transport=transport) as proxy:
        yield proxy


def _end_orphans(services: Services) -> bool:
    """Whether a supervisord that was killed had left any of its programs; they are ended."""
    left = [one for one in psutil.process_iter() if _directory_of(one) == str(services.directory)]
    for one in left:
        with suppress(psutil.NoSuchProcess):
            one.terminate()  # PostgreSQL waits for its clients, which end too
    for one in psutil.wait_procs(left, timeout=_ORPHANS_S)[1]:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(left, timeout=_ORPHANS_S)
    return bool(left)


def _directory_of(process: psutil.Process) -> str | None:
    """Directory of the services that a process belongs to."""
    try:
        return process.environ().get(DIRECTORY_VARIABLE)
    except psutil.Error:  # of another user, or it has just ended
        return None


def _check_ports(services: Services) -> None:
    for name, port in services.ports.taken():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                raise PortInUseError(
                    f"port {port} on {HOST}, for {name}, is in use by another program. End that, or choose another "
                    f"port in {services.directory}/settings.json."
                ) from error


def _init_database(services: Services) -> None:
    """Make PostgreSQL's data directory, unless it is there. A half-made one is made again."""
    data, made = services.directory / "postgres", services.directory / "postgres.made"
    if made.exists():
        return
    initdb, user = postgres_program("initdb"), database_user()
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(mode=0o700)
    password = services.write_private("postgres.password", services.passwords.postgres)
    try:
        if user is not None:
            for path in (data, password):
                shutil.chown(path, user)
            _let_through(services.directory, user)
        command = [initdb, "-D", str(data), "-U", ADMIN, "-A", "scram-sha-256", f"--pwfile={password}"]
        command += ["-E", "UTF8", "--locale=C.UTF-8"]
        ended = subprocess.run(command, capture_output=True, text=True, user=user, cwd="/", check=False)
    finally:
        password.unlink()
    if ended.returncode:
        raise OperationalError(f"initdb ended with code {ended.returncode}:\n{ended.stdout}{ended.stderr}")
    made.touch()


def _let_through(directory: Path, user: str) -> None:
    """Check that a user reaches a directory that root has made.

    Raises:
        OperationalError: a folder above it is closed to that user.
    """
    entering = ["/bin/ls", "-d", str(directory / ".")]
    ended = subprocess.run(entering, capture_output=True, user=user, cwd="/", check=False)
    if ended.returncode:
        raise OperationalError(
            f"the user {user!r}, whom PostgreSQL runs as, may not enter {directory}. Give a directory that everybody "
            "may pass through, with --directory /var/lib/cherry-services."
        )


def _start_supervisord(services: Services) -> None:
    command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(services.directory / CONFIG_FILE)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=services.directory, check=False)
    if ended.returncode:
        if "No module named" in ended.stderr:
            raise MissingFileError(
                "supervisor is not installed. Install the services' packages: pip install 'cherry-framework[services]'."
            )
        raise OperationalError(f"supervisord ended with code {ended.returncode}: {ended.stdout}{ended.stderr}")
    _wait(lambda: is_up(services), "supervisord", services)


def _start(
    services: Services, supervisor: Any, name: str, answers: Callable[[], bool], say: Callable[[str], None]
) -> None:
    started = time.monotonic()
    if supervisor.supervisor.getProcessInfo(name)["statename"] not in ("RUNNING", "STARTING", "BACKOFF"):
        supervisor.supervisor.startProcess(name, False)

    def is_there() -> bool:
        state = supervisor.supervisor.getProcessInfo(name)["statename"]
        if state == "FATAL":
            raise OperationalError(f"{name} does not start.\n{_last_lines(services, name)}")
        return answers()

    _wait(is_there, name, services)
    say(f"{name}: answers after {time.monotonic() - started:.0f} s")


def _wait(condition: Callable[[], bool], what: str, services: Services) -> None:
    end = time.monotonic() + START_LIMIT_S
    while not condition():
        if time.monotonic() > end:
            raise OperationalError(f"gave up waiting for {what}; its log is in {services.directory / 'logs'}")
        time.sleep(_POLL_S)


def _last_lines(services: Services, name: str) -> str:
    path = services.directory / "logs" / f"{name}.log"
    lines = path.read_text(errors="replace").splitlines()[-20:] if path.exists() else []
    return "\n".join([f"The end of {path}:", *lines])


def _listens(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=5).close()
    except OSError:
        return False
    return True


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _make_databases(services: Services) -> None:
    import psycopg2
    from psycopg2 import sql

    def connect() -> Any:
        return psycopg2.connect(
            host=HOST, port=services.ports.postgres, user=ADMIN, password=services.passwords.postgres, dbname="postgres"
        )

    def is_ready() -> bool:
        try:
            connect().close()
        except psycopg2.OperationalError as error:
            if "password authentication failed" in str(error):
                raise OperationalError(
                    f"PostgreSQL refuses the password of {services.directory}/settings.json: the file and the database "
                    "beside it do not belong together. Restore the one that was replaced."
                ) from error
            return False
        return True

    _wait(is_ready, "postgres", services)
    connection = connect()
    try:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute("SELECT datname FROM pg_database")
        there = {name for (name,) in cursor.fetchall()}
        for database in DATABASES:
            if database not in there:
                cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))
    finally:
        connection.close()


def _make_bucket(services: Services) -> None:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    keys = {"aws_access_key_id": services.passwords.s3_key, "aws_secret_access_key": services.passwords.s3_secret}
    config = Config(proxies={}, retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=30)
    client = boto3.client("s3", endpoint_url=services.s3_url, region_name="us-east-1", config=config, **keys)

    def is_made() -> bool:
        try:
            client.create_bucket(Bucket=BUCKET)
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code")
            return code in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists")
        except BotoCoreError:
            return False
        return True

    _wait(is_made, "the bucket of the S3 store", services)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
