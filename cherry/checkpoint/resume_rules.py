"""Resume rules: which configuration may continue from the prepared data and checkpoints in a run directory.

No changed value is ignored silently:

- prepared data fixes the keys of the `data` section that determine its tokens;
- the newest checkpoint, which is resumed by default, fixes what identifies the run: seed, init_from, model, and the
  recipe in `train`;
- a checkpoint named by --resume_from fixes model, seed and the prepared tokens, which its weights and data position
  refer to. Everything else may change, and each change is printed.

Duration (`train.steps`), memory savings, reports, launching, sharding and saving may always change: a run resumes on
another number of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from base import storage
from base.config import dump
from base.errors import CheckpointError, ConfigError, MissingFileError
from base.yaml_config import read_yaml
from cherry.checkpoint.naming import committed_steps, newest_checkpoint, step_name, step_of, unreadable_checkpoints
from cherry.data.shards import Manifest
from cherry.job_config import JobConfig
from cherry.optim.build import learning_rate
from cherry.train_config import TrainConfig

# The model is compared when the checkpoint is loaded, and the data section with that of the prepared data.
_NOT_BINDING = {"name", "seed", "model", "data", "parallel", "communication", "checkpoint", "launch"}
_NOT_RECIPE = {
    "steps",
    "gradient_accumulation_steps",
    "activation_checkpointing",
    "compile",
    "loss_chunk_tokens",
    "log_every_steps",
    "evaluate_every_steps",
    "heldout_sequences",
    "threads_per_rank",
    "deterministic",
    "profile",
    "spike_sigma",
    "max_skipped_steps",
    "on_divergence",
    "max_rollbacks",
}
# A preset's name and the scale of initial weights do not matter to a run that resumes.
_NOT_ARCHITECTURE = {"preset", "initializer_range"}
# Keys of `data` that change how prepared tokens are used, not which they are: part of the recipe.
_READING = {"cross_document_attention"}
Difference = tuple[str, Any, Any]
"""Dotted key, stored value, configured value."""


@dataclass
class Progress:
    """Counters that a checkpoint keeps, beside the step guard's state."""

    step: int = 0
    """Optimizer steps, skipped ones included."""
    position: int = 0
    """Sequences read so far, over all ranks: where the next batch begins. It is not `step` times the batch size, which
    may change on a resume; after a rollback, data that was read before it is not read again."""
    tokens: int = 0
    """Tokens of the steps that were not skipped."""
    seconds: float = 0.0
    """Time spent in optimizer steps."""
    rollbacks: int = 0
    resumed_from: str | None = None
    """Checkpoint that --resume_from named when this training began, in the spelling of `settled`."""
    changes: list[str] = field(default_factory=list)
    """What resumes changed in the course of the run, a line each, oldest first."""

    def add_step(self, *, sequences: int, tokens: int, seconds: float) -> None:
        """Count a step that was taken, or skipped, of which no tokens count."""
        self.step += 1
        self.position += sequences
        self.tokens += tokens
        self.seconds += seconds


def checkpoints_of(config: JobConfig, run_directory: str) -> str:
    """URI of the directory of the run's checkpoints."""
    return config.checkpoint.directory or storage.join(run_directory, "train", "checkpoints")


def find_checkpoint(wanted: str, directory: str) -> str:
    """URI of the committed checkpoint that --resume_from names. It lists storage: call it on one rank only.

    Args:
        wanted: a path or URI; `step_1000` and `checkpoints/step_1000` are also looked up in `directory`.
        directory: of this run's checkpoints.

    Raises:
        MissingFileError: no checkpoint is committed there; the text lists those that are.
    """
    for place in _places(wanted, directory):
        if storage.is_committed(place):
            return place
    parents = dict.fromkeys([wanted.rstrip("/").rpartition("/")[0] or ".", directory])
    found = [storage.join(parent, step_name(step)) for parent in parents for step in committed_steps(parent)]
    raise MissingFileError(
        f"{wanted} holds no finished checkpoint. " + (f"There are: {', '.join(found)}." if found else "There is none.")
    )


def _places(wanted: str, directory: str) -> list[str]:
    """URIs that --resume_from may mean, however it is written: a shell completes a folder with a slash at its end."""
    given = wanted.rstrip("/") or "."
    plain = os.path.normpath(storage.local_path(given)) if storage.is_local(given) else given
    name = plain.rpartition("/")[2]
    is_own = plain in (name, f"{directory.rstrip('/').rpartition('/')[2]}/{name}")
    return [given, storage.join(directory, name)] if is_own else [given]


