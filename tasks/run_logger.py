"""The logger of step code: Prefect's inside a flow's or task's run, the module's own outside of one."""

from __future__ import annotations

import logging

from prefect import get_run_logger
from prefect.context import get_run_context
from prefect.exceptions import MissingContextError
from prefect.logging.loggers import LoggingAdapter

logger = logging.getLogger(__name__)


def run_logger() -> logging.Logger | LoggingAdapter:
    """The logger of the current Prefect run, or a plain one where there is none."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logger


def in_prefect_run() -> bool:
    """Whether this code runs inside a Prefect flow or task, so that Prefect's server may be called."""
    try:
        get_run_context()
    except MissingContextError:
        return False
    return True
