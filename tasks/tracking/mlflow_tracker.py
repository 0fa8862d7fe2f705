"""Runs in MLflow: found again by tag, with figures, plots, datasets, models and the version of the code."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.errors import without_credentials
from tasks.code_version import CodeVersion
from tasks.records.environment import environment_tags, user_name
from tasks.run_config import TrackingConfig
from tasks.tracking.mlflow_connection import VIEW, MlflowConnection
from tasks.tracking.mlflow_registry import MlflowRegistry
from tasks.tracking.outages import Outages, best_effort
from tasks.tracking.protocol import Dataset, ModelVersion, Point, RunStatus

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

# MLflow refuses larger batches (its REST API's limits).
_BATCH_METRICS = 1000
_BATCH_PARAMS = 100
_PARAM_CHARACTERS = 6000
_TAG_CHARACTERS = 5000
_DIGEST_CHARACTERS = 36
_PORT = 5000
_PAGE = f"http://127.0.0.1:{_PORT}"


class MlflowTracker:
    """`Tracker` over an MLflow server or database."""

    def __init__(self, config: TrackingConfig, runs_directory: str, code: CodeVersion) -> None:
        self._connection = MlflowConnection(config, runs_directory)
        self.outages = Outages()
        self.runs = MlflowRuns(self._connection, code, self.outages)
        self.registry = MlflowRegistry(self._connection)

    @property
    def address(self) -> str:
        """See `Tracker`."""
        return without_credentials(self._connection.uri)

    def connect_early(self) -> None:
        """See `Tracker`."""
        self._connection.connect_early()

    def open(self, on_outage: Callable[[str], None]) -> None:
        """See `Tracker`."""
        self._connection.check()
        self.outages.report = on_outage

    def page(self, run_id: str | None = None) -> str:
        """See `Tracker`."""
        server, connected = self._connection.is_server, self._connection.connected
        runs = None if connected is None else f"/#/experiments/{connected[1]}/runs"
        if run_id is not None:
            return f"[{run_id}]({self.address.rstrip('/')}{runs}/{run_id})" if server and runs else f"`{run_id}`"
        # Only this address opens on the runs, with the columns that decide, whatever the page showed last.
        view = "" if runs is None else f"{runs}?viewStateShareKey={VIEW}"
        if server:
            return self.address.rstrip("/") + view + self.outages.remark()
        command = f"mlflow ui --backend-store-uri {self._connection.uri} --port {_PORT} --workers 1"
        return f"{command}  # {_PAGE}{view}{self.outages.remark()}"

    @best_effort
    def system_metrics(self, run_id: str | None) -> Callable[[], None] | None:
        """See `Tracker`."""
        if run_id is None:
            return None
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._connection.get()
        self._connection.use_for_process()
        monitor = SystemMetricsMonitor(  # type: ignore[no-untyped-call]
            run_id, sampling_interval=5, samples_before_logging=1, resume_logging=True
        )
        monitor.start()  # type: ignore[no-untyped-call]
        return monitor.finish


class MlflowRuns:
    """`RunTracker` over MLflow."""

    def __init__(self, connection: MlflowConnection, code: CodeVersion, outages: Outages) -> None:
        self._connection = connection
        self._code = code
        self.outages = outages

    @best_effort
    def start(
        self, name: str, *, parent: str | None, step: str, identity: str, run_key: str, reused: str | None = None
    ) -> str | None:
        """See `RunTracker`."""
        from mlflow.entities import RunTag

        client, experiment = self._connection.get()
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
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in self._origin_tags().items()])
            return run_id
        tags |= {"mlflow.user": user_name(), "mlflow.source.name": f"cherry {step}", **self._origin_tags()}
        if parent is not None:
            tags["mlflow.parentRunId"] = parent
        run_id = str(client.create_run(experiment, run_name=name, tags=tags).info.run_id)
        if reused is not None:
            self._take_over(run_id, reused)
        return run_id

    def _take_over(self, run_id: str, reused: str) -> None:
        """Copy what another run took, made and measured: last values, not series, which stay with the other."""
        from mlflow.entities import LoggedModelOutput, Metric, RunTag

        client, _ = self._connection.get()
        other = client.get_run(reused)
        now = int(time.time() * 1000)
        values = [Metric(key, value, now, 0) for key, value in other.data.metrics.items() if "system/" not in key]
        client.log_batch(run_id, metrics=values[:_BATCH_METRICS], tags=[RunTag("cherry.reused_from", reused)])
        self.log(run_id, params=other.data.params)
        models = list((other.inputs.model_inputs if other.inputs else None) or ())
        made = [
            LoggedModelOutput(one.model_id, step=0) for one in (other.outputs.model_outputs if other.outputs else ())
        ]
        if other.inputs and other.inputs.dataset_inputs:
            client.log_inputs(run_id, other.inputs.dataset_inputs)
        if models:
            client.log_inputs(run_id, models=models)
        if made:
            client.log_outputs(run_id, made)

    @best_effort
    def log(
        self,
        run_id: str | None,
        *,
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        note: str | None = None,
        inputs: Sequence[Dataset | ModelVersion] = (),
        outputs: Sequence[ModelVersion] = (),
    ) -> None:
        """See `RunTracker`."""
        if run_id is None:
            return
        from mlflow.entities import Metric, Param, RunTag

        client, _ = self._connection.get()
        known = client.get_run(run_id).data.params if params else {}
        fresh = [Param(k, str(v)[:_PARAM_CHARACTERS]) for k, v in (params or {}).items() if k not in known]
        for start in range(0, len(fresh), _BATCH_PARAMS):
            client.log_batch(run_id, params=fresh[start : start + _BATCH_PARAMS])
        now = int(time.time() * 1000)
        values = [Metric(key, float(value), now, 0) for key, value in (metrics or {}).items()]
        labels = [RunTag(key, str(value)[:_TAG_CHARACTERS]) for key, value in (tags or {}).items()]
        labels += [] if note is None else [RunTag("mlflow.note.content", note[:_TAG_CHARACTERS])]
        if values or labels:
            client.log_batch(run_id, metrics=values, tags=labels)
        self._link(run_id, inputs, outputs)

    def points(self, run_id: str | None, points: Iterable[Point]) -> bool:
        """See `RunTracker`."""
        return run_id is not None and bool(self._points(run_id, list(points)))

    @best_effort
    def _points(self, run_id: str, points: list[Point]) -> bool:
        from mlflow.entities import Metric

        client, _ = self._connection.get()
        metrics = [Metric(point.name, point.value, point.unix_ms, point.step) for point in points]
        for start in range(0, len(metrics), _BATCH_METRICS):
            client.log_batch(run_id, metrics=metrics[start : start + _BATCH_METRICS])
        return True

    @best_effort
    def artifact(self, run_id: str | None, path: Path, folder: str = "") -> None:
        """See `RunTracker`."""
        if run_id is not None:
            client, _ = self._connection.get()
            client.log_artifact(run_id, str(path), folder or None)

    @best_effort
    def finish(self, run_id: str | None, status: RunStatus, *, family: bool = False) -> None:
        """See `RunTracker`."""
        if run_id is None:
            return
        client, experiment = self._connection.get()
        if not family:
            client.set_terminated(run_id, status)
            return
        children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
        for run in [*children, client.get_run(run_id)]:
            if run.info.status == "RUNNING":
                client.set_terminated(run.info.run_id, status)

    def _link(self, run_id: str, inputs: Sequence[Dataset | ModelVersion], outputs: Sequence[ModelVersion]) -> None:
        """Record datasets and logged models as what a run took and made, each of them once."""
        from mlflow.entities import LoggedModelInput, LoggedModelOutput

        client, _ = self._connection.get()
        datasets = [_dataset_input(entry) for entry in inputs if isinstance(entry, Dataset)]
        if datasets:
            client.log_inputs(run_id, datasets)
        models = [entry.model_id for entry in inputs if isinstance(entry, ModelVersion) and entry.model_id is not None]
        made = [entry.model_id for entry in outputs if entry.model_id is not None]
        if not models and not made:
            return
        run = client.get_run(run_id)
        known = {model.model_id for model in (run.inputs.model_inputs if run.inputs else None) or ()}
        known_made = {model.model_id for model in (run.outputs.model_outputs if run.outputs else None) or ()}
        if new := [LoggedModelInput(model_id) for model_id in models if model_id not in known]:
            client.log_inputs(run_id, models=new)
        if new_made := [LoggedModelOutput(model_id, step=0) for model_id in made if model_id not in known_made]:
            client.log_outputs(run_id, new_made)

    def _origin_tags(self) -> dict[str, str]:
        """The environment, and the code's version under MLflow's own tags where it has one."""
        code = self._code
        tags = {"mlflow.source.type": "LOCAL", "cherry.version": code.package, "cherry.code_digest": code.digest}
        tags |= environment_tags()
        if code.git is not None:
            tags |= {"mlflow.source.git.commit": code.git.commit, "cherry.git.dirty": str(code.git.dirty).lower()}
            tags |= {"mlflow.source.git.branch": code.git.branch} if code.git.branch else {}
            tags |= {"mlflow.source.git.repoURL": code.git.repository} if code.git.repository else {}
        return tags


def _dataset_input(data: Dataset) -> DatasetInput:
    from mlflow.entities import Dataset as MlflowDataset
    from mlflow.entities import DatasetInput, InputTag

    source, profile = json.dumps({"uri": data.source}), json.dumps(dict(data.profile))
    digest = data.digest[:_DIGEST_CHARACTERS]
    made = MlflowDataset(name=data.name, digest=digest, source_type="uri", source=source, profile=profile)
    return DatasetInput(made, [InputTag("mlflow.data.context", data.use)])