def starting_point(wanted: str | None, directory: str) -> tuple[str | None, bool]:
    """URI of the checkpoint to resume from, if there is any, and whether --resume_from names it.

    Training from an older checkpoint would write the steps after it again, so it needs a directory of its own. A
    command that named one and was interrupted goes on from what it has saved since. It lists storage: call it on one
    rank only.

    Args:
        wanted: what --resume_from names; `None` is the newest.
        directory: of this run's checkpoints.

    Raises:
        MissingFileError: no checkpoint is committed where `wanted` says.
        ConfigError: later steps are committed in `directory`, by training that did not begin from `wanted`.
    """
    newest = newest_checkpoint(directory)
    if wanted is None:
        return newest, False
    began = None if newest is None else read_record(newest).get("resumed_from")
    if began in [settled(place) for place in _places(wanted, directory)]:
        return newest, False
    named = find_checkpoint(wanted, directory)
    done = read_record(named)["step"]
    if later := [step_name(step) for step in committed_steps(directory) if step > done]:
        raise ConfigError(
            f"--resume_from {wanted}: {directory} holds later steps ({', '.join(later)}), which training from "
            f"{step_name(done)} would write again. Give the branch a directory of its own (--run_dir=... "
            f"--resume_from={named}), leave --resume_from out to go on from {newest}, or move the later steps to "
            "another folder."
        )
    return named, True


def check_moved(config: JobConfig, run_directory: str) -> None:
    """Check that a run which has no checkpoint in its directory has none in the one that it was configured with before.

    Raises:
        ConfigError: it has; training would begin anew, and write over its metrics and result.
    """
    path = os.path.join(storage.local_path(run_directory), "config.yaml")
    written = read_yaml(path).get("checkpoint") if os.path.exists(path) else None
    before = written.get("directory") if isinstance(written, dict) else None
    default, now = storage.join(run_directory, "train", "checkpoints"), checkpoints_of(config, run_directory)
    for directory in (before, default):
        if isinstance(directory, str) and settled(directory) != settled(now) and (steps := committed_steps(directory)):
            raise ConfigError(
                f"{run_directory} has its checkpoints in {directory} (up to {step_name(steps[-1])}), and "
                f"checkpoint.directory is {now} now, which holds none. To go on, move them there or set "
                "checkpoint.directory back; give another --run_dir to begin anew."
            )


def settled(uri: str) -> str:
    """URI of a checkpoint in one spelling, whatever links and relative parts it is written with."""
    return os.path.realpath(storage.local_path(uri)) if storage.is_local(uri) else uri.rstrip("/")


def read_record(uri: str) -> dict[str, Any]:
    """Record of a committed checkpoint.

    Raises:
        MissingFileError: it was never committed, or its marker is empty or cut short.
        CheckpointError: its marker holds something else than a checkpoint's record.
    """
    record = storage.read_commit(uri)
    if not isinstance(record.get("step"), int):
        raise CheckpointError(
            f"{storage.join(uri, storage.MARKER)}: `step` must be a number (got {record.get('step')!r}). Move this "
            "checkpoint to another folder to resume from the one before it."
        )
    return record


def passed_over(directory: str, start: str | None) -> list[str]:
    """Lines about checkpoints later than `start` whose markers are empty or cut short, so that they do not count."""
    done = (step_of(start) if start is not None else None) or 0
    return [
        f"{uri} is passed over: its {storage.MARKER} file is empty or cut short, as a power cut, a full disk or a copy "
        f"leaves it. Training goes on from {start or 'the beginning'}"
        for uri in unreadable_checkpoints(directory)
        if (step_of(uri) or 0) > done
    ]


def identity(config: JobConfig, manifest: Manifest) -> dict[str, Any]:
    """Seed, prepared data and recipe of a run, for its checkpoints' records; `check_resume` compares them."""
    sections = {key: value for key, value in config.model_dump(mode="json").items() if key not in _NOT_BINDING}
    sections["train"] = {key: value for key, value in sections["train"].items() if key not in _NOT_RECIPE}
    sections["data"] = {key: getattr(config.data, key) for key in sorted(_READING)}
    return {"seed": config.seed, "prepared": _prepared(manifest), "recipe": sections}


def _prepared(manifest: Manifest) -> dict[str, Any]:
    """Identity of the prepared tokens, independent of where their documents are."""
    return {
        "digest": manifest.digest,
        "sequence_length": manifest.sequence_length,
        "vocab_size": manifest.vocab_size,
        "tokens": manifest.tokens,
    }


def check_data(config: JobConfig, directory: str, manifest: Manifest) -> None:
    """Check that data was prepared with the configured `data` section.

    Raises:
        ConfigError: lists the keys that differ.
    """
    made_by = storage.read_commit(directory).get("config", {})
    made_by = {"source": manifest.source, "sequence_length": manifest.sequence_length, **made_by}
    now = config.data.model_dump(mode="json", exclude=_READING)
    if wrong := _differences({k: v for k, v in made_by.items() if k not in _READING}, now, "data."):
        raise ConfigError(
            f"{directory} was prepared with another configuration. Give another --run_dir, or remove that folder to "
            "prepare it again. It was made with:\n" + _listed(wrong)
        )


