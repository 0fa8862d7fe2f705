"""Programs of the services: their command lines and environments, and supervisord's configuration of them.

What PostgreSQL, Prefect and MLflow need beyond their defaults was measured; docs/decisions.md has it.
"""

from __future__ import annotations

import json
import os
import pwd
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from base.errors import MissingFileError
from flows.services.layout import ADMIN, BUCKET, HOST, SOCKET_FILE, Services

CONFIG_FILE = "supervisord.conf"
DIRECTORY_VARIABLE = "CHERRY_SERVICES"
"""Variable that every process of the services has: their directory."""
_AUTH_FILE, _S3_FILE = "mlflow_auth.ini", "s3.json"
# Of a password check's cache in MLflow: without it, each request costs a second of hashing (docs/decisions.md).
_AUTH_CACHE_S = 300
_POSTGRES_USER = "postgres"


@dataclass(frozen=True)
class Program:
    """One program that supervisord starts, and starts again when it ends."""

    name: str
    command: list[str] = field(repr=False)
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    user: str | None = None
    stop_signal: str = "TERM"


def programs(services: Services) -> list[Program]:
    """All programs, in the order of their start.

    Raises:
        MissingFileError: one of them is not installed.
    """
    return [_postgres(services), _s3(services), _prefect(services), _mlflow(services)]


def postgres_program(name: str) -> str:
    """Path of a program of PostgreSQL; Debian keeps the server's out of PATH.

    Raises:
        MissingFileError: it is not installed.
    """
    if found := shutil.which(name):
        return found
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda bin: int(bin.parent.name), reverse=True):
        if (folder / name).exists():
            return str(folder / name)
    raise MissingFileError(
        f"PostgreSQL's {name} is not installed. Install its server (Debian, Ubuntu: apt-get install postgresql; "
        "macOS: brew install postgresql), and start the same command again."
    )


def database_user() -> str | None:
    """Name of the user that PostgreSQL runs as; `None` is this process's own. It refuses to run as root.

    Raises:
        MissingFileError: this is root, and there is no such user.
    """
    if os.getuid() != 0:
        return None
    try:
        return pwd.getpwnam(_POSTGRES_USER).pw_name
    except KeyError as error:
        raise MissingFileError(
            f"PostgreSQL does not run as root, and there is no user {_POSTGRES_USER!r}. Its package makes one "
            "(Debian, Ubuntu: apt-get install postgresql); or start this as another user."
        ) from error


def write_config(services: Services) -> Path:
    """Path of supervisord's configuration, after writing it. It holds passwords, so only its owner may read it.

    Raises:
        MissingFileError: a program is not installed.
    """
    folder = services.directory
    lines = [
        "[unix_http_server]",
        f"file = {_escaped(str(folder / SOCKET_FILE))}",
        "chmod = 0700",
        "[supervisord]",
        f"logfile = {_escaped(str(folder / 'logs' / 'supervisord.log'))}",
        f"pidfile = {_escaped(str(folder / 'supervisord.pid'))}",
        f"childlogdir = {_escaped(str(folder / 'logs'))}",
        *(["user = root"] if os.getuid() == 0 else []),
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface",
        "[supervisorctl]",
        f"serverurl = unix://{_escaped(str(folder / SOCKET_FILE))}",
    ]
    for program in programs(services):
        log = folder / "logs" / f"{program.name}.log"
        lines += [
            f"[program:{program.name}]",
            f"command = {_escaped(shlex.join(program.command))}",
            f"directory = {_escaped(str(folder))}",
            f"stdout_logfile = {_escaped(str(log))}",
            "redirect_stderr = true",
            "autostart = false",  # `up` starts them one after the other
            "autorestart = true",
            "startretries = 10",
            "stopasgroup = true",
            "killasgroup = true",
            f"stopsignal = {program.stop_signal}",
            "stopwaitsecs = 30",
        ]
        if program.user is not None:
            lines.append(f"user = {program.user}")
        named = {**program.environment, DIRECTORY_VARIABLE: str(folder)}
        pairs = ",".join(f'{name}="{_escaped(value)}"' for name, value in named.items())
        lines.append(f"environment = {pairs}")
    return services.write_private(CONFIG_FILE, "\n".join(lines) + "\n")


