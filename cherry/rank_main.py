"""Owns what `train.py` does on each rank: flags into a resolved config, the process group, and the exit code.

It knows nothing of the loop itself.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from base import storage
from base.config import load, validate
from base.errors import (
    ArgumentParser,
    CherryError,
    ConfigError,
    InvalidInputError,
    WorkerLostError,
    error_record,
    run_program,
    storage_errors,
)
from cherry.job_config import JobConfig
from cherry.launcher import LAUNCHER_PID, RECORD_KEY, die_with_parent

logger = logging.getLogger(__name__)

_FLAGS = {
    "batch_size": "train.batch_size",
    "learning_rate": "train.learning_rate",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "steps": "train.steps",
}


def build_parser() -> ArgumentParser:
    """The flags of train.py."""
    parser = ArgumentParser(prog="train.py", description="Train one model; start it with cherry-launch.")
    parser.add_argument("--config", help="a resolved config, or one of configs/*.yaml")
    parser.add_argument("--run_dir", help="the run directory (default: runs/<name>)")
    parser.add_argument("--model_path", help="weights to start from: a Hugging Face folder or URI, or a .pt file")
    parser.add_argument("--resume_from", help="a checkpoint, like checkpoints/step_1000 (default: the newest one)")
    parser.add_argument("--batch_size", type=int, help="sequences per optimizer step, over all ranks")
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--gradient_accumulation_steps", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="any key of the config, dotted")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one rank; ends the process with the error's exit code."""
    if launcher := os.environ.get(LAUNCHER_PID):
        die_with_parent(signal.SIGKILL, int(launcher))  # a launcher that is killed outright leaves no rank behind
    logging.raiseExceptions = False  # a log on a full disk is no reason for tracebacks
    logging.getLogger().addHandler(logging.NullHandler())  # before there is a log file, stderr is for the error's text
    code = run_program(lambda: _run(arguments))
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not SystemExit. After an error other ranks may be inside a collective, and torn-down threads would wait for them;
    # after success a thread that is still inside torch when Python ends takes the process with it (SIGABRT, rarely).
    os._exit(code)


def _run(arguments: Sequence[str] | None) -> None:
    """Train. An error of ours is printed once: rank 0's here, another rank's by the launcher if it is the cause."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        _train(build_parser().parse_args(arguments), rank)
    except CherryError as error:
        logger.error("%s", error, exc_info=error.__cause__)
        _write_for_launcher(error)
        if rank == 0:
            raise
        os._exit(error.exit_code)


def _write_for_launcher(error: CherryError) -> None:
    """Write the error where torch's launcher looks for it (torch.distributed.elastic.multiprocessing.errors)."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        detail = {"py_callstack": "", "timestamp": str(int(time.time()))}
        record = {"message": {"message": str(error), "extraInfo": detail}, RECORD_KEY: error_record(error)}
        try:
            Path(path).write_text(json.dumps(record))
        except OSError:  # a full disk: the exit code is left, and half a record would be an error of its own
            with suppress(OSError):
                Path(path).unlink(missing_ok=True)


