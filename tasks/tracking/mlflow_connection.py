"""The connection to MLflow: its URI, its client, its experiment, and whether it can be used at all."""

from __future__ import annotations

import json
import logging
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from base.errors import CherryError, ConfigError, MissingFileError, ServiceError, without_credentials
from tasks.records.figures import COLUMNS, GROUPS
from tasks.run_config import TrackingConfig, tracking_uri_rule
from tasks.tracking.mlflow_database import ARTIFACTS, alone, check_database, database_file, follow_moved_folder
from tasks.tracking.outages import explained

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)
VIEW = "cherry"
"""Name of the view of the runs page that shows the columns that decide: `viewStateShareKey` in the page's address."""
_URI_VARIABLE = "MLFLOW_TRACKING_URI"
_REGISTRY = "MLFLOW_REGISTRY_URI"
_PROBE_TIMEOUT_S = 5.0
# What MLflow's page writes when a person shares a view of it: an experiment's tag, by the key in the address.
_VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
# Loggers that would tear the progress display; what they say comes back as an error too.
_NOISY = (
    "alembic",
    "mlflow.store.db.utils",
    "mlflow.tracking.context.registry",  # a user without a name: MLflow asks for it, although runs are given theirs
    "mlflow.tracking.request_header",
    "urllib3.connectionpool",
)


def tracking_uri(config: TrackingConfig, runs_directory: str) -> str:
    """The configured URI, else MLFLOW_TRACKING_URI, else SQLite inside the runs directory."""
    if config.uri is not None:
        return config.uri
    return os.environ.get(_URI_VARIABLE) or f"sqlite:///{Path(runs_directory).absolute()}/mlflow.db"


def check_servers(uri: str) -> None:
    """Check that the servers of runs and of the registry answer; databases are left for later. Without mlflow.

    Raises:
        ConfigError: the URI is none of MLflow's.
        ServiceError: no server answers there.
    """
    rule = tracking_uri_rule(uri)
    if rule is not None:
        raise ConfigError(f"{_URI_VARIABLE}: {rule} (got {without_credentials(uri)!r})")
    for server, variable in ((uri, "tracking.uri or MLFLOW_TRACKING_URI"), (_registry_uri(), _REGISTRY)):
        if server is not None and server.startswith("http"):
            _probe(server, variable)


def _registry_uri() -> str | None:
    return os.environ.get(_REGISTRY) or None


