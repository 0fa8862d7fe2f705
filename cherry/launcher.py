"""Owns `cherry-launch`: torchrun's flags on torch's elastic launcher, with exit codes that say whose fault it was.

It knows nothing of training. torch is imported only when something is launched.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from base.errors import CherryError, InvalidInputError, OperationalError, PortInUseError, WorkerLostError, run_program

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
    if os.environ.get("CHERRY_PARENT"):
        die_with_parent(signal.SIGTERM)
    # Ranks live in sessions of their own: after a SIGTERM, do not wait torch's 30 s before they are killed.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "10")
    # An in-place restart of torch's agent meets the previous attempt's port without this.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # The trainer sets its threads itself; without this torch prints a warning and uses one.
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    options = torchrun.get_args_parser().parse_args(arguments)
    _check_port(options)
    config, command, command_arguments = torchrun.config_from_args(options)
    try:
        elastic_launch(config=config, entrypoint=command)(*command_arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise _error_of(rank, failure) from error


def die_with_parent(signal_number: int) -> None:
    """Ask Linux to send this process a signal when the one that started it ends, even by SIGKILL (prctl(2))."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal_number)
        if os.getppid() != parent:  # it ended before the call
            os._exit(WorkerLostError.exit_code)


def _check_port(options: Any) -> None:
    """Pick a free port for one node when none was given; refuse a taken one before anything starts."""
    if options.standalone or options.rdzv_endpoint:
        return
    single = str(options.nnodes) in ("1", "1:1")
    given = any(argument.startswith("--master") for argument in sys.argv)
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


def _error_of(rank: int, failure: Any) -> CherryError:
    code = int(failure.exitcode)
    where = f"rank {rank} (pid {failure.pid})"
    if code < 0:
        name = signal.Signals(-code).name
        return WorkerLostError(
            f"{where} was killed by {name}. Start the same command again: it goes on from the newest checkpoint."
        )
    side = InvalidInputError if 10 <= code < 30 else OperationalError
    error = side(f"{where} ended with exit code {code}; its own message is above, and in train/rank-{rank}.log")
    error.exit_code = code
    return error


if __name__ == "__main__":
    main()
