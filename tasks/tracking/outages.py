"""Handling of tracker outages: told once for figures of runs, an error of one sentence for the model registry."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar
from urllib.parse import urlsplit

from base.errors import AuthenticationError, CherryError, OperationalError, ServiceError, without_credentials

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
# (driver.Class) reason [SQL: statement]: SQLAlchemy's text of an error of the database.
_DATABASE = re.compile(r"\((\w+\.(?:\w+\.)*\w+)\)\s+(.+?)\s*(?:\[SQL:|\n|$)", re.DOTALL)
_STATUS = re.compile(r"failed with (?:error code|status code) (\d{3})|(\d{3}) (?:Client|Server) Error")
_OUTDATED = "out-of-date database schema"
_CHARACTERS = 300


class Outages:
    """Calls on runs that were lost. `report` is told the first one of each outage."""

    def __init__(self) -> None:
        self.report: Callable[[str], None] | None = None
        self.lost = 0
        self.first: str | None = None
        self._is_out = False

    def failed(self, call: str, error: Exception) -> None:
        """Count a lost call, and tell it unless it is one of an outage that was told."""
        reason = reason_of(error)
        logger.warning("tracking: %s failed: %s", call, reason)
        self.lost += 1
        self.first = self.first or reason
        if self.report is not None and not self._is_out:
            self.report(f"tracking is lost: {reason}. The run goes on; its figures are kept in the run directory")
        self._is_out = True

    def answered(self) -> None:
        """End the outage: the tracker has taken a call."""
        self._is_out = False

    def remark(self) -> str:
        """What a person should know of the tracker's page: empty unless calls were lost."""
        if not self.lost:
            return ""
        return f" (incomplete: {self.lost} calls were lost, the first because {self.first})"


class Recording(Protocol):
    """An object whose calls on runs are best effort."""

    outages: Outages


R = TypeVar("R", bound=Recording)


def best_effort(method: Callable[Concatenate[R, P], T]) -> Callable[Concatenate[R, P], T | None]:
    """The method, with any error noted in the object's `outages`, and `None` returned."""

    @functools.wraps(method)
    def guarded(self: R, /, *args: P.args, **kwargs: P.kwargs) -> T | None:
        if args[:1] == (None,):  # a run that could not be created
            return None
        try:
            result = method(self, *args, **kwargs)
        except Exception as error:  # MLflow raises its own, requests', SQLAlchemy's and the OS's errors
            self.outages.failed(method.__name__.lstrip("_"), error)
            return None
        if result is not None:  # else it may have had nothing to send
            self.outages.answered()
        return result

    return guarded


def registry_call(method: Callable[P, T]) -> Callable[P, T]:
    """The method, with any outage converted to an error of the family, which a task retries."""

    @functools.wraps(method)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except CherryError:
            raise
        except Exception as error:  # see best_effort
            raise explained(error, f"the model registry could not {method.__name__}") from error

    return guarded


def explained(error: Exception, what: str) -> CherryError:
    """Error of the family for one of MLflow, of its database or of its client: one line, and what to do."""
    if isinstance(error, CherryError):
        return error
    reason, status = reason_of(error), _status_of(error)
    if status in (401, 403):
        return AuthenticationError(
            f"{what}: {reason}. Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
        )
    if _address_of(error) is not None or status is not None:
        return ServiceError(f"{what}: {reason}. Start the server, or correct tracking.uri or MLFLOW_TRACKING_URI.")
    if _OUTDATED in str(error):
        return OperationalError(f"{what}: {reason}. `mlflow db upgrade URI` brings the database up to date.")
    return OperationalError(f"{what}: {reason}")


def reason_of(error: Exception) -> str:
    """One line on an error, without SQL, without the text of the clients between, and without a full stop."""
    address, status = _address_of(error), _status_of(error)
    if address is not None:
        return f"no server answers at {address}"
    if status is not None:
        return f"the server answers with HTTP {status}, as no MLflow server would, or refuses the request"
    if _OUTDATED in str(error):
        return "the database was made by another version of MLflow"
    text = str(error)
    found = _DATABASE.search(text)
    line = f"the database says: {found[2]}" if found is not None else text.strip().split("\n")[0] or repr(error)
    return without_credentials(line[:_CHARACTERS].rstrip(". "))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _address_of(error: Exception) -> str | None:
    """Address that could not be connected to; `None` for any other error."""
    for one in _chain(error):
        if type(one).__module__.split(".")[0] not in ("requests", "httpx"):
            continue
        if not any(word in type(one).__name__ for word in ("Connection", "Connect", "Timeout", "Proxy", "SSL")):
            continue
        request: Any = getattr(one, "request", None)
        parts = urlsplit(str(getattr(request, "url", "")))
        return without_credentials(f"{parts.scheme}://{parts.netloc}")
    return None


def _status_of(error: Exception) -> int | None:
    """HTTP status of an answer that is not MLflow's; `None` where there is none."""
    found = _STATUS.search(str(error))
    return int(found[1] or found[2]) if found is not None else None