class MlflowConnection:
    """One client and experiment, made on the first call, because importing mlflow takes a second."""

    def __init__(self, config: TrackingConfig, runs_directory: str) -> None:
        self.uri = tracking_uri(config, runs_directory)
        self._experiment = config.experiment
        self._runs_directory = Path(runs_directory).absolute()
        self._lock = threading.Lock()
        self.connected: tuple[MlflowClient, str] | None = None

    def check(self) -> None:
        """Check that runs can be recorded and versions registered; within seconds, and before anything is computed.

        Raises:
            ConfigError: the URI is none of MLflow's.
            MissingFileError: the experiment is deleted.
            StorageError: the database cannot be written.
            ServiceError: no server answers, or what answers is not MLflow.
            AuthenticationError: the server refuses the credentials.
            OperationalError: any other failure of the tracker or the registry.
        """
        check_servers(self.uri)
        file = database_file(self.uri)
        if file is not None:
            check_database(file)
        try:
            client, _ = self.get()
            client.search_registered_models(max_results=1)
        except CherryError:
            raise
        except Exception as error:  # MLflow's own, requests', SQLAlchemy's and the OS's errors
            what = f"runs cannot be recorded at {without_credentials(self.uri)}"
            raise explained(error, what) from error

    @property
    def is_server(self) -> bool:
        """Whether a server answers at the URI, rather than a database behind it."""
        return self.uri.startswith("http")

    def connect_early(self) -> None:
        """Connect in a thread. The process waits for it before it ends, so that no database is half created."""

        def begin() -> None:
            with suppress(Exception):  # met again, and handled, by the first call
                self.get()

        threading.Thread(target=begin, name="mlflow").start()

    def get(self) -> tuple[MlflowClient, str]:
        """The client and the experiment's id."""
        with self._lock:
            if self.connected is None:
                os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
                # Lines that would tear the progress display; the summary ends with the page's address.
                os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
                # MLflow's defaults retry a dead server for minutes.
                os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
                os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
                import mlflow

                logging.getLogger("mlflow").setLevel(logging.WARNING)  # importing it has set its own level
                for name in _NOISY:
                    logging.getLogger(name).setLevel(logging.CRITICAL)
                self.use_for_process()
                file = database_file(self.uri)
                if file is None:
                    client = mlflow.MlflowClient(self.uri)
                    self.connected = client, self._experiment_id(client)
                    return self.connected
                check_database(file)
                # Two first runs at once: one makes the tables and the experiment, the other finds them.
                with alone(file):
                    moved = follow_moved_folder(file)
                    if moved is not None:
                        logger.info("artifacts of %s were recorded at %s: now beside it", file, moved)
                    client = mlflow.MlflowClient(self.uri)
                    self.connected = client, self._experiment_id(client)
            return self.connected

    @property
    def registry_file(self) -> Path | None:
        """The database file that holds the model registry; `None` for a server or another database."""
        return database_file(_registry_uri() or self.uri)

    def use_for_process(self) -> None:
        """Set the URI of the process, which some of MLflow's functions take.

        MLflow also writes the environment then, which belongs to the user: it is put back.
        """
        import mlflow

        given = os.environ.get(_URI_VARIABLE)
        mlflow.set_tracking_uri(self.uri)
        os.environ.pop(_URI_VARIABLE, None)
        if given is not None:
            os.environ[_URI_VARIABLE] = given

    def _experiment_id(self, client: MlflowClient) -> str:
        # The page then opens with training's columns and charts, not with those for agents.
        tags = {"mlflow.experimentKind": "custom_model_development", _VIEW_TAG: _view()}
        found = client.get_experiment_by_name(self._experiment)
        if found is None:
            # With a bare database, artifacts would land in the working directory.
            file = database_file(self.uri)
            beside = None if file is None else (file.parent / ARTIFACTS).as_uri()
            try:
                return str(client.create_experiment(self._experiment, artifact_location=beside, tags=tags))
            except Exception:  # MLflow's: another process may have made it on the same server meanwhile
                found = client.get_experiment_by_name(self._experiment)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise MissingFileError(
                f"MLflow's experiment {self._experiment!r} at {without_credentials(self.uri)} is deleted. Restore it "
                f"with `MLFLOW_TRACKING_URI={without_credentials(self.uri)} mlflow experiments restore "
                f"--experiment-id {found.experiment_id}`, or name another one with tracking.experiment=NAME."
            )
        if found.tags.get(_VIEW_TAG) != tags[_VIEW_TAG]:
            client.set_experiment_tag(found.experiment_id, _VIEW_TAG, tags[_VIEW_TAG])
        return str(found.experiment_id)


def _view() -> str:
    """State of the runs page: its columns, and the order of its groups of charts, which it else sorts by name.

    It is what the page itself writes (MLflow 3.17); one of another version that does not know a key passes over it.
    """
    groups = [{"uuid": f"autogen-{name}", "name": name, "display": True, "isReordered": False} for name in GROUPS]
    charts = {"compareRunSections": groups, "compareRunCharts": [], "isAccordionReordered": True, "isDirty": True}
    return json.dumps({"selectedColumns": list(COLUMNS), **charts})


def _probe(uri: str, variable: str) -> None:
    """Check that something answers at a server's address; MLflow's client would try for a long time.

    Raises:
        ServiceError: nothing does.
    """
    try:
        httpx.get(f"{uri.rstrip('/')}/health", timeout=_PROBE_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL, ImportError, ValueError) as error:  # ImportError: a SOCKS proxy
        raise ServiceError(
            f"no MLflow server answers at {without_credentials(uri)} ({error or type(error).__name__}). Start it, or "
            f"correct {variable}; without one, runs are recorded in a database in the runs directory."
        ) from error
