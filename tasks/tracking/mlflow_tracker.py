"""Owns what is said to MLflow: runs found again by tag, figures, plots, datasets and models by reference.

It knows nothing of what the figures mean. A tracking outage never hurts a run: what could not be sent is a warning
in the log, and is still on disk.
"""

from __future__ import annotations

import functools
import getpass
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from base.errors import CherryError, OperationalError, without_credentials
from tasks.run_config import TrackingConfig
from tasks.tracking.protocol import ModelVersion

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

# MLflow refuses larger batches (its REST API's limits).
_BATCH_METRICS = 1000
_BATCH_PARAMS = 100
_PARAM_CHARACTERS = 6000
_MODEL_URI = "models:/"
_URI_VARIABLE = "MLFLOW_TRACKING_URI"


def tracking_uri(config: TrackingConfig, runs_directory: str) -> str:
    """The configured URI, else MLFLOW_TRACKING_URI, else SQLite inside the runs directory."""
    if config.uri is not None:
        return config.uri
    return os.environ.get(_URI_VARIABLE) or f"sqlite:///{Path(runs_directory).absolute()}/mlflow.db"


def page_of(uri: str) -> str:
    """Where a person sees the runs: the server's address, or the command that starts one."""
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri} --port 5000"


def _point_mlflow_at(uri: str) -> None:
    """Some of MLflow's functions take the process's URI. It also writes the environment, which is a person's to set."""
    import mlflow

    given = os.environ.get(_URI_VARIABLE)
    mlflow.set_tracking_uri(uri)
    os.environ.pop(_URI_VARIABLE, None)
    if given is not None:
        os.environ[_URI_VARIABLE] = given


@functools.lru_cache(maxsize=8)
def connect(config: TrackingConfig, runs_directory: str) -> MlflowTracker:
    """One tracker a configuration and process."""
    return MlflowTracker(config, runs_directory)


def _forgiving(method: Callable[P, T]) -> Callable[P, T | None]:
    """Turn an outage into a warning and `None`."""

    @functools.wraps(method)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            return method(*args, **kwargs)
        except Exception as error:  # MLflow raises its own, requests', SQLAlchemy's and the OS's errors
            logger.warning(
                "tracking: %s failed: %s", method.__name__, str(error).splitlines()[0] if str(error) else error
            )
            return None

    return guarded


def _registry(method: Callable[P, T]) -> Callable[P, T]:
    """Turn an outage of the model registry into the world's fault, which a task retries."""

    @functools.wraps(method)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except CherryError:
            raise
        except Exception as error:  # as above
            raise OperationalError(f"the model registry could not {method.__name__}: {error}") from error

    return guarded


