"""Defaults of the environment for Prefect and MLflow: no telemetry, no proxy for loopback, no idle services.

Both read the environment once, when they are imported; so this module imports neither.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

from tasks.processes.loopback import keep_loopback_from_proxies

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
    keep_loopback_from_proxies()
    _give_home()
    # The error that follows names the directory, and what to do.
    warnings.filterwarnings("ignore", message="Failed to create the Prefect home directory")
    if home := os.environ.get("PREFECT_HOME"):
        # Prefect makes the directory but not its parents, and would wait in vain for a server without one.
        with suppress(OSError):
            Path(home).expanduser().mkdir(parents=True, exist_ok=True)


def _give_home() -> None:
    """Give Prefect a directory of its own where the user has none that can be written.

    A container may run as a uid without a name or a HOME, or with one that does not exist or is read-only. A profile
    that is there stays the one that is read.
    """
    if os.environ.get("PREFECT_HOME"):
        return
    try:
        usual = Path.home() / ".prefect"
    except RuntimeError:
        usual = None
    if usual is not None:
        with suppress(OSError):
            usual.mkdir(parents=True, exist_ok=True)
        if os.access(usual, os.W_OK | os.X_OK):
            return
        if os.access(usual / "profiles.toml", os.R_OK):
            os.environ.setdefault("PREFECT_PROFILES_PATH", str(usual / "profiles.toml"))
    os.environ["PREFECT_HOME"] = str(_temporary_home())


def _temporary_home() -> Path:
    """A directory of this user's in the one for temporary files: the same each time, unless it is somebody else's."""
    home = Path(tempfile.gettempdir()) / f"prefect-{os.getuid()}"
    with suppress(OSError):
        home.mkdir(mode=0o700, exist_ok=True)
        if home.lstat().st_uid == os.getuid() and home.is_dir() and not home.is_symlink():
            return home
    return Path(tempfile.mkdtemp(prefix="prefect-"))


def keep_terminal_free() -> None:
    """Leave the terminal to the progress display; a flow's log lines still reach Prefect's page."""
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
