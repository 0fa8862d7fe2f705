"""The tracker that a config names."""

from __future__ import annotations

import functools

from tasks.code_version import code_version
from tasks.run_config import TrackingConfig
from tasks.tracking.json_tracker import SCHEME, JsonTracker
from tasks.tracking.mlflow_connection import check_servers, tracking_uri
from tasks.tracking.mlflow_tracker import MlflowTracker
from tasks.tracking.protocol import Tracker


@functools.lru_cache(maxsize=8)
def connect(config: TrackingConfig, runs_directory: str) -> Tracker:
    """The tracker of a configuration, one for each in a process; no server is asked yet."""
    uri = tracking_uri(config, runs_directory)
    if uri.startswith(SCHEME):
        return JsonTracker(uri, runs_directory, code_version())
    return MlflowTracker(config, runs_directory, code_version())


def check_tracking_servers(config: TrackingConfig, runs_directory: str) -> None:
    """Check within seconds that the tracking server answers, where there is one, before anything else is started.

    Raises:
        ConfigError, ServiceError: see `tasks.tracking.mlflow_connection.check_servers`.
    """
    uri = tracking_uri(config, runs_directory)
    if not uri.startswith(SCHEME):
        check_servers(uri)
