"""The error family of the project, the exit code of each member, and how an error crosses a process.

Two sides: `InvalidInputError` is a user error and is never retried; `OperationalError` is a transient error and is
retried, except `SupersededError`. A program ends with its error's exit code (10 to 29 user errors, 30 to 49 transient
ones; any other is a bug or a signal) and writes the error as JSON to the file that CHERRY_ERROR_FILE names.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import logging
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

logger = logging.getLogger(__name__)
USER_EXIT_CODES = range(10, 30)
"""Exit codes of user errors: the same call fails again."""
TRANSIENT_EXIT_CODES = range(30, 50)
"""Exit codes of transient errors: the same call may succeed later."""
ERROR_FILE_VARIABLE = "CHERRY_ERROR_FILE"
"""Environment variable with the path of the file to which a program writes its error; see `write_error`."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as of a shell: 128 + SIGINT."""
# What a shell adds to a signal's number.
_SHELL_SIGNAL = 128
# user:password@ of a URI; a port is no password, and a name alone (abfs://container@account) is no secret. Secret keys
# of AWS may hold a slash.
_CREDENTIALS = re.compile(r"(?<=://)[^/@:\s]*:(?!\d+(?:/|$))[^@\s]+@")
_NOT_THERE = {
    errno.EISDIR: "a directory is there, where a file is needed",
    errno.ENOTDIR: "a part of this path is a file, where a directory is needed",
    errno.EEXIST: "a file is there, where a directory is needed",
    errno.ENAMETOOLONG: "a name is longer than the file system takes",
    errno.ELOOP: "its links lead in a circle",
}
"""Errors of the operating system that the same path meets again, by their number."""
# Clients of object stores raise some errors (no connection, no credentials) that are no OSError.
_STORE_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure")


class CherryError(Exception):
    """Base of every error that this project raises on purpose. Its text is a sentence for a person."""

    exit_code = 1
    origin: CherryError | None = None
    """Error of another process that this one summarizes; the error file gets it in place of this one."""


class InvalidInputError(CherryError, ValueError):
    """A user error: the same call fails again, so nothing retries it."""

    exit_code = 10


class ConfigError(InvalidInputError):
    """A configuration file, override or flag breaks one or more rules; the text lists all of them."""

    exit_code = 11


class MissingFileError(InvalidInputError):
    """A named file or directory does not exist."""

    exit_code = 12


class DataError(InvalidInputError):
    """A document, record or token shard is malformed."""

    exit_code = 13


class WeightsError(InvalidInputError):
    """A weights file is truncated, malformed, or does not belong to the configured model."""

    exit_code = 14


class CheckpointError(InvalidInputError):
    """A committed checkpoint cannot be read back: a shard is corrupt, or it belongs to another run."""

    exit_code = 15


class NonFiniteLossError(InvalidInputError):
    """The loss or the gradient norm stayed NaN, infinite or far above its recent mean: the same steps fail again."""

    exit_code = 16


class AuthenticationError(InvalidInputError):
    """The bearer token was missing or wrong."""

    exit_code = 17


class RequestError(InvalidInputError):
    """A serving request breaks a rule of the API (HTTP 4xx other than authentication)."""

    exit_code = 18


class DoesNotFitError(InvalidInputError):
    """The planned memory of a job exceeds that of its GPUs; the text names the component and changes that would fit."""

    exit_code = 19


class OperationalError(CherryError):
    """A transient error: the same call may succeed later, so tasks retry it."""

    exit_code = 30


class StorageError(OperationalError):
    """Reading or writing storage failed for a reason other than a missing file."""

    exit_code = 31


class DiskFullError(StorageError):
    """No space is left where something had to be written. What was committed before is untouched."""

    exit_code = 32


class PortInUseError(OperationalError):
    """A server cannot bind: another process listens on the port."""

    exit_code = 33


class WorkerLostError(OperationalError):
    """A training process died without an error of its own (killed, out of memory, lost host)."""

    exit_code = 34


class ServiceError(OperationalError):
    """A server did not answer, answered with a failure of its own, or answered too late."""

    exit_code = 35


class SupersededError(OperationalError):
    """A newer attempt took over this run directory, so this one must stop writing to it.

    Not retried: it would take the run back from the newer attempt, which would then do the same.
    """

    exit_code = 36