def check_model(uri: str, record: dict[str, Any], expected: dict[str, Any] | None) -> None:
    """Check that the architecture in a checkpoint's record is the configured one.

    Raises:
        CheckpointError: names the keys that differ.
    """
    if expected is None or "model" not in record:
        return
    stored = record["model"]
    wrong = [
        f"  model.{key}: the checkpoint has {stored.get(key)!r}, the config {expected.get(key)!r}"
        for key in sorted(stored.keys() | expected.keys())
        if key not in _NOT_ARCHITECTURE and stored.get(key) != expected.get(key)
    ]
    if wrong:
        raise CheckpointError(
            f"{uri} is of another model:\n" + "\n".join(wrong) + "\nResume with the config it was made with, or start "
            "in another run directory."
        )


def check_resume(
    config: JobConfig, manifest: Manifest, uri: str, record: Mapping[str, Any], *, named: bool
) -> list[str]:
    """Lines that describe what changes when training resumes from the checkpoint at `uri`.

    Args:
        record: the checkpoint's commit record.
        named: True if --resume_from named the checkpoint, False if it is the newest one in the run directory.

    Raises:
        ConfigError: it belongs to another run (lists the keys that differ), or is not before `train.steps`.
    """
    done, steps = record["step"], config.train.steps
    if done > steps or (named and done == steps):
        raise ConfigError(
            f"{uri} is at step {done}, train.steps is {steps}: nothing is left to train, and what is done stays as it "
            f"is. Raise --steps above {done}, or give another --run_dir to train {steps} steps only."
        )
    now = identity(config, manifest)
    made_by = record.get("recipe", {}).get("train", {}).get("optimizer", "adamw")  # before there was a choice
    if made_by != config.train.optimizer:
        raise ConfigError(
            f"{uri} has the states of train.optimizer {made_by}, not of {config.train.optimizer}. Resume with "
            f"train.optimizer={made_by}, or start a new run from its exported weights (init_from)."
        )
    other = _differences({"seed": record.get("seed", config.seed)}, now)
    other += _differences(record.get("prepared", {}), now["prepared"], "prepared data's ")
    changed = _differences(record.get("recipe", {}), now["recipe"])
    if other or (changed and not named):
        way = "" if other else f", or --resume_from={uri} to continue from there with the new values"
        raise ConfigError(
            f"{uri} is of another run. Give another --run_dir for a run of its own{way}. It was made with:\n"
            + _listed(other + changed)
        )
    return [f"{key}: {before!r} before, {after!r} now" for key, before, after in changed]


def rate_change(train: TrainConfig, record: Mapping[str, Any]) -> str | None:
    """Line that says how another `train.steps` moves the learning rate; `None` where the next step's rate stays.

    Args:
        record: the commit record of the checkpoint that training resumes from.
    """
    done, planned = int(record["step"]), record.get("steps")
    if not isinstance(planned, int) or planned == train.steps or done >= train.steps:
        return None
    last, rate = (learning_rate(train.model_copy(update={"steps": planned}), step) for step in (done - 1, done))
    now = learning_rate(train, done)
    if now == rate:
        return None
    return (
        f"train.steps: {planned} before, {train.steps} now; the {train.schedule} schedule covers them all, so the "
        f"learning rate is {now:.3g} at step {done + 1} (it was {last:.3g} at step {done}, and {rate:.3g} would follow "
        f"with {planned} steps)"
    )


def _listed(differences: list[Difference]) -> str:
    return "\n".join(f"  {key}: {before!r}, not {after!r}" for key, before, after in differences)


def _differences(made: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[Difference]:
    """Keys with different values, among those on both sides; others are of another version of this code."""
    found: list[Difference] = []
    for key in sorted(made.keys() & now.keys()):
        if isinstance(made[key], Mapping) and isinstance(now[key], Mapping):
            found += _differences(made[key], now[key], f"{prefix}{key}.")
        elif made[key] != now[key]:
            found.append((f"{prefix}{key}", made[key], now[key]))
    return found


def write_config(config: JobConfig, run_directory: str, given: str | None) -> None:
    """Write config.yaml, unless it is the file `given` by --config, or a flow's, which has more sections."""
    path = os.path.join(storage.local_path(run_directory), "config.yaml")
    if os.path.exists(path):
        is_given = given is not None and os.path.realpath(given) == os.path.realpath(path)
        if is_given or not read_yaml(path).keys() <= JobConfig.model_fields.keys():
            return
    storage.write_bytes(path, dump(config).encode())