def _escaped(text: str) -> str:
    """Text as supervisord reads it, which replaces %(names)s."""
    return text.replace("%", "%%")


def _script(name: str) -> str:
    """Path of a script of this environment.

    Raises:
        MissingFileError: its package is not installed.
    """
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if found is None:
        raise MissingFileError(
            f"{name} is not installed. Install the services' packages: pip install 'cherry-framework[services]' "
            "(in a checkout: pip install -e '.[services]')."
        )
    return found


def _postgres(services: Services) -> Program:
    command = [
        postgres_program("postgres"),
        "-D",
        str(services.directory / "postgres"),
        "-p",
        str(services.ports.postgres),
    ]
    command += ["-c", f"listen_addresses={HOST}", "-c", "unix_socket_directories="]
    return Program("postgres", command, user=database_user(), stop_signal="INT")  # INT: a fast shutdown


def _s3(services: Services) -> Program:
    keys = {"accessKey": services.passwords.s3_key, "secretKey": services.passwords.s3_secret}
    identity = {"name": ADMIN, "credentials": [keys], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    config = services.write_private(_S3_FILE, json.dumps({"identities": [identity]}))
    folder, ports = services.directory / "s3", services.ports
    folder.mkdir(exist_ok=True)
    command = [
        _script("weed"),
        "server",
        f"-dir={folder}",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        "-s3",
        f"-s3.config={config}",
    ]
    command += [f"-s3.port={ports.s3}", f"-master.port={ports.s3_master}", f"-volume.port={ports.s3_volume}"]
    command += [f"-filer.port={ports.s3_filer}", "-master.volumeSizeLimitMB=1024", "-volume.max=0"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # two more servers, which nobody asks
    return Program("s3", command)


def _prefect(services: Services) -> Program:
    command = [
        _script("prefect"),
        "--no-prompt",
        "server",
        "start",
        "--host",
        HOST,
        "--port",
        str(services.ports.prefect),
    ]
    environment = {
        "PREFECT_HOME": str(services.directory / "prefect"),
        "PREFECT_API_DATABASE_CONNECTION_URL": services.database_url("prefect", "asyncpg"),
        "PREFECT_SERVER_API_AUTH_STRING": f"{ADMIN}:{services.passwords.prefect}",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_UI_API_URL": services.prefect_url,
    }
    return Program("prefect", command, environment)


def _mlflow(services: Services) -> Program:
    auth = [
        "[mlflow]",
        "default_permission = READ",
        f"database_uri = {services.database_url('mlflow_auth', 'psycopg2')}",
        f"admin_username = {ADMIN}",
        f"admin_password = {services.passwords.mlflow}",
        f"auth_cache_ttl_seconds = {_AUTH_CACHE_S}",
    ]
    # The passwords are of a URL's own characters: an ini file's % has no place in them.
    auth_file = services.write_private(_AUTH_FILE, "\n".join(auth) + "\n")
    command = [
        _script("mlflow"),
        "server",
        "--app-name",
        "basic-auth",
        "--host",
        HOST,
        "--port",
        str(services.ports.mlflow),
    ]
    command += ["--artifacts-destination", f"s3://{BUCKET}", "--workers", "2"]
    command += ["--uvicorn-opts", "--timeout-worker-healthcheck 60"]
    environment = {
        "MLFLOW_BACKEND_STORE_URI": services.database_url("mlflow", "psycopg2"),
        "MLFLOW_AUTH_CONFIG_PATH": str(auth_file),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": services.passwords.mlflow_sessions,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "HOME": str(services.directory),
        **services.s3_environment,
    }
    return Program("mlflow", command, environment)
