"""Directory of the services: their data, their ports, and the passwords that are made once."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path

from base.errors import ConfigError, MissingFileError, storage_errors

HOST = "127.0.0.1"
SETTINGS_FILE, ENVIRONMENT_FILE, SOCKET_FILE = "settings.json", "environment", "supervisor.sock"
BUCKET = "mlflow"
ADMIN = "admin"
GRPC_PORT = 10_000
"""What SeaweedFS adds to a port for that of its gRPC."""
DATABASES = ("prefect", "mlflow", "mlflow_auth")
# Linux takes at most 108 bytes for the path of a socket, of which supervisord adds a pid for a moment.
_MAX_SOCKET_PATH = 96
_MAX_PORT = 65_535


@dataclass(frozen=True)
class Ports:
    """TCP ports on the loopback interface."""

    prefect: int = 4200
    mlflow: int = 5000
    postgres: int = 5433
    s3: int = 8333
    s3_master: int = 9333
    s3_volume: int = 9340
    s3_filer: int = 9350

    def taken(self) -> list[tuple[str, int]]:
        """Name and number of all ports that the services listen on: SeaweedFS has one more beside each of its own."""
        named = list(vars(self).items())
        return named + [(f"{name}'s gRPC", port + GRPC_PORT) for name, port in named if name.startswith("s3")]


@dataclass(frozen=True)
class Passwords:
    """Passwords of the services; no repr shows them."""

    postgres: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    prefect: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    mlflow: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    mlflow_sessions: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    s3_key: str = field(default_factory=lambda: secrets.token_hex(10), repr=False)
    s3_secret: str = field(default_factory=lambda: secrets.token_urlsafe(30), repr=False)


@dataclass(frozen=True)
class Services:
    """The services of one directory."""

    directory: Path
    ports: Ports
    passwords: Passwords = field(repr=False)

    @property
    def prefect_url(self) -> str:
        """Address of Prefect's API."""
        return f"http://{HOST}:{self.ports.prefect}/api"

    @property
    def mlflow_url(self) -> str:
        """Address of MLflow."""
        return f"http://{HOST}:{self.ports.mlflow}"

    @property
    def s3_url(self) -> str:
        """Endpoint of the S3 store."""
        return f"http://{HOST}:{self.ports.s3}"

    @property
    def s3_environment(self) -> dict[str, str]:
        """Variables with which a client finds the S3 store."""
        return {
            "AWS_ACCESS_KEY_ID": self.passwords.s3_key,
            "AWS_SECRET_ACCESS_KEY": self.passwords.s3_secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_S3_ENDPOINT_URL": self.s3_url,
        }

    @property
    def client_environment(self) -> dict[str, str]:
        """Variables with which Cherry, Prefect and MLflow find both servers."""
        return {
            "PREFECT_API_URL": self.prefect_url,
            "PREFECT_API_AUTH_STRING": f"{ADMIN}:{self.passwords.prefect}",
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "MLFLOW_TRACKING_USERNAME": ADMIN,
            "MLFLOW_TRACKING_PASSWORD": self.passwords.mlflow,
        }

    def database_url(self, database: str, driver: str) -> str:
        """SQLAlchemy URL of one of `DATABASES`."""
        return f"postgresql+{driver}://{ADMIN}:{self.passwords.postgres}@{HOST}:{self.ports.postgres}/{database}"

    def write_private(self, name: str, text: str) -> Path:
        """Path of a file in the directory that only its owner may read, after writing it."""
        path = self.directory / name
        partial = path.with_name(f"{path.name}.partial")
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        partial.replace(path)
        return path


def open_services(directory: Path, ports: Ports | None = None) -> Services:
    """The services of a directory, whose passwords are made when it is first opened.

    Args:
        ports: of a directory that is new; `None` takes those of before, or the defaults.

    Raises:
        ConfigError: the settings cannot be read, other ports were chosen before, or the path is too long for a socket.
    """
    directory = directory.absolute()
    if len(os.fsencode(directory / SOCKET_FILE)) > _MAX_SOCKET_PATH:
        raise ConfigError(
            f"{directory}: a path of at most {_MAX_SOCKET_PATH - len(SOCKET_FILE) - 1} bytes is needed, for the socket "
            f"in it (got {len(os.fsencode(directory))}). Give a shorter one with --directory."
        )
    if not (directory / SETTINGS_FILE).exists():
        services = Services(directory, ports or Ports(), Passwords())
        directory.mkdir(parents=True, exist_ok=True)
        settings = {"ports": asdict(services.ports), "passwords": asdict(services.passwords)}
        services.write_private(SETTINGS_FILE, json.dumps(settings, indent=2))
        return services
    services = open_existing(directory)
    if (most := max(port for _, port in services.ports.taken())) > _MAX_PORT:
        raise ConfigError(
            f"{directory / SETTINGS_FILE}: ports of s3 are at most {_MAX_PORT - GRPC_PORT}, since each has another "
            f"{GRPC_PORT} above it, and the others at most {_MAX_PORT} (got {most}). Change them there."
        )
    if ports is not None and ports != services.ports:
        raise ConfigError(
            f"{directory / SETTINGS_FILE}: these services have other ports ({services.ports}). Change them there, or "
            "leave them out."
        )
    return services


def open_existing(directory: Path) -> Services:
    """The services of a directory that holds some.

    Raises:
        MissingFileError: it holds none.
        ConfigError: its settings cannot be read.
    """
    directory = directory.absolute()
    file = directory / SETTINGS_FILE
    with storage_errors(str(file)):
        if not os.path.lexists(file):
            raise MissingFileError(f"no services in {directory}. Make them: cherry services up --directory {directory}")
        text = file.read_bytes()
    try:
        settings = json.loads(text)
        return Services(directory, Ports(**settings["ports"]), Passwords(**settings["passwords"]))
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{file}: cannot be read ({error}). Restore it: it holds the passwords of the databases beside it."
        ) from error
