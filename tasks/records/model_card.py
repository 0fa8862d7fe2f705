"""Model cards: what a registered version and its model are, in Markdown, as the registry's pages show them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base import storage
from base.errors import MissingFileError
from tasks.records.quantized_format import chosen_format
from tasks.run_config import SERVING_ALIAS, RegisterConfig, RunConfig

_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENSE-MODEL", "LICENCE")


@dataclass(frozen=True)
class Subject:
    """The version that a card is of."""

    number: int
    config: RunConfig
    run_directory: Path
    run_id: str | None
    """The flow's run in the tracker."""
    weights: str
    quantized: str


def version_card(of: Subject, evaluation: Mapping[str, Any]) -> str:
    """Description of a version: verdict with its reason, figures, data, how it was made, how to serve it, licence.

    Args:
        evaluation: the content of evaluation.json.
    """
    config, model = of.config, of.config.model
    started = "random weights" if config.init_from is None else f"`{config.init_from}`"
    rows = [
        ("verdict", f"**{evaluation['verdict']}** (compared with {evaluation['baseline']})"),
        ("held-out", f"{evaluation['bits_per_byte']:.4f} bits per byte{_beside(evaluation)}"),
        ("quantized", f"{chosen_format(config).name}: {evaluation['quantized_reason']}"),
        ("model", f"DeepSeek-V3 architecture, {model.parameters(with_mtp=True):,} parameters, from {started}"),
        ("training", f"{config.train.steps:,} steps, learning rate {config.train.learning_rate:g}"),
        ("data", _data(of)),
        ("run", f"`{config.name}`, MLflow run `{of.run_id}`" if of.run_id else config.name),
        ("weights", f"`{of.weights}`; quantized `{of.quantized}`"),
        ("licence", _licence(config.init_from)),
    ]
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in rows)
    return (
        f"{_sentence(evaluation['reason'])}\n\n| | |\n|---|---|\n{table}\n\n"
        f"Serve it: `cherry deploy {of.run_directory / 'config.yaml'} --model-version {of.number}`, "
        f"or the weights alone: `anything serve --model_path {of.quantized}`."
    )


def model_card(config: RegisterConfig) -> str:
    """Description of a registered model: what its aliases mean and where a version's story is."""
    return (
        f"Language models of one recipe. `{config.champion_alias}` is the best version so far: a new one takes its "
        f"place only when a paired comparison on held-out documents finds it better. `{config.candidate_alias}` is the "
        f"newest, `{SERVING_ALIAS}` the one that answers requests. Each version's description has its verdict, "
        "figures, data and how to serve it."
    )


def _beside(evaluation: Mapping[str, Any]) -> str:
    """What is told beside the headline figure, as far as an evaluation has it."""
    parts = []
    if evaluation.get("zlib_bits_per_byte") is not None:
        parts.append(f"zlib {evaluation['zlib_bits_per_byte']:.4f}")
    if evaluation.get("heldout_loss") is not None:
        parts.append(f"{evaluation['heldout_loss']:.4f} nats per token")
    if evaluation.get("documents") is not None:
        parts.append(f"{evaluation['documents']} documents")
    return f" ({', '.join(parts)})" if parts else ""


def _data(of: Subject) -> str:
    try:
        manifest = storage.read_json(str(of.run_directory / "data" / "manifest.json"))
    except MissingFileError:
        return f"`{of.config.data.source}`"
    return (
        f"`{manifest['source']}`: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, "
        f"digest `{manifest['digest'][:12]}`"
    )


def _licence(init_from: str | None) -> str:
    """What is known of the weights' licence: the file beside those they began as, if there is one."""
    rest = "the licences of the data hold too"
    if init_from is None:
        return f"none is recorded: trained from random weights, {rest}"
    if storage.is_local(init_from):
        folder = Path(storage.local_path(init_from))
        for name in _LICENCE_FILES:
            if (folder / name).is_file():
                return f"that of the initial weights, `{folder / name}`; {rest}"
    return f"that of the initial weights at `{init_from}`; {rest}"


def _sentence(text: str) -> str:
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _cell(text: str) -> str:
    """A table's cell: a bar would end it, a newline the row."""
    return text.replace("|", "\\|").replace("\n", " ")
