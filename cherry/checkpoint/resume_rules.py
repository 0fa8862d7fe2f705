"""Owns the rule by which a run directory goes on: what its data and checkpoints were made by, against the config now.

It knows nothing of how either is made. What is there binds the next start, so that nothing is ignored in silence:

- prepared data binds the `data` section, all of it that makes tokens;
- the newest checkpoint, which is taken up without being asked for, binds everything that says which run this is:
  seed, init_from, model, and the recipe in `train`;
- a checkpoint that --resume_from names binds what its weights and its data position mean: model, seed, and the
  prepared tokens themselves. All else may change, and each change is told.

How long training goes on (`train.steps`), how it fits into memory, what it reports, how it is launched, sharded and
saved binds nothing: another number of ranks goes on where the last one stopped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from base import storage
from base.config import dump, read_yaml
from base.errors import ConfigError, MissingFileError
from cherry.checkpoint.naming import committed_steps, step_name
from cherry.data.shards import Manifest
from cherry.job_config import JobConfig

# The model is compared when the checkpoint is read, the data section with what the data was prepared by.
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
    "spike_sigma",
    "max_skipped_steps",
    "on_divergence",
    "max_rollbacks",
}
# Keys of `data` that change how prepared tokens are read, not what they are: part of the recipe.
_READING = {"cross_document_attention"}
Difference = tuple[str, Any, Any]
"""A dotted key, its value before, and its value now."""


def checkpoints_of(config: JobConfig, run_directory: str) -> str:
    """URI of the directory that the run's checkpoints go to."""
    return config.checkpoint.directory or storage.join(run_directory, "train", "checkpoints")


def find_checkpoint(wanted: str, directory: str) -> str:
    """URI of the committed checkpoint that a person named. One rank only: it lists storage.

    Args:
        wanted: a path or URI; or `step_1000` or `checkpoints/step_1000`, which may also be of this run.
        directory: this run's checkpoints.

    Raises:
        MissingFileError: nothing is committed there; the text names what is.
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
    """What a checkpoint's record keeps of the run that wrote it; `check_resume` compares it."""
    sections = {key: value for key, value in config.model_dump(mode="json").items() if key not in _NOT_BINDING}
    sections["train"] = {key: value for key, value in sections["train"].items() if key not in _NOT_RECIPE}
    sections["data"] = {key: getattr(config.data, key) for key in sorted(_READING)}
    return {"seed": config.seed, "prepared": _prepared(manifest), "recipe": sections}


def _prepared(manifest: Manifest) -> dict[str, Any]:
    """The prepared tokens, wherever their documents came from."""
    return {
        "digest": manifest.digest,
        "sequence_length": manifest.sequence_length,
        "vocab_size": manifest.vocab_size,
        "tokens": manifest.tokens,
    }


def check_data(config: JobConfig, directory: str, manifest: Manifest) -> None:
    """Refuse prepared data that another `data` section made.

    Raises:
        ConfigError: names the keys that differ.
    """
    made_by = storage.read_commit(directory).get("config", {})
    made_by = {"source": manifest.source, "sequence_length": manifest.sequence_length, **made_by}
    now = config.data.model_dump(mode="json", exclude=_READING)
    if wrong := _differences({k: v for k, v in made_by.items() if k not in _READING}, now, "data."):
        raise ConfigError(
            f"{directory} was prepared by another configuration. Give another --run_dir, or remove that folder to "
            "prepare it anew. It was made with:\n" + _told(wrong)
        )


def check_resume(
    config: JobConfig, manifest: Manifest, uri: str, record: Mapping[str, Any], *, named: bool
) -> list[str]:
    """What changes when training goes on from the checkpoint at `uri`, a line each.

    Args:
        record: what its commit says.
        named: whether --resume_from named it; else it is the newest one, found in the run directory.

    Raises:
        ConfigError: it is of another run, with the keys that differ; or a named one leaves nothing to train.
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
        way = "" if other else f", or --resume_from={uri} to go on from there with the new values"
        raise ConfigError(
            f"{uri} is of another run. Give another --run_dir for a run of its own{way}. It was made with:\n"
            + _told(other + changed)
        )
    return [f"{key}: {before!r} before, {after!r} now" for key, before, after in changed]


def _told(differences: list[Difference]) -> str:
    return "\n".join(f"  {key}: {before!r}, not {after!r}" for key, before, after in differences)


def _differences(made: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[Difference]:
    """Keys of both with other values; one that only one side has is of another version of this code."""
    found: list[Difference] = []
    for key in sorted(made.keys() & now.keys()):
        if isinstance(made[key], Mapping) and isinstance(now[key], Mapping):
            found += _differences(made[key], now[key], f"{prefix}{key}.")
        elif made[key] != now[key]:
            found.append((f"{prefix}{key}", made[key], now[key]))
    return found


def write_config(config: JobConfig, run_directory: str, given: str | None) -> None:
    """Write config.yaml, unless it is the file that was `given`, or a flow's, which has more sections."""
    path = os.path.join(storage.local_path(run_directory), "config.yaml")
    if os.path.exists(path):
        is_given = given is not None and os.path.realpath(given) == os.path.realpath(path)
        if is_given or not read_yaml(path).keys() <= JobConfig.model_fields.keys():
            return
    storage.write_bytes(path, dump(config).encode())
