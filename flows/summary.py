"""Owns the summary of a finished run: the figures that a person asks for first, read from the run directory.

It knows the files that the steps leave behind, and neither Prefect nor MLflow.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from base import storage
from base.errors import MissingFileError

STEPS = ("provision", "data", "train", "export", "quantize", "evaluate", "register", "deploy")


def read_summary(run_directory: Path) -> dict[str, Any]:
    """The headline figures of a run whose training flow finished.

    Raises:
        MissingFileError: a step has not finished; the text names the file that it would have written.
    """

    def read(name: str) -> Any:
        path = run_directory / name
        if not path.exists():
            raise MissingFileError(f"{path} does not exist: the run has not finished. `cherry status` shows how far it is.")
        return storage.read_json(str(path))

    train, manifest = read("train/result.json"), read("data/manifest.json")
    evaluation, quantization = read("evaluate/evaluation.json"), read("quantized/quantization.json")
    steps = {step: record for step in STEPS if (record := _step(run_directory, step)) is not None}
    return {
        "name": run_directory.name,
        "loss_first": train["loss_first"],
        "loss_last": train["loss_last"],
        "heldout_bits_per_byte": train["heldout_bits_per_byte"],
        "zlib_bits_per_byte": manifest["heldout"]["zlib_bits_per_byte"],
        "tokens": train["tokens"],
        "parameters": train["parameters"],
        "quantized_bytes_ratio": quantization["bytes_after"] / quantization["bytes_before"],
        "quantized_dnll": evaluation["quantized_dnll"],
        "verdict": evaluation["verdict"],
        "compared_with": evaluation["baseline"],
        "mlflow_run_id": steps["register"].get("mlflow_parent_run_id"),
        "seconds": {step: record["seconds"] for step, record in steps.items()},
    }


def _step(run_directory: Path, step: str) -> dict[str, Any] | None:
    path = run_directory / "steps" / f"{step}.json"
    record: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return record
