"""The main program of one training rank: flags to a resolved config, logs, the process group, and the exit code."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base import storage
from base.config import validate
from base.errors import (
    ArgumentParser,
    CherryError,
    ConfigError,
    InvalidInputError,
    MissingFileError,
    WorkerLostError,
    directory_fault,
    error_record,
    run_program,
)
from base.lost_output import outlive_output
from base.yaml_config import apply_overrides, merge, packaged_config, read_yaml
from cherry.job_config import NETWORK_VARIABLE, PICKLED_WEIGHTS, JobConfig, NetworkConfig, over_network, weights_folder
from cherry.launcher import LAUNCHER_PID, RECORD_KEY, die_with_parent
from cherry.watch.rank_log import log_to_file

if TYPE_CHECKING:  # torch is imported once the environment is set
    from cherry.data.shards import Manifest
    from cherry.hooks.protocol import TrainerHook

logger = logging.getLogger(__name__)

# Flags that are keys of the `train` section.
_TRAIN_FLAGS = ("batch_size", "learning_rate", "gradient_accumulation_steps", "steps")


def build_parser() -> ArgumentParser:
    """The flags of train.py."""
    parser = ArgumentParser(prog="train.py", description="Train one model; start it with cherry-launch.")
    parser.add_argument("--config", help="a resolved config, or the name of a packaged one, like tiny")
    parser.add_argument("--run_dir", help="the run directory (default: runs/<name>)")
    parser.add_argument("--model_path", help="weights to start from: a Hugging Face folder or URI, or a .pt file")
    parser.add_argument("--resume_from", help="a checkpoint, like checkpoints/step_1000 (default: the newest one)")
    parser.add_argument("--batch_size", type=int, help="sequences per optimizer step, over all ranks")
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--gradient_accumulation_steps", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="any key of the config, dotted")
    parser.add_argument(
        "--pdb",
        action="store_true",
        help="open the debugger where an error is raised, and end in a way debuggers see (one rank only)",
    )
    return parser


def main(arguments: Sequence[str] | None = None, *, hooks: Sequence[TrainerHook] = ()) -> None:
    """Run one rank; ends the process with the error's exit code.

    Args:
        arguments: flags of `build_parser`; `None` takes the command line's.
        hooks: for the trainer; see cherry/hooks/protocol.py.
    """
    if launcher := os.environ.get(LAUNCHER_PID):
        die_with_parent(signal.SIGKILL, int(launcher))  # a launcher that is killed outright leaves no rank behind
    outlive_output()
    logging.raiseExceptions = False  # a log on a full disk is no reason for tracebacks
    logging.getLogger().addHandler(logging.NullHandler())  # before there is a log file, stderr is for the error's text
    code = run_program(lambda: _run(arguments, hooks))
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    if "--pdb" in (sys.argv[1:] if arguments is None else arguments):
        raise SystemExit(code)  # a debugger around this program (python -m pdb train.py --pdb) sees the end
    # After an error other ranks may be inside a collective, and torn-down threads would wait for them; after success a
    # thread that is still inside torch when Python ends takes the process with it (SIGABRT, rarely).
    os._exit(code)


def _run(arguments: Sequence[str] | None, hooks: Sequence[TrainerHook]) -> None:
    """Train. An error of this project's family is printed once: rank 0's here, that of another rank by the launcher if
    it is the cause."""
    rank = int(os.environ.get("RANK", "0"))
    options: argparse.Namespace | None = None
    try:
        options = build_parser().parse_args(arguments)
        _train(options, rank, hooks)
    except Exception as error:
        if options is not None and options.pdb and os.environ.get("WORLD_SIZE", "1") == "1":
            _debug(error)
        if not isinstance(error, CherryError):
            raise
        logger.error("%s", error, exc_info=error.__cause__)
        write_for_launcher(error)
        if rank == 0:
            raise
        os._exit(error.exit_code)


def _debug(error: Exception) -> None:
    """Open pdb in the frame that raised the error, or its cause where an error of torch was classified."""
    import pdb  # noqa: T100

    print(f"{type(error).__name__}: {error}", flush=True)
    pdb.post_mortem((error.__cause__ or error).__traceback__)


def write_for_launcher(error: CherryError) -> None:
    """Write the error to the file that torch's launcher reads (torch.distributed.elastic.multiprocessing.errors)."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        detail = {"py_callstack": "", "timestamp": str(int(time.time()))}
        record = {"message": {"message": str(error), "extraInfo": detail}, RECORD_KEY: error_record(error)}
        try:
            Path(path).write_text(json.dumps(record))
        except OSError:  # a full disk: the exit code is left, and half a record would be an error of its own
            with suppress(OSError):
                Path(path).unlink(missing_ok=True)