def resolve(options: argparse.Namespace) -> JobConfig:
    """The job that the flags describe.

    Raises:
        ConfigError: lists every broken rule.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    overrides = [
        f"{key}={getattr(options, flag)}" for flag, key in _FLAGS.items() if getattr(options, flag) is not None
    ]
    overrides += [f"launch.nproc_per_node={local}", f"launch.nnodes={world // local}"]
    if world > local:
        overrides.append(f"launch.master_port={os.environ['MASTER_PORT']}")
    if options.model_path is not None:
        overrides.append(f"init_from={json.dumps(options.model_path)}")
    overrides += options.set
    if options.config is not None:
        return load(options.config, JobConfig, overrides, part_of_file=True)
    if options.model_path is None:
        raise ConfigError(
            "train.py needs --config, or --model_path of a folder whose config.json gives the architecture"
        )
    return _from_model_path(options.model_path, overrides)


def _from_model_path(path: str, overrides: list[str]) -> JobConfig:
    """A job around given weights: architecture and tokenizer from their folder, everything else by default."""
    from base.config import apply_overrides
    from model.weights.pretrained import read_model_config

    folder = (path.rpartition("/")[0] or ".") if path.endswith(".pt") else path
    model, _ = read_model_config(folder)
    raw: dict[str, Any] = {"name": "train", "model": model.model_dump(mode="json", exclude={"preset"})}
    tokenizer = storage.join(folder, "tokenizer.json")
    if storage.exists(tokenizer):
        raw["data"] = {"tokenizer": tokenizer}
    return validate(apply_overrides(raw, overrides), JobConfig, origin=f"flags with --model_path={path}")


def _train(options: argparse.Namespace, rank: int) -> None:
    config = resolve(options)
    run_directory = options.run_dir or f"runs/{config.name}"
    _log_to_file(run_directory, rank)
    for name, value in config.communication.variables().items():
        os.environ.setdefault(name, value)  # the libraries read it when they connect
    import torch
    import torch.distributed as dist

    if config.train.threads_per_rank is not None:
        torch.set_num_threads(config.train.threads_per_rank)  # else torch takes the launcher's OMP_NUM_THREADS
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        seconds = config.communication.timeout_s
        timeout = None if seconds is None else timedelta(seconds=seconds)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)
        config, resume_from = _prepare(config, run_directory, options)
        from cherry.trainer import Trainer

        Trainer(config, run_directory, resume_from=resume_from).run()
        dist.destroy_process_group()
    except RuntimeError as error:
        if (told := _side_of(error)) is error:
            raise
        raise told from error


def _side_of(error: RuntimeError) -> Exception:
    """Whose fault an error of torch is; what is neither's, a bug, stays as it is."""
    import torch
    import torch.distributed as dist

    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        return InvalidInputError(
            f"{first} Raise train.gradient_accumulation_steps, set train.activation_checkpointing to full, lower "
            "train.loss_chunk_tokens, or shard over more ranks. What was committed is whole."
        )
    # gloo has no error type of its own, but its messages begin with the path of its source.
    if isinstance(error, dist.DistError) or "gloo/" in str(error):
        return WorkerLostError(f"the connection to another rank broke: {first}. Start the same command again to go on.")
    if isinstance(error, torch.AcceleratorError):
        return WorkerLostError(f"the GPU failed: {first}. Start the same command again to go on.")
    return error


def _prepare(config: JobConfig, run_directory: str, options: argparse.Namespace) -> tuple[JobConfig, str | None]:
    """Rank 0 sees to it that the run can go on; as every rank hears: the config to train by, and the checkpoint that
    was asked for, if any was.

    Raises:
        ConfigError: what is in the run directory was made by another configuration (see
        cherry/checkpoint/resume_rules.py).
        MissingFileError: no such checkpoint; or no such documents, of data that is not prepared yet.
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
    """Prepare data and config.yaml as far as no flow did, and see that what is there belongs to this run."""
    from cherry.checkpoint.checkpointer import check_model
    from cherry.checkpoint.naming import newest_checkpoint
    from cherry.checkpoint.resume_rules import check_data, check_resume, checkpoints_of, find_checkpoint, write_config
    from cherry.data.prepare import prepare
    from cherry.data.shards import read_manifest

    checkpoints = checkpoints_of(config, run_directory)
    named = None if options.resume_from is None else find_checkpoint(options.resume_from, checkpoints)
    data, model = storage.join(run_directory, "data"), config.model
    if storage.is_committed(data):
        manifest = read_manifest(data)
        check_data(config, data, manifest)
    else:
        manifest = prepare(
            config.data,
            vocab_size=model.vocab_size,
            directory=data,
            bos_id=model.bos_token_id,
            eos_id=model.eos_token_id,
            on_progress=lambda line, _: print(line, flush=True),
        )
    if found := named or newest_checkpoint(checkpoints):
        record = storage.read_commit(found)
        check_model(found, record, model.model_dump(mode="json"))
        config = _with_steps(config, record, options)
        for change in check_resume(config, manifest, found, record, named=named is not None):
            print(f"goes on from {found} with another {change}", flush=True)
    write_config(config, run_directory, options.config)
    return config, named


def _with_steps(config: JobConfig, record: dict[str, Any], options: argparse.Namespace) -> JobConfig:
    """The config of a resume that was asked for without a word on steps: to the end of the run that the checkpoint is
    of, or as many steps more as a new run takes where it was the end.
    """
    given = options.steps is not None or any(change.startswith("train.steps=") for change in options.set)
    if options.resume_from is None or options.config is not None or given:
        return config
    done, planned = int(record["step"]), int(record.get("steps", 0))
    steps = planned if planned > done else done + config.train.steps
    print(f"trains from step {done} to {steps}; --steps says otherwise", flush=True)
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})


def _log_to_file(run_directory: str, rank: int) -> None:
    directory = Path(storage.local_path(run_directory)) / "train"
    with storage_errors(str(directory)):
        directory.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(directory / f"rank-{rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("cherry").setLevel(logging.INFO)
