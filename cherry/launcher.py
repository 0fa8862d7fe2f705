"""`cherry-launch`: torchrun's flags on torch's elastic launcher, with an exit code for each kind of error.

torch is imported only when something is launched. SIGUSR1 to the launcher makes its ranks log their stacks, SIGUSR2
makes the job save a checkpoint and end (38).
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import psutil

from base.errors import (
    TRANSIENT_EXIT_CODES,
    USER_EXIT_CODES,
    CherryError,
    ConfigError,
    HardwareError,
    PortInUseError,
    WorkerLostError,
    error_of_code,
    error_of_record,
    run_program,
    storage_errors,
)
from base.lost_output import outlive_output
from base.scratch import scratch_folder
from cherry.watch.node_sampler import sample_node

LAUNCHER_PID = "CHERRY_LAUNCHER_PID"
"""Environment variable in which a rank finds its launcher's pid."""
TRAIN_SCRIPT, TRAIN_MODULE = "train.py", "cherry.rank_main"
"""The training program: the file of a checkout, and the module that is installed."""
RECORD_KEY = "cherry"
"""Key of a rank's error record in the error file of torch's launcher."""
PASSIVE_WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
"""Variables of GNU's and Intel's OpenMP."""
_PR_SET_PDEATHSIG = 1
# torchrun's, of the static rendezvous.
_DEFAULT_PORT = 29500
_MAX_PORT = 65535


def main(arguments: Sequence[str] | None = None) -> None:
    """Launch, and exit with the code of the rank that caused the failure (34 if a signal killed it)."""
    outlive_output()
    raise SystemExit(run_program(lambda: launch(sys.argv[1:] if arguments is None else list(arguments))))


def launch(arguments: list[str]) -> None:
    """Start the ranks of this node and wait for them.

    Raises:
        ConfigError: a flag is unknown, missing, or has a value that it cannot have.
        PortInUseError: the given master port is in use on this node.
        WorkerLostError: a signal killed a rank.
        InvalidInputError, OperationalError: a rank exited with the code of a user error or a transient error.
    """
    if parent := os.environ.get("CHERRY_PARENT"):
        die_with_parent(signal.SIGTERM, int(parent))
    os.environ[LAUNCHER_PID] = str(os.getpid())
    # Ranks live in sessions of their own: after a SIGTERM, do not wait torch's 30 s before they are killed.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "10")
    # An in-place restart of torch's agent meets the previous attempt's port without this.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from torch.distributed import run as torchrun

    parser = torchrun.get_args_parser()
    parser.epilog = "cherry-launch --cluster FILE starts every node that a cluster file names; see its own --help."
    if "PET_MASTER_PORT" not in os.environ:
        parser.set_defaults(master_port=None)  # 2.11 has 29500, so that nobody could tell it from one that was given
    options = _parse(parser, arguments)
    ranks = _ranks_of_node(options)
    _find_program(options)
    _set_rendezvous(options)
    run_directory = run_directory_of(options.training_script_args)
    _pass_on_signals(run_directory)
    _sample_node(run_directory)
    _share_cores(ranks)
    with scratch_folder("cherry-launch") as logs:
        options.log_dir = options.log_dir or str(logs)  # torch would leave a directory behind in each run
        _start(options)


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Any:
    """Values of torchrun's flags.

    Raises:
        ConfigError: a flag is unknown, missing, or of the wrong type.
    """
    parser.allow_abbrev = False

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"cherry-launch: {message}. `cherry-launch --help` lists all flags.")

    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_args(arguments)