def resolve(options: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> JobConfig:
    """Job configuration of the flags and the launcher's environment variables.

    Raises:
        ConfigError: lists every rule that is broken.
    """
    if options.config is not None:
        origin, raw = options.config, read_yaml(options.config)
        raw = {key: value for key, value in raw.items() if key in JobConfig.model_fields}
    elif options.model_path is not None:
        origin, raw = f"flags with --model_path={options.model_path}", _from_model_path(options.model_path)
    else:
        raise ConfigError(
            "train.py needs --config, or --model_path of a folder whose config.json gives the architecture"
        )
    raw = merge(raw, _given(options, environment), origin=origin)
    raw = apply_overrides(raw, options.set)
    if network := environment.get(NETWORK_VARIABLE):
        raw["communication"] = over_network(raw.get("communication"), json.loads(network))
    return validate(raw, JobConfig, origin=origin)


def _given(options: argparse.Namespace, environment: Mapping[str, str]) -> dict[str, Any]:
    """Config values from the flags that were given, and the number of ranks that the launcher started."""
    world = int(environment.get("WORLD_SIZE", "1"))
    local = int(environment.get("LOCAL_WORLD_SIZE", world))
    launch = {"nproc_per_node": local, "nnodes": world // local}
    if world > local:
        launch["master_port"] = int(environment["MASTER_PORT"])
    values = {key: getattr(options, key) for key in _TRAIN_FLAGS if getattr(options, key) is not None}
    weights = {} if options.model_path is None else {"init_from": options.model_path}
    return {"launch": launch, "train": values, **weights}


def _from_model_path(path: str) -> dict[str, Any]:
    """Config values of a job on given weights: architecture and tokenizer from their folder."""
    from model.weights.pretrained import read_model_config

    folder = weights_folder(path)
    if storage.is_file(folder):
        raise MissingFileError(
            f"--model_path {path} is a file, and no {', '.join(PICKLED_WEIGHTS)} file. Give the folder that it lies "
            "in, with its config.json."
        )
    model, _ = read_model_config(folder)
    raw: dict[str, Any] = {"name": "train", "model": model.model_dump(mode="json", exclude={"preset"})}
    tokenizer = storage.join(folder, "tokenizer.json")
    if storage.exists(tokenizer):
        raw["data"] = {"tokenizer": tokenizer}
    return raw


def _train(options: argparse.Namespace, rank: int, hooks: Sequence[TrainerHook]) -> None:
    if options.pdb and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(f"--pdb needs a single rank, got {os.environ['WORLD_SIZE']}. Use --nproc_per_node=1.")
    config = resolve(options)
    run_directory = options.run_dir or f"runs/{config.name}"
    check_directories(config, run_directory)
    log_to_file(run_directory, rank, prints=not options.pdb)
    _set_variables(config.communication)
    import torch

    if config.train.threads_per_rank is not None:
        torch.set_num_threads(config.train.threads_per_rank)  # else torch takes the launcher's OMP_NUM_THREADS
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        os.environ.setdefault(name, value)
    if config.train.deterministic:
        from cherry.determinism import use_deterministic_algorithms

        use_deterministic_algorithms(config.seed, rank)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        _train_in_group(config, run_directory, options, hooks)
    except RuntimeError as error:
        if (classified := classify_error(error)) is error:
            raise
        raise classified from error


def set_network_variables() -> None:
    """Set what the cluster's file says of NCCL and gloo, for a program without a configuration of its own."""
    _set_variables(NetworkConfig.model_validate(json.loads(os.environ.get(NETWORK_VARIABLE, "{}"))))


def _set_variables(network: NetworkConfig) -> None:
    for name, value in network.variables().items():
        os.environ.setdefault(name, value)  # libraries read these when they connect


def check_directories(config: JobConfig, run_directory: str) -> None:
    """Check that no file is in the place of a directory that training writes to.

    Raises:
        ConfigError: names the flag or key.
    """
    if not storage.is_local(run_directory):
        raise ConfigError(f"--run_dir must be on a file system (got {run_directory}); checkpoint.directory need not be")
    for name, uri in (("--run_dir", run_directory), ("checkpoint.directory", config.checkpoint.directory)):
        fault = directory_fault(storage.local_path(uri)) if uri is not None and storage.is_local(uri) else None
        if fault is not None:
            raise ConfigError(f"{name} {uri}: {fault}. Give another directory.")


def _train_in_group(
    config: JobConfig, run_directory: str, options: argparse.Namespace, hooks: Sequence[TrainerHook]
) -> None:
    import torch.distributed as dist

    from cherry.distributed.group_timeout import set_group_timeout

    if (seconds := config.communication.timeout_s) is not None:
        set_group_timeout(seconds)
    timeout = None if seconds is None else timedelta(seconds=seconds)
    dist.init_process_group(_backends(config.communication.backend), timeout=timeout)
    config, resume_from = _prepare(config, run_directory, options)
    from cherry.trainer import Trainer

    Trainer(config, run_directory, resume_from=resume_from, hooks=hooks).run()
    dist.destroy_process_group()


def _backends(wanted: str | None) -> str:
    """Communication libraries of this host's devices, as torch names them.

    Raises:
        ConfigError: the configuration names another.
    """
    import torch

    gpus = torch.cuda.is_available()
    if wanted not in (None, "nccl" if gpus else "gloo"):
        here = "has GPUs, whose tensors gloo does not reduce" if gpus else "has no GPU, which nccl needs"
        raise ConfigError(f"communication.backend: {wanted} cannot be used, as this host {here}. Leave the key out.")
    return "cpu:gloo,cuda:nccl" if gpus else "gloo"


def classify_error(error: RuntimeError) -> Exception:
    """The user or transient error that corresponds to an error of torch; the error itself if it is a bug."""
    import torch
    import torch.distributed as dist

    from cherry.determinism import determinism_error

    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        return InvalidInputError(
            f"{first} Raise train.gradient_accumulation_steps, set train.activation_checkpointing to full, lower "
            "train.loss_chunk_tokens, or shard over more ranks. What was committed is complete."
        )
    # gloo has no error type of its own, but its messages begin with the path of its source.
    if isinstance(error, dist.DistError) or "gloo/" in str(error):
        return WorkerLostError(f"the connection to another rank broke: {first}. Run the same command again to resume.")
    if isinstance(error, torch.AcceleratorError):
        return WorkerLostError(f"the GPU failed: {first}. Run the same command again to resume.")
    return determinism_error(error) or error


def _prepare(config: JobConfig, run_directory: str, options: argparse.Namespace) -> tuple[JobConfig, str | None]:
    """Configuration to train with, and the URI of the checkpoint that --resume_from names, if any; rank 0 decides.

    Raises:
        ConfigError: the run directory's content was made with another configuration (see
            cherry/checkpoint/resume_rules.py).
        MissingFileError: there is no such checkpoint; or no such documents, where data has to be prepared.
    """
    import torch.distributed as dist

    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [_accept(config, run_directory, options)]
        except CherryError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], CherryError):
        raise outcome[0]
    accepted: tuple[JobConfig, str | None] = outcome[0]
    return accepted


