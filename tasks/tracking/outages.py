"""Handling of tracker outages: a warning for figures of runs, a transient error for the model registry."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from base.errors import CherryError, OperationalError

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


def best_effort(method: Callable[P, T]) -> Callable[P, T | None]:
    """The method, with any error converted to a warning and `None`."""

    @functools.wraps(method)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            return method(*args, **kwargs)
        except Exception as error:  # MLflow raises its own, requests', SQLAlchemy's and the OS's errors
            first = str(error).splitlines()[0] if str(error) else repr(error)
            logger.warning("tracking: %s failed: %s", method.__name__, first)
            return None

    return guarded


def registry_call(method: Callable[P, T]) -> Callable[P, T]:
    """The method, with any outage converted to an OperationalError, which a task retries."""

    @functools.wraps(method)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except CherryError:
            raise
        except Exception as error:  # see best_effort
            raise OperationalError(f"the model registry could not {method.__name__}: {error}") from error

    return guarded
