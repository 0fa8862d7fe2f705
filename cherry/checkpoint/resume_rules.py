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
from dataclasses import dataclass
from typing import Any

from base import storage
from base.config import dump, read_yaml
from base.errors import ConfigError, MissingFileError
from cherry.checkpoint.naming import committed_steps, step_name
from cherry.data.shards import Manifest
from cherry.job_config import JobConfig

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
    name = wanted.rstrip("/").rpartition("/")[2]
    places = [wanted]
    if wanted in (name, f"{directory.rstrip('/').rpartition('/')[2]}/{name}"):
        places.append(storage.join(directory, name))
    for place in places:
        if storage.is_committed(place):
            return place
    parents = dict.fromkeys([wanted.rstrip("/").rpartition("/")[0] or ".", directory])
    found = [storage.join(parent, step_name(step)) for parent in parents for step in committed_steps(parent)]
    raise MissingFileError(
        f"{wanted} holds no finished checkpoint. " + (f"There are: {', '.join(found)}." if found else "There is none.")
    )


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
    if named and record["step"] >= config.train.steps:
        raise ConfigError(f"{uri} is at step {record['step']}, train.steps is {config.train.steps}: raise --steps.")
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