class MlflowTracker:
    """`Tracker` over an MLflow server or database, and its model registry."""

    def __init__(self, config: TrackingConfig, runs_directory: str) -> None:
        self.uri = tracking_uri(config, runs_directory)
        self.experiment = config.experiment
        self._runs_directory = Path(runs_directory).absolute()
        self._lock = threading.Lock()
        self._connected: tuple[MlflowClient, str] | None = None

    def connect_early(self) -> None:
        """Begin the first call's work beside the caller's own; what goes wrong is told when it is needed.

        A process waits for it before it ends: a database is made whole or not at all.
        """

        def begin() -> None:
            with suppress(Exception):
                self._client()

        threading.Thread(target=begin, name="mlflow").start()

    def _client(self) -> tuple[MlflowClient, str]:
        """The client and the experiment's id; made on the first call, because importing mlflow takes a second."""
        with self._lock:
            if self._connected is None:
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
                _point_mlflow_at(self.uri)
                client = mlflow.MlflowClient(self.uri)
                self._connected = client, self._experiment_id(client)
            return self._connected

    def _experiment_id(self, client: MlflowClient) -> str:
        found = client.get_experiment_by_name(self.experiment)
        if found is not None:
            return str(found.experiment_id)
        # With a bare database, artifacts would land in the working directory.
        local = (self._runs_directory / "mlartifacts").as_uri() if self.uri.startswith("sqlite:") else None
        # The page then opens with training's columns and charts, not with those for agents.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        return str(client.create_experiment(self.experiment, artifact_location=local, tags=kind))

    @_forgiving
    def start(self, name: str, *, parent: str | None, step: str, identity: str, run_key: str) -> str | None:
        """See `Tracker`."""
        client, experiment = self._client()
        tags = {
            "cherry.step": step,
            "cherry.fingerprint": identity,
            "cherry.run": name,
            # Another run directory may have the same name on the same server.
            "cherry.run_key": run_key,
        }
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = client.search_runs([experiment], query, max_results=1)
        if found:
            run_id = str(found[0].info.run_id)
            client.update_run(run_id, status="RUNNING")
            return run_id
        tags |= {"mlflow.user": getpass.getuser(), "mlflow.source.name": f"cherry {step}"}
        if parent is not None:
            tags["mlflow.parentRunId"] = parent
        return str(client.create_run(experiment, run_name=name, tags=tags).info.run_id)

    @_forgiving
    def log(
        self,
        run_id: str | None,
        *,
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """See `Tracker`."""
        if run_id is None:
            return
        from mlflow.entities import Metric, Param, RunTag

        client, _ = self._client()
        known = client.get_run(run_id).data.params if params else {}
        fresh = [Param(k, str(v)[:_PARAM_CHARACTERS]) for k, v in (params or {}).items() if k not in known]
        for start in range(0, len(fresh), _BATCH_PARAMS):
            client.log_batch(run_id, params=fresh[start : start + _BATCH_PARAMS])
        now = int(time.time() * 1000)
        values = [Metric(key, float(value), now, 0) for key, value in (metrics or {}).items()]
        labels = [RunTag(key, str(value)) for key, value in (tags or {}).items()]
        if values or labels:
            client.log_batch(run_id, metrics=values, tags=labels)

    def points(self, run_id: str | None, points: Iterable[tuple[str, float, int, int]]) -> bool:
        """See `Tracker`."""
        return run_id is not None and bool(self._points(run_id, list(points)))

    @_forgiving
    def _points(self, run_id: str, points: list[tuple[str, float, int, int]]) -> bool:
        from mlflow.entities import Metric

        client, _ = self._client()
        metrics = [Metric(key, value, milliseconds, step) for key, value, step, milliseconds in points]
        for start in range(0, len(metrics), _BATCH_METRICS):
            client.log_batch(run_id, metrics=metrics[start : start + _BATCH_METRICS])
        return True

    @_forgiving
    def artifact(self, run_id: str | None, path: Path, folder: str = "") -> None:
        """See `Tracker`."""
        if run_id is not None:
            client, _ = self._client()
            client.log_artifact(run_id, str(path), folder or None)

    @_forgiving
    def finish(self, run_id: str | None, status: str) -> None:
        """See `Tracker`."""
        if run_id is not None:
            client, _ = self._client()
            client.set_terminated(run_id, status)

    @_forgiving
    def finish_family(self, run_id: str | None, status: str) -> None:
        """Close a run and its children as far as they are still open: their process is gone."""
        if run_id is None:
            return
        client, experiment = self._client()
        children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
        for run in [*children, client.get_run(run_id)]:
            if run.info.status == "RUNNING":
                client.set_terminated(run.info.run_id, status)

    def page(self, run_id: str) -> str:
        """A run as a link for a person, or its id where there is no server."""
        if not self.uri.startswith("http") or self._connected is None:
            return f"`{run_id}`"
        return (
            f"[{run_id}]({without_credentials(self.uri).rstrip('/')}/#/experiments/{self._connected[1]}/runs/{run_id})"
        )

    @_forgiving
    def dataset(
        self, run_id: str | None, *, name: str, digest: str, source: str, profile: str, use: str = "training"
    ) -> None:
        """Record a dataset as the run's input, by reference; `use` is what for."""
        if run_id is None:
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag

        client, _ = self._client()
        where = json.dumps({"uri": source})
        data = Dataset(name=name, digest=digest[:36], source_type="uri", source=where, profile=profile)
        client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", use)])])

    @_forgiving
    def models(self, run_id: str | None, *, inputs: Sequence[str] = (), outputs: Sequence[str] = ()) -> None:
        """Record logged models, by MLflow's ids, as what a run took and what it made; told again, nothing changes."""
        if run_id is None:
            return
        from mlflow.entities import LoggedModelInput, LoggedModelOutput

        client, _ = self._client()
        run = client.get_run(run_id)
        taken = {one.model_id for one in (run.inputs.model_inputs if run.inputs else None) or ()}
        made = {one.model_id for one in (run.outputs.model_outputs if run.outputs else None) or ()}
        if fresh := [LoggedModelInput(one) for one in inputs if one not in taken]:
            client.log_inputs(run_id, models=fresh)
        if new := [LoggedModelOutput(one, step=0) for one in outputs if one not in made]:
            client.log_outputs(run_id, new)

    @_forgiving
    def system_metrics(self, run_id: str | None) -> Callable[[], None] | None:
        """Record CPU, memory, disk and GPU use of this node until the returned function is called."""
        if run_id is None:
            return None
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._client()
        _point_mlflow_at(self.uri)
        monitor = SystemMetricsMonitor(  # type: ignore[no-untyped-call]
            run_id, sampling_interval=5, samples_before_logging=1, resume_logging=True
        )
        monitor.start()  # type: ignore[no-untyped-call]
        return monitor.finish

    @_registry
    def register(
        self, run_id: str | None, name: str, uri: str, *, identity: str, alias: str, tags: Mapping[str, str]
    ) -> ModelVersion:
        """Register weights by reference and point `alias` at the version, remembering which one it pointed at.

        The version of the same weights (the same `identity`) is found again, so that a retry makes no second one.

        Raises:
            OperationalError: the registry could not be reached; nothing else records a version.
        """
        number = self._find_version(name, identity) or self._create_version(run_id, name, uri, identity)
        self.tag_version(ModelVersion(name, number, uri, {}), tags)
        self.set_alias(name, alias, number)
        found = self.version(name, number=number)
        assert found is not None
        return found

    def _find_version(self, name: str, identity: str) -> int | None:
        client, _ = self._client()
        found = client.search_model_versions(f"name = '{name}' and tags.`cherry.identity` = '{identity}'")
        return max((int(version.version) for version in found), default=None)

    def _create_version(self, run_id: str | None, name: str, uri: str, identity: str) -> int:
        import mlflow
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

        client, experiment = self._client()
        _point_mlflow_at(self.uri)
        model = mlflow.create_external_model(
            name=name, source_run_id=run_id, tags={"uri": uri}, model_type="LLM", experiment_id=experiment
        )
        # What mlflow.register_model does, without its lines on the terminal.
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        source = _MODEL_URI + model.model_id
        tags = {"uri": uri, "cherry.identity": identity}
        made = client.create_model_version(name, source, tags=tags, model_id=model.model_id)
        shown = json.dumps([{"name": name, "version": made.version}])
        client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": shown})
        return int(made.version)

    @_registry
    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Point an alias at a version. MLflow keeps no history, so the one before is written down first."""
        client, _ = self._client()
        before = self.version(name, alias=alias)
        if before is not None and before.version != version:
            client.set_model_version_tag(name, str(version), f"previous_{alias}", str(before.version))
        client.set_registered_model_alias(name, alias, str(version))

    @_registry
    def version(self, name: str, *, alias: str | None = None, number: int | None = None) -> ModelVersion | None:
        """A registered version by alias or number, or `None` when there is none.

        Raises:
            OperationalError: the registry could not be reached.
        """
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, ErrorCode

        absent = {ErrorCode.Name(RESOURCE_DOES_NOT_EXIST), ErrorCode.Name(INVALID_PARAMETER_VALUE)}
        try:
            client, _ = self._client()
            if number is not None:
                found = client.get_model_version(name, str(number))
            else:
                found = client.get_model_version_by_alias(name, alias or "")
        except MlflowException as error:
            if error.error_code in absent:
                return None
            raise
        tags = dict(found.tags)
        source = str(found.source)
        model_id = source.removeprefix(_MODEL_URI) if source.startswith(_MODEL_URI) else None
        return ModelVersion(name, int(found.version), tags.get("uri", source), tags, model_id)

    @_registry
    def tag_version(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        """Add tags to a version."""
        client, _ = self._client()
        for key, value in tags.items():
            client.set_model_version_tag(version.name, str(version.version), key, value)