class HardwareError(OperationalError):
    """A device computed something else from the same inputs: silent data corruption. The text names rank and host.

    Args:
        hosts: names of the hosts that it is certain to be on, for whoever starts the job again; empty if unknown.
    """

    exit_code = 37

    def __init__(self, message: str, hosts: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.hosts = hosts


class StoppedError(OperationalError):
    """The job was told to end (SIGUSR2), and did after a step whose checkpoint is committed: the next start resumes."""

    exit_code = 38


def is_retryable_exit_code(code: int) -> bool:
    """Whether a program that ended with `code` may succeed when it is started again: a transient error or a signal.

    A negative code is a signal (Python's convention), as is 128 + n (a shell's). A traceback (1) or a usage error (2)
    is a bug that the same start meets again.
    """
    if code == SupersededError.exit_code:
        return False
    return code in TRANSIENT_EXIT_CODES or code < 0 or code > _SHELL_SIGNAL


def error_of_code(code: int, text: str) -> CherryError:
    """Error for a program's exit code: of the class with this code, else of the base of user or transient errors."""
    kinds = {kind.exit_code: kind for kind in _family(CherryError)}
    if code in kinds:
        return kinds[code](text)
    if code in USER_EXIT_CODES:
        error: CherryError = InvalidInputError(text)
    else:
        error = OperationalError(text) if is_retryable_exit_code(code) else CherryError(text)
    error.exit_code = code
    return error


def _family(kind: type[CherryError]) -> Iterator[type[CherryError]]:
    """`kind` and its subclasses in this file; a subclass defined elsewhere shares the exit code of its base."""
    yield kind
    for member in kind.__subclasses__():
        if member.__module__ == __name__:
            yield from _family(member)


def error_record(error: CherryError) -> dict[str, Any]:
    """An error as JSON: `kind` (its class), `exit_code`, `message`, and `hosts` where a HardwareError names some."""
    hosts = {"hosts": list(error.hosts)} if isinstance(error, HardwareError) and error.hosts else {}
    return {"kind": type(error).__name__, "exit_code": error.exit_code, "message": str(error), **hosts}


def write_error(path: Path, error: CherryError) -> None:
    """Write an error's record to `path`; best effort, since the exit code still tells user from transient errors."""
    try:
        path.write_text(json.dumps(error_record(error)))
    except OSError as failure:
        logger.warning("%s: the error's record is lost: %s", path, failure)


def error_of_record(record: Any) -> CherryError | None:
    """The error that an error file's JSON holds; `None` when it is no such record."""
    if not isinstance(record, dict):
        return None
    code, message = record.get("exit_code"), record.get("message")
    error = error_of_code(code, message) if isinstance(code, int) and isinstance(message, str) else None
    if isinstance(error, HardwareError):
        error.hosts = tuple(str(host) for host in record.get("hosts", ()))
    return error


def read_error(path: Path) -> CherryError | None:
    """The error that a program wrote to its error file; `None` when it wrote none."""
    try:
        return error_of_record(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def has_credentials(text: str) -> bool:
    """Whether a URI in `text` has a password."""
    return _CREDENTIALS.search(text) is not None


def without_credentials(text: str) -> str:
    """`text` with the user name and password of every URI in it replaced by ***."""
    return _CREDENTIALS.sub("***@", text)


def directory_fault(path: str) -> str | None:
    """Why no directory can be at a local path, like a file in its place; `None` where one is or can be made."""
    place = os.path.abspath(path)
    while True:
        try:
            found = os.stat(place).st_mode
        except (FileNotFoundError, NotADirectoryError):
            if os.path.islink(place):
                return f"{place} is a link to what does not exist"
            place = os.path.dirname(place)
        except (OSError, ValueError) as error:
            return f"{place}: {getattr(error, 'strerror', None) or error}"
        else:
            return None if stat.S_ISDIR(found) else f"{place} is a file, and a directory is needed"


@contextmanager
def storage_errors(uri: str) -> Iterator[None]:
    """Context that converts errors of the operating system and of object stores about `uri` into this family's.

    Raises:
        MissingFileError: nothing exists there, or something of another kind does.
        DiskFullError: no space, or the quota, is exhausted.
        StorageError: any other OSError, or an error of an object store's client.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(f"{uri} does not exist. Check the path, or run the step that writes it.") from error
    except OSError as error:
        if error.errno in _NOT_THERE:
            raise MissingFileError(f"{uri}: {_NOT_THERE[error.errno]}. Check the path.") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"no space left while writing {uri}. Free some space and run the same command again; "
                "what was committed before is untouched."
            ) from error
        raise StorageError(f"storage failed at {uri}: {error}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in _STORE_CLIENTS:
            raise
        raise StorageError(f"storage failed at {uri}: {error}") from error


class ArgumentParser(argparse.ArgumentParser):
    """argparse for programs that end with an exit code of this family; parse within `run_program`.

    Flags must be written in full: an abbreviation could become ambiguous when a flag is added. Dashes and underscores
    inside a flag are equivalent.

    Raises:
        ConfigError: an unknown flag, a missing one, or a value of another type, where argparse ends with code 2.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Namespace and unknown arguments, as argparse returns them; flags may have dashes or underscores."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        return super().parse_known_args([*map(self._spelled, words[:end]), *words[end:]], namespace)

    def _spelled(self, word: str) -> str:
        flag, equals, value = word.partition("=")
        known = {name.replace("_", "-"): name for name in self._option_string_actions}
        return known.get(flag.replace("_", "-"), flag) + equals + value if flag.startswith("--") else word

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with argparse's message."""
        raise ConfigError(f"{self.prog}: {message}. `{self.prog} --help` lists all flags.")


def run_program(main: Callable[[], None], *, interrupted: Callable[[], bool] = lambda: False) -> int:
    """Exit code of a command-line program's body; an error of this family is printed, and written to the error file.

    Any other exception is a bug and keeps its traceback, unless Ctrl-C is what it comes from: pydantic and, in class
    bodies, Python 3.11 put another exception in the place of a KeyboardInterrupt. Programs that this one starts do not
    inherit the error file.

    Args:
        interrupted: whether Ctrl-C was pressed, for exceptions that do not name the one that they stand for.
    """
    error_file = os.environ.pop(ERROR_FILE_VARIABLE, None)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that is no UTF-8, as standard error shows it
    try:
        main()
    except CherryError as error:
        if error_file is not None:
            write_error(Path(error_file), error.origin or error)
        # That of another program, which printed it, is only referred to.
        print(error if error.origin is not None else f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if interrupted() or _stands_for_interrupt(error):
            return INTERRUPTED
        raise
    return 0


def _stands_for_interrupt(error: BaseException) -> bool:
    """Whether an exception has a KeyboardInterrupt among its causes."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    return cause is not None
