"""The connection to MLflow: its URI, its client, its experiment."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.run_config import TrackingConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient

_URI_VARIABLE = "MLFLOW_TRACKING_URI"


def tracking_uri(config: TrackingConfig, runs_directory: str) -> str:
    """The configured URI, else MLFLOW_TRACKING_URI, else SQLite inside the runs directory."""
    if config.uri is not None:
        return config.uri
    return os.environ.get(_URI_VARIABLE) or f"sqlite:///{Path(runs_directory).absolute()}/mlflow.db"


class MlflowConnection:
    """One client and experiment, made on the first call, because importing mlflow takes a second."""

    def __init__(self, config: TrackingConfig, runs_directory: str) -> None:
        self.uri = tracking_uri(config, runs_directory)
        self._experiment = config.experiment
        self._runs_directory = Path(runs_directory).absolute()
        self._lock = threading.Lock()
        self.connected: tuple[MlflowClient, str] | None = None

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
                if self.uri.startswith("sqlite:///"):
                    Path(self.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
                self.use_for_process()
                client = mlflow.MlflowClient(self.uri)
                self.connected = client, self._experiment_id(client)
            return self.connected

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
        found = client.get_experiment_by_name(self._experiment)
        if found is not None:
            return str(found.experiment_id)
        # With a bare database, artifacts would land in the working directory.
        local = (self._runs_directory / "mlartifacts").as_uri() if self.uri.startswith("sqlite:") else None
        # The page then opens with training's columns and charts, not with those for agents.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        return str(client.create_experiment(self._experiment, artifact_location=local, tags=kind))
