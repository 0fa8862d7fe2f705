"""MLflow imported once, before any test: importing it shows warnings of its own, which would be errors here."""

import warnings

import pytest


@pytest.fixture(scope="session", autouse=True)
def mlflow_is_imported():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow.system_metrics.system_metrics_monitor
        import mlflow.tracking  # noqa: F401