def _accept(config: JobConfig, run_directory: str, options: argparse.Namespace) -> tuple[JobConfig, str | None]:
    """Result of `_prepare` on rank 0, after preparing data and writing config.yaml, or checking those of a flow."""
    from base.exclusive import check_exclusive
    from cherry.checkpoint import resume_rules as rules
    from cherry.checkpoint.claim import claim_checkpoints

    if options.config is not None and (file := packaged_config(options.config)) is not None:
        print(f"{options.config}: taken from the package, {file}", flush=True)
    checkpoints = rules.checkpoints_of(config, run_directory)
    check_exclusive(checkpoints)
    found, named = rules.starting_point(options.resume_from, checkpoints)
    if found is None:
        rules.check_moved(config, run_directory)
    manifest = prepared(config, run_directory)
    claim_checkpoints(config, manifest, run_directory)
    for line in rules.passed_over(checkpoints, found):
        print(line, flush=True)
    if found is not None:
        record = rules.read_record(found)
        rules.check_model(found, record, config.model.model_dump(mode="json"))
        config = _with_steps(config, record, options)
        for change in rules.check_resume(config, manifest, found, record, named=named):
            print(f"resuming from {found} with another {change}", flush=True)
    rules.write_config(config, run_directory, options.config)
    return config, found if named else None


def prepared(config: JobConfig, run_directory: str) -> Manifest:
    """Manifest of the run directory's data, which is prepared if it is not there.

    Raises:
        ConfigError: it was prepared with another configuration.
        MissingFileError, DataError, DiskFullError: see `cherry.data.prepare.prepare`.
    """
    from cherry.checkpoint.resume_rules import check_data
    from cherry.data.prepare import prepare
    from cherry.data.shards import read_manifest

    data, model = storage.join(run_directory, "data"), config.model
    if storage.is_committed(data):
        manifest = read_manifest(data)
        check_data(config, data, manifest)
        return manifest
    return prepare(
        config.data,
        vocab_size=model.vocab_size,
        directory=data,
        bos_id=model.bos_token_id,
        eos_id=model.eos_token_id,
        weights=None if config.init_from is None else weights_folder(config.init_from),
        on_progress=lambda line, _: print(line, flush=True),
    )


def _with_steps(config: JobConfig, record: dict[str, Any], options: argparse.Namespace) -> JobConfig:
    """Configuration with `train.steps` set for a resume by --resume_from that does not give the number of steps.

    Training goes to the end of the checkpoint's run or, if it is there already, as many steps on as a new run takes.
    """
    given = options.steps is not None or any(change.startswith("train.steps=") for change in options.set)
    if options.resume_from is None or options.config is not None or given:
        return config
    done, planned = int(record["step"]), int(record.get("steps", 0))
    steps = planned if planned > done else done + config.train.steps
    print(f"trains from step {done} to {steps}; set --steps to change this", flush=True)
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})


if __name__ == "__main__":
    main()
