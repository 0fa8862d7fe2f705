"""Owns `cherry-launch`: torchrun's flags on torch's elastic launcher, with exit codes that say whose fault it was.

It knows nothing of training. torch is imported only when something is launched.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from base.errors import (
    TRANSIENT_EXIT_CODES,
    USER_EXIT_CODES,
    CherryError,
    ConfigError,
    PortInUseError,
    WorkerLostError,
    error_of_code,
    error_of_record,
    run_program,
)

LAUNCHER_PID = "CHERRY_LAUNCHER_PID"
"""Environment variable in which a rank finds its launcher's pid."""
RECORD_KEY = "cherry"
"""Key of a rank's error record in the error file of torch's launcher."""
_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Launch, and end with the code of the rank that failed first (34 when a signal killed it)."""
    raise SystemExit(run_program(lambda: launch(sys.argv[1:] if arguments is None else list(arguments))))


def launch(arguments: list[str]) -> None:
    """Start the ranks of this node and wait for them.

    Raises:
        PortInUseError: the given master port is taken on this node.
        WorkerLostError: a signal killed a rank.
        InvalidInputError, OperationalError: a rank ended with an exit code of that side.
    """
    if parent := os.environ.get("CHERRY_PARENT"):
        die_with_parent(signal.SIGTERM, int(parent))
    os.environ[LAUNCHER_PID] = str(os.getpid())
    # Ranks live in sessions of their own: after a SIGTERM, do not wait torch's 30 s before they are killed.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "10")
    # An in-place restart of torch's agent meets the previous attempt's port without this.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from torch.distributed import run as torchrun

    options = _parse(torchrun.get_args_parser(), arguments)
    _check_port(options, arguments)
    _share_cores(torchrun.determine_local_world_size(options.nproc_per_node))
    with tempfile.TemporaryDirectory(prefix="cherry-launch-") as logs:
        options.log_dir = options.log_dir or logs  # torch would leave a directory behind in each run
        _start(options)


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Any:
    """torchrun's flags, whose mistakes end with our code for them."""
    parser.allow_abbrev = False

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"cherry-launch: {message}. `cherry-launch --help` tells all flags.")

    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_args(arguments)


def _start(options: Any) -> None:
    from torch.distributed import DistError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    config, command, command_arguments = torchrun.config_from_args(options)
    try:
        elastic_launch(config=config, entrypoint=command)(*command_arguments)
    except ChildFailedError as error:
        raise _error_of(*_cause(error.failures)) from error
    except (DistError, RendezvousError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WorkerLostError(
            f"the nodes did not find each other: {first}. Check --master_addr and --master_port, and that every node "
            "was started; then start the same command again."
        ) from error
    except SignalException as error:
        print(f"ended by {error.sigval.name}, with all ranks. Start the same command again to go on.", file=sys.stderr)
        raise SystemExit(128 + error.sigval) from error


def die_with_parent(signal_number: int, parent: int) -> None:
    """Ask Linux to send this process a signal when the one that started it ends, even by SIGKILL (prctl(2)).

    Args:
        parent: the pid of the starter as it knew itself, so that one that ended before the call is noticed.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal_number)
        if os.getppid() != parent:
            os._exit(WorkerLostError.exit_code)


def _cores() -> int:
    """Cores that this process may use: a container may allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _share_cores(ranks: int) -> None:
    """Give each rank its share of the cores, unless OMP_NUM_THREADS says otherwise (torchrun would give it one)."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // ranks)))


def _check_port(options: Any, arguments: Sequence[str]) -> None:
    """Pick a free port for one node when none was given; refuse a taken one before anything starts."""
    if options.standalone or options.rdzv_endpoint:
        return
    single = str(options.nnodes) in ("1", "1:1")
    given = any(argument.startswith("--master") for argument in arguments)
    if single and not given:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            options.master_port = probe.getsockname()[1]
    elif int(options.node_rank) == 0:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(options.master_port)))
            except OSError as error:
                raise PortInUseError(
                    f"port {options.master_port} is taken on this node. Give another --master_port; with one node, "
                    "leave it out and a free one is picked."
                ) from error


def _cause(failures: Mapping[int, Any]) -> tuple[int, Any]:
    """The failure that explains the others: when a rank dies, its peers soon end too, cut off in a collective.

    The caller's fault comes first, then a rank that a signal killed, then an error of the world's side, then a
    traceback; of equals, the earliest.
    """

    def weight(item: tuple[int, Any]) -> tuple[int, int, int]:
        rank, failure = item
        code = failure.exitcode
        if code in USER_EXIT_CODES:
            kind = 0
        elif code < 0 and code != -signal.SIGTERM:
            kind = 1
        else:
            kind = 2 if code in TRANSIENT_EXIT_CODES else 3
        return kind, failure.timestamp, rank

    return min(failures.items(), key=weight)


def _error_of(rank: int, failure: Any) -> CherryError:
    """The error to end with for a rank's failure. Rank 0 prints its own error, so the launcher's only refers to it.

    Raises:
        SystemExit: the rank ended by a traceback.
    """
    code = int(failure.exitcode)
    where = f"rank {rank} (pid {failure.pid})"
    if code < 0:
        name = signal.Signals(-code).name
        return WorkerLostError(
            f"{where} was killed by {name}. Start the same command again: it goes on from the newest checkpoint."
        )
    log = f"see also train/rank-{rank}.log"
    own = error_of_record((failure.error_file_data or {}).get(RECORD_KEY))
    if own is None or own.exit_code != code:
        if code not in USER_EXIT_CODES and code not in TRANSIENT_EXIT_CODES:  # a bug: its traceback says more
            print(f"error: {where} ended with exit code {code} ({log})", file=sys.stderr, flush=True)
            raise SystemExit(code)
        return error_of_code(code, f"{where} ended with exit code {code} ({log})")
    if rank != 0:
        return error_of_code(code, f"{where} ended with exit code {code}: {own} ({log})")
    summary = error_of_code(code, f"{where} ended with exit code {code}; it printed its error above ({log})")
    summary.origin = own
    return summary


if __name__ == "__main__":
    main()
