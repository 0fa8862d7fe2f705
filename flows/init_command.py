"""`cherry init`: a commented config and cluster file to start from, with the keys' descriptions as comments."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from base.config import Section
from base.errors import InvalidInputError, storage_errors
from cherry.cluster import ClusterSpec
from flows.schema_command import SCHEMA_FILE, schema_text
from tasks.run_config import RunConfig

CONFIG_FILE = "run.yaml"
CLUSTER_FILE = "cluster.yaml"
_COLUMNS = 110
# Some minutes on a laptop; figures as in configs/tiny.yaml, with fewer steps.
_RUN: dict[str, Any] = {
    "name": "mine",
    "seed": 0,
    "init_from": None,
    "runs_directory": "runs",
    "cluster": CLUSTER_FILE,
    "model": {"preset": "tiny", "initializer_range": 0.05},
    "data": {
        "source": "python-stdlib",
        "format": "auto",
        "text_key": "text",
        "tokenizer": None,
        "sequence_length": 256,
        "heldout_fraction": 0.05,
    },
    "train": {
        "steps": 300,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 5e-3,
        "min_learning_rate_ratio": 0.02,
        "warmup_steps": 20,
        "spike_sigma": None,
        "precision": "fp32",
        "activation_checkpointing": "none",
        "evaluate_every_steps": 100,
    },
    "parallel": {"replicate": 1, "shard": None, "expert": 1, "context": 1},
    "launch": {"nproc_per_node": 1, "nnodes": 1, "master_port": None},
    "checkpoint": {"every_steps": 100, "keep_last": 2, "directory": None},
    "evaluate": {"documents": 64, "max_document_tokens": 1024},
    "register_model": {"model_name": "mine"},
    "deploy": {"artifact": "quantized", "traffic_steps_percent": [25, 100]},
    "tracking": {"uri": None, "experiment": "cherry"},
}
_CLUSTER: dict[str, Any] = {"kind": "local", "slots": None}
_NODES: dict[str, Any] = {"kind": "nodes", "gpu": "H100", "nodes": 4, "gpus_per_node": 8, "price_per_gpu_hour": 2.5}


def init(directory: Path) -> list[Path]:
    """Write run.yaml, cluster.yaml and schema.json into `directory`, which is made, and return their paths.

    Raises:
        InvalidInputError: one of the files exists; nothing has been written.
        StorageError: the directory cannot be written.
    """
    path = directory / CONFIG_FILE
    run = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        *_comment(f"A run of your own. To plan it: cherry plan {path}. To start it: cherry run {path}."),
        *_comment("Keys that are not here keep their defaults; `cherry schema` prints all of them."),
        *_lines(_RUN | {"cluster": str(directory / CLUSTER_FILE)}, RunConfig),
    ]
    cluster = [
        *_comment("The cluster of a run: this machine."),
        *_lines(_CLUSTER, ClusterSpec),
        *_comment("To plan for GPU nodes, use these keys instead:"),
        *(f"# {line}" for line in yaml.safe_dump(_NODES, sort_keys=False).splitlines()),
    ]
    texts = {
        CONFIG_FILE: "\n".join(run) + "\n",
        CLUSTER_FILE: "\n".join(cluster) + "\n",
        SCHEMA_FILE: schema_text(),
    }
    paths = {directory / name: text for name, text in texts.items()}
    if existing := [str(path) for path in paths if path.exists()]:
        raise InvalidInputError(f"{', '.join(existing)}: cherry init overwrites nothing. Give another directory.")
    with storage_errors(str(directory)):
        directory.mkdir(parents=True, exist_ok=True)
        for path, text in paths.items():
            path.write_text(text, encoding="utf-8")
    return list(paths)


def _lines(values: Mapping[str, Any], section: type[Section], indent: str = "") -> Iterator[str]:
    """YAML lines of `values`, each key below its description."""
    for key, value in values.items():
        field = section.model_fields[key]
        if isinstance(value, Mapping):
            inner = field.annotation
            assert isinstance(inner, type) and issubclass(inner, Section)
            yield ""
            yield from _comment((inner.__doc__ or "").split("\n\n")[0], indent)
            yield f"{indent}{key}:"
            yield from _lines(value, inner, f"{indent}  ")
        else:
            yield from _comment(field.description or "", indent)
            flow = None if isinstance(value, list) else False  # a list in one line
            dumped = yaml.safe_dump({key: value}, default_flow_style=flow, allow_unicode=True)
            yield indent + dumped.rstrip("\n")


def _comment(text: str, indent: str = "") -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text, _COLUMNS - len(indent), break_on_hyphens=False)]
