"""Owns what Prefect and MLflow are told before they are imported: send nothing, wait for a cold machine, do not idle.

It imports neither, because both read the environment once, at their import.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

# Of a temporary Prefect server, which has nothing scheduled: they would poll its database beside the training.
_IDLE_SERVICES = (
    "SCHEDULER",
    "LATE_RUNS",
    "FOREMAN",
    "PAUSE_EXPIRATIONS",
    "REPOSSESSOR",
    "CLEANUP_RECONCILER",
    "TRIGGERS",
    "CANCELLATION_CLEANUP",
)


def set_offline_defaults(*, verbose: bool) -> None:
    """Nothing is sent to anyone, and a cold machine gets the time that it needs; a person's own settings win.

    Unless `verbose`, the terminal is left to the progress display; the log lines still reach Prefect's page.
    """
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    for service in _IDLE_SERVICES:
        os.environ.setdefault(f"PREFECT_SERVER_SERVICES_{service}_ENABLED", "false")
    if home := os.environ.get("PREFECT_HOME"):
        # Prefect makes the directory but not its parents, and would wait in vain for a server without one.
        with suppress(OSError):
            Path(home).expanduser().mkdir(parents=True, exist_ok=True)
    if not verbose:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
