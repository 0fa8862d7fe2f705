"""An MLflow tracker whose modules and tables have been used once, so that later uses show no warnings."""

from __future__ import annotations

import warnings

import pytest

from tasks.code_version import CodeVersion
from tasks.run_config import TrackingConfig
from tasks.tracking.mlflow_tracker import MlflowTracker


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> MlflowTracker:
    """A tracker over SQLite, with the code version of an installed package."""
    folder = tmp_path_factory.mktemp("runs")
    installed = CodeVersion("9.9", "d" * 64, None)
    made = MlflowTracker(TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"), str(folder), installed)
    with warnings.catch_warnings():
        # MLflow's modules and tables use what others have deprecated, which shows when they are first used.
        warnings.simplefilter("ignore")
        assert made.runs.start("warm", parent=None, step="flow", identity="0", run_key="k") is not None
    return made