def _ranks_of_node(options: Any) -> int:
    """Number of ranks on this node, from --nproc_per_node; torch would answer a wrong value with a traceback.

    Raises:
        ConfigError: --nproc_per_node or --nnodes is neither a number nor a word that torchrun knows.
    """
    from torch.distributed import run as torchrun

    try:
        ranks: int = torchrun.determine_local_world_size(options.nproc_per_node)
    except ValueError as error:
        raise _wrong_value("nproc_per_node", "a number, or cpu, gpu or auto", options, error) from error
    try:
        nodes = torchrun.parse_min_max_nnodes(options.nnodes)
    except (ValueError, RuntimeError) as error:
        raise _wrong_value("nnodes", "a number, or MIN:MAX", options, error) from error
    if ranks < 1:
        raise _wrong_value("nproc_per_node", "at least 1", options)
    if not 1 <= nodes[0] <= nodes[1]:
        raise _wrong_value("nnodes", "at least 1, with MIN not above MAX", options)
    return ranks


def _wrong_value(flag: str, rule: str, options: Any, cause: Exception | None = None) -> ConfigError:
    reason = f": {cause}" if cause is not None else ""
    return ConfigError(f"cherry-launch: --{flag} must be {rule} (got {getattr(options, flag)!r}){reason}")


def _find_program(options: Any) -> None:
    """Start the installed training program where `train.py` is named and no such file is in the working directory."""
    if options.training_script == TRAIN_SCRIPT and not options.module and not Path(TRAIN_SCRIPT).exists():
        print(f"no {TRAIN_SCRIPT} in this directory: starting the installed one (-m {TRAIN_MODULE})", flush=True)
        options.module, options.training_script = True, TRAIN_MODULE
    if options.module and options.training_script == TRAIN_MODULE:
        # As python -P: a package called `model` in the working directory is not taken for this project's.
        os.environ.setdefault("PYTHONSAFEPATH", "1")


def _start(options: Any) -> None:
    from torch.distributed import DistError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    try:
        with storage_errors(options.log_dir):
            config, command, command_arguments = torchrun.config_from_args(options)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise _refused(error) from error
    # It logs what ended a rank, and what it does about the others; _error_of says the first, with the log's name.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        elastic_launch(config=config, entrypoint=command)(*command_arguments)
    except ChildFailedError as error:
        raise _error_of(*_cause(error.failures)) from error
    except (DistError, RendezvousError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WorkerLostError(
            f"the rendezvous of the nodes failed: {first}. Check --master_addr and --master_port, and that every node "
            "was started; then start the same command again."
        ) from error
    except ValueError as error:  # an unknown backend or a malformed endpoint: nothing has been started
        raise _refused(error) from error
    except SignalException as error:
        print(f"ended by {error.sigval.name}, with all ranks. Run the same command again to resume.", file=sys.stderr)
        raise SystemExit(128 + error.sigval) from error


def _refused(error: Exception) -> ConfigError:
    """torch's own reason to refuse a value."""
    reason = str(error).strip().rstrip(".") or type(error).__name__
    return ConfigError(f"cherry-launch: {reason}. `cherry-launch --help` lists all flags.")


def run_directory_of(script_arguments: Sequence[str]) -> str | None:
    """The run directory that the program's --run_dir names; `None` without one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--run_dir")
    found: str | None = parser.parse_known_args(script_arguments)[0].run_dir
    return found


def _sample_node(run_directory: str | None) -> None:
    """Sample what this node uses, from now on, where the run directory is known and on a file system."""
    from base import storage  # fsspec, which `cherry --help` does without

    if run_directory is not None and storage.is_local(run_directory):
        sample_node(Path(storage.local_path(run_directory)) / "train")


def _pass_on_signals(run_directory: str | None) -> None:
    """Pass SIGUSR1 and SIGUSR2 on to the ranks of this node, from now on.

    They are blocked here and in the ranks, which inherit that, so that they end no rank that does not handle them yet.
    """
    where = f"{run_directory.rstrip('/')}/train" if run_directory else "train/ of the run directory"
    signals = {signal.SIGUSR1, signal.SIGUSR2}

    def pass_on() -> None:
        told = False
        while True:
            number = signal.sigwait(signals)
            ranks = psutil.Process().children()
            for rank in ranks:
                with suppress(psutil.NoSuchProcess):
                    rank.send_signal(number)
            pids = ", ".join(str(rank.pid) for rank in ranks) or "none"
            if number == signal.SIGUSR2:  # which may come again and again
                if ranks and not told:
                    print(f"told to end: the ranks (pids {pids}) save a checkpoint after their step", flush=True)
                told = told or bool(ranks)
            else:
                print(f"stacks of all threads of the ranks (pids {pids}) are in rank-<n>.log in {where}", flush=True)

    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    threading.Thread(target=pass_on, name="signals", daemon=True).start()


def die_with_parent(signal_number: int, parent: int) -> None:
    """Let Linux send this process a signal when its parent ends, even by SIGKILL (prctl(2)).

    Args:
        parent: expected pid of the parent; if it ended before this call, this process exits.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal_number)
        if os.getppid() != parent:
            os._exit(WorkerLostError.exit_code)


