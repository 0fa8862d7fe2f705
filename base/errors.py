"""The one error family of the project, and the exit code of each member.

Two sides: `InvalidInputError` is the caller's fault and is never retried; `OperationalError` is the world's
fault and is retried, but for `SupersededError`. An exit code says which side it was across a process boundary: 10
to 29 belong to the caller, 30 to 49 to the world; every other one is a bug of ours, or a signal.
"""

from __future__ import annotations

import argparse
import errno
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

CALLER_EXIT_CODES = range(10, 30)
WORLD_EXIT_CODES = range(30, 50)
# What a shell adds to a signal's number.
_SHELL_SIGNAL = 128
# user:password@ of a URI; a port is no password, and a name alone (abfs://container@account) is no secret. Secret keys
# of AWS may hold a slash.
_CREDENTIALS = re.compile(r"(?<=://)[^/@:\s]*:(?!\d+(?:/|$))[^@\s]+@")
# Clients of object stores raise some errors (no connection, no credentials) that are no OSError.
_STORE_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure")


class CherryError(Exception):
    """Base of every error that this project raises on purpose. Its text is a sentence for a person."""

    exit_code = 1


class InvalidInputError(CherryError, ValueError):
    """The caller's fault: the same call fails again, so nothing retries it."""

    exit_code = 10


class ConfigError(InvalidInputError):
    """A configuration file, override or flag breaks one or more rules; the text lists all of them."""

    exit_code = 11


class MissingFileError(InvalidInputError):
    """A file or directory that the caller named does not exist."""

    exit_code = 12


class DataError(InvalidInputError):
    """A document, record or token shard cannot be read as what it claims to be."""

    exit_code = 13


class WeightsError(InvalidInputError):
    """A weights file is truncated, malformed, or does not belong to the configured model."""

    exit_code = 14


class CheckpointError(InvalidInputError):
    """A committed checkpoint cannot be read back: a shard is corrupt, or it belongs to another run."""

    exit_code = 15


class NonFiniteLossError(InvalidInputError):
    """The loss or the gradient norm stayed NaN, infinite or far above what it was: the same steps would fail again."""

    exit_code = 16


class AuthenticationError(InvalidInputError):
    """The bearer token was missing or wrong."""

    exit_code = 17


class RequestError(InvalidInputError):
    """A serving request breaks a rule of the API (HTTP 4xx other than authentication)."""

    exit_code = 18


class DoesNotFitError(InvalidInputError):
    """By the plan a job needs more memory than its GPUs have; the text says for what, and what would fit."""

    exit_code = 19


class OperationalError(CherryError):
    """The world's fault: the same call may succeed later, so tasks retry it."""

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


def is_retryable_exit_code(code: int) -> bool:
    """True when what ended with `code` may succeed if it is started again: the world's fault, or a signal.

    A negative code is a signal (Python's convention); 128 + n is a shell's way to say the same. A traceback (1), or a
    usage error (2), is a bug that the same start meets again: what the world does must be turned into an error of
    the world's side where it is caught.
    """
    if code == SupersededError.exit_code:
        return False
    return code in WORLD_EXIT_CODES or code < 0 or code > _SHELL_SIGNAL


def has_credentials(text: str) -> bool:
    """Whether there is a URI in `text` that carries a password."""
    return _CREDENTIALS.search(text) is not None


def without_credentials(text: str) -> str:
    """`text` with the name and password of every URI in it taken out, for a person's eyes."""
    return _CREDENTIALS.sub("***@", text)


@contextmanager
def storage_errors(uri: str) -> Iterator[None]:
    """Turn an operating system's error about `uri` into this family's.

    Raises:
        MissingFileError: nothing exists there.
        DiskFullError: no space, or the quota, is exhausted.
        StorageError: any other OSError, or an error of an object store's client.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(f"{uri} does not exist. Check the path, or run the step that writes it.") from error
    except OSError as error:
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
    """argparse for programs whose exit code says whose fault it was; parse within `run_program`.

    Flags are written out: an abbreviation would begin to mean another flag when one is added. Dashes and underscores
    inside a flag are the same.

    Raises:
        ConfigError: an unknown flag, a missing one, or a value of another type, where argparse ends with code 2.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See argparse; flags are spelled as they were added first."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        return super().parse_known_args([*map(self._spelled, words[:end]), *words[end:]], namespace)

    def _spelled(self, word: str) -> str:
        flag, equals, value = word.partition("=")
        known = {name.replace("_", "-"): name for name in self._option_string_actions}
        return known.get(flag.replace("_", "-"), flag) + equals + value if flag.startswith("--") else word

    def error(self, message: str) -> NoReturn:
        """See the class."""
        raise ConfigError(f"{self.prog}: {message}. `{self.prog} --help` tells all flags.")


def run_program(main: Callable[[], None]) -> int:
    """Run a command-line program's body and return its exit code, with this family's errors told in one line.

    Anything else is a bug of ours and keeps its traceback.
    """
    try:
        main()
    except CherryError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0
