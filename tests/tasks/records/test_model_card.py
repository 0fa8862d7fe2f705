"""A version's card tells its whole story in Markdown, whatever the texts hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from base import storage
from tasks.overrides import resolve
from tasks.records.model_card import Subject, model_card, version_card
from tasks.run_config import RegisterConfig

EVALUATION: dict[str, Any] = {
    "verdict": "better",
    "reason": "the candidate's loss is 0.1470 nats per token lower",
    "baseline": "net v1",
    "bits_per_byte": 2.93,
    "zlib_bits_per_byte": 2.4,
    "heldout_loss": 5.7,
    "documents": 24,
    "quantized_reason": "costs a | b\nand more",
}


def card(folder: Path, **changes: object) -> str:
    config = resolve("configs/tiny.yaml", {"name": "mine", **changes})
    of = Subject(2, config, folder / "mine", "f" * 32, "/runs/mine/export", "/runs/mine/quantized")
    return version_card(of, EVALUATION)


def test_verdict_figures_data_and_how_to_serve(tmp_path: Path) -> None:
    manifest = {"source": "/corpus", "documents": 1758, "tokens": 10_134_517, "digest": "abcdef" * 10}
    storage.write_json(str(tmp_path / "mine" / "data" / "manifest.json"), manifest)
    text = card(tmp_path)
    assert text.startswith("The candidate's loss is 0.1470 nats per token lower.\n")
    for told in (
        "**better** (compared with net v1)",
        "2.9300 bits per byte (zlib 2.4000, 5.7000 nats per token, 24 documents)",
        "`/corpus`: 1,758 documents, 10,134,517 tokens, digest `abcdefabcdef`",
        f"cherry deploy {tmp_path}/mine/config.yaml --model-version 2",
        "anything serve --model_path /runs/mine/quantized",
        f"MLflow run `{'f' * 32}`",
    ):
        assert told in text


def test_a_cell_ends_neither_its_column_nor_its_row(tmp_path: Path) -> None:
    (row,) = [line for line in card(tmp_path).splitlines() if line.startswith("| quantized")]
    assert row.endswith("costs a \\| b and more |")


@pytest.mark.parametrize("name", ["LICENSE", "LICENSE-MODEL", None])
def test_the_licence_is_that_of_the_weights_it_began_as(name: str | None, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    if name is not None:
        (weights / name).write_text("Some licence")
    told = f"that of the initial weights, `{weights / name}`" if name else f"that of the initial weights at `{weights}`"
    assert told in card(tmp_path, init_from=str(weights))
    assert "trained from random weights" in card(tmp_path)


def test_the_models_page_tells_what_its_aliases_mean() -> None:
    text = model_card(RegisterConfig(champion_alias="best", candidate_alias="new"))
    assert "`best` is the best version so far" in text and "`new` is the newest, `serving`" in text