def _cores() -> int:
    """Number of cores that this process may use; a container may allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _share_cores(ranks: int) -> None:
    """Set OMP_NUM_THREADS to a rank's share of the cores, unless it is set; torchrun would set it to 1.

    Threads wait passively: where other programs take the cores, a thread that spins keeps the one that it waits for
    from its core (benchmarks/busy_cpu.py). Whatever the environment sets wins.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // ranks)))
    for name, value in PASSIVE_WAITING.items():
        os.environ.setdefault(name, value)


def _set_rendezvous(options: Any) -> None:
    """Fill in what torchrun's own `run` does: the rendezvous of --standalone, and a port where none is given.

    A single node without a port gets a free one, several nodes torchrun's 29500.

    Raises:
        ConfigError: --master_port or --node_rank is out of range.
        PortInUseError: the port is in use on the node of rank 0.
    """
    from torch.distributed import run as torchrun

    if options.standalone:
        options.rdzv_backend, options.rdzv_endpoint, options.rdzv_id = "c10d", "localhost:0", str(uuid.uuid4())
    port = options.master_port
    if port is not None and not 1 <= port <= _MAX_PORT:
        raise _wrong_value("master_port", f"from 1 to {_MAX_PORT}", options)
    if options.rdzv_backend != "static" or options.rdzv_endpoint:
        options.master_port = _DEFAULT_PORT if port is None else port
        return
    nodes = torchrun.parse_min_max_nnodes(options.nnodes)[1]
    if not 0 <= options.node_rank < nodes:
        raise _wrong_value("node_rank", f"from 0 to {nodes - 1}, as --nnodes is {options.nnodes}", options)
    if port is None and nodes == 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            options.master_port = probe.getsockname()[1]
        return
    options.master_port = _DEFAULT_PORT if port is None else port
    if options.node_rank == 0:
        _check_port(options.master_port)


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise PortInUseError(
                f"port {port} is taken on this node. Give another --master_port; with one node, leave it out and a "
                "free one is picked."
            ) from error


def _cause(failures: Mapping[int, Any]) -> tuple[int, Any]:
    """(rank, failure) that caused the others: when a rank ends, its peers soon fail in a collective.

    A user error comes first, then a rank that was killed by a signal, then a transient error, then a traceback; of
    equals, the earliest.
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
            f"{where} was killed by {name}. Start the same command again: it resumes from the newest checkpoint."
        )
    log = f"see also train/rank-{rank}.log"
    own = error_of_record((failure.error_file_data or {}).get(RECORD_KEY))
    if own is None or own.exit_code != code:
        if code not in USER_EXIT_CODES and code not in TRANSIENT_EXIT_CODES:  # a bug: its traceback says more
            print(f"error: {where} ended with exit code {code} ({log})", file=sys.stderr, flush=True)
            raise SystemExit(code)
        return error_of_code(code, f"{where} ended with exit code {code} ({log})")
    if rank != 0:
        told = error_of_code(code, f"{where} ended with exit code {code}: {own} ({log})")
        if isinstance(told, HardwareError) and isinstance(own, HardwareError):
            told.hosts = own.hosts
        return told
    summary = error_of_code(code, f"{where} ended with exit code {code}; it printed its error above ({log})")
    summary.origin = own
    return summary


if __name__ == "__main__":
    main()
