"""Defaults of the environment for Prefect and MLflow: no telemetry, a longer start-up timeout, no idle services.

Both read the environment once, when they are imported; so this module imports neither.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

# Services of a temporary Prefect server that have nothing to do but would poll its database beside training.
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


def set_offline_defaults() -> None:
    """Turn telemetry off and give a cold machine time to start a server, unless the environment says otherwise."""
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


def keep_terminal_free() -> None:
    """Leave the terminal to the progress display; a flow's log lines still reach Prefect's page."""
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
