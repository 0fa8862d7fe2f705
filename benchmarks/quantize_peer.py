"""llm-compressor beside our methods: it runs in an environment of its own, and the folder it writes is scored by ours.

benchmarks/llm_compressor.py is the program that runs there. Here are the tokens that it is given, and the reader of
what it writes: compressed-tensors' "pack-quantized" int4 with group scales, dequantized into our own model, since
transformers' loader of quantized experts is not what is measured.

Shapes: N token of all windows, W window, S calibration sequence, T position.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.errors import WeightsError
from model.calibration.int4_weight import Int4Weight
from model.calibration.results import Result
from model.numerics.formats import is_projection
from model.numerics.int4_groups import unpack
from model.weights.reader import WeightsReader
from model.weights.safetensors_file import write_file

PROGRAM = Path(__file__).with_name("llm_compressor.py")
# Its defaults but for what is named. Ours calibrate a routed expert with the tokens that are routed to it; by default
# llm-compressor gives every expert all tokens.
PEERS: dict[str, dict[str, Any]] = {
    "llm-compressor gptq": {"method": "gptq", "all_experts": True, "dtype": "bfloat16"},
    "llm-compressor gptq, routed tokens": {"method": "gptq", "all_experts": False, "dtype": "bfloat16"},
    "llm-compressor gptq, routed tokens, fp32": {"method": "gptq", "all_experts": False, "dtype": "float32"},
    "llm-compressor awq": {"method": "awq", "all_experts": True, "dtype": "bfloat16"},
}
# Difference of held-out losses, in nats, up to which two programs have the same model. transformers in bf16 and ours
# in fp32 differ by 1e-4 on the tiny model, plain and quantized (2026-11-30).
SAME_LOSS = 1e-3

Window = tuple[Tensor, Tensor, Tensor]
"""Tokens [T], the tokens that follow them [T], and which of those are scored [T]."""


def write_tokens(path: Path, calibration: Sequence[Tensor], heldout: Iterable[Window]) -> None:
    """Write the calibration sequences, all of one length, and the held-out windows for the other environment."""
    tokens, targets, scored = zip(*heldout, strict=True)
    arrays = {
        "calibration_ST": torch.stack(list(calibration)).long(),
        "tokens_N": torch.cat(tokens).long(),
        "targets_N": torch.cat(targets).long(),
        "scored_N": torch.cat(scored).to(torch.uint8),
        "lengths_W": torch.tensor([len(one) for one in tokens]),
    }
    write_file(str(path), arrays)


def run_peer(python: Path, export: Path, tokens: Path, target: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Report of llm-compressor's program, which wrote its folder to `target`.

    Raises:
        SystemExit: it failed; its output is on stderr.
    """
    report = target.with_suffix(".json")
    command = [str(python), "-P", str(PROGRAM), "--export", str(export), "--tokens", str(tokens)]
    command += ["--target", str(target), "--report", str(report), "--settings", json.dumps(settings)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{ended.stderr[-4000:]}\n{python} {PROGRAM.name} ended with {ended.returncode}: see above")
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def require_same(what: str, theirs: float, ours: float) -> None:
    """Refuse a comparison of two different models.

    Raises:
        SystemExit: held-out losses differ by more than rounding of activations explains.
    """
    if not abs(theirs - ours) <= SAME_LOSS:
        raise SystemExit(
            f"the held-out loss of {what} is {theirs:.5f} in llm-compressor's program and {ours:.5f} here: they must "
            f"be within {SAME_LOSS}, else the rows would not be of one model"
        )


def read_packed(folder: Path, group: int) -> Iterator[tuple[str, Result]]:
    """Weights of a folder by released name: packed int4 ones, and the plain rest as stored.

    Args:
        group: input channels that share a scale; a narrower row has one scale.

    Raises:
        WeightsError: a weight is stored in another way than symmetric int4 in groups of neighbouring channels.
    """
    reader = WeightsReader(str(folder))
    for stored in reader.names:
        name, _, suffix = stored.rpartition("_")
        if stored.endswith(".weight") or stored.endswith("e_score_correction_bias"):
            yield stored, reader.read(stored).clone()
        elif suffix == "packed":
            yield name, _int4(reader, name, group)
        elif suffix not in ("scale", "shape"):
            raise WeightsError(
                f"{folder}: {stored} must be a plain weight or one of _packed, _scale and _shape: only symmetric int4 "
                "in groups of neighbouring channels is read. Quantize without zero points and without actorder group."
            )


def _int4(reader: WeightsReader, name: str, group: int) -> Int4Weight:
    rows, columns = reader.read(f"{name}_shape").tolist()
    scale_OG = reader.read(f"{name}_scale").clone()
    if tuple(scale_OG.shape) != (rows, math.ceil(columns / group)):
        raise WeightsError(
            f"{reader.uri}: {name}_scale must have one scale for {group} of {columns} channels in each of {rows} rows "
            f"(got shape {list(scale_OG.shape)}). Quantize with that group size."
        )
    return Int4Weight(unpack(reader.read(f"{name}_packed"), columns), scale_OG, group)


def require_complete(found: dict[str, Result], export: Path, layers: int) -> None:
    """Refuse a folder that lacks a weight, or has quantized others than the projections.

    transformers' model has no MTP layer, the one behind the last; it is not compared.

    Raises:
        WeightsError: names the weights.
    """
    wanted = {name for name in WeightsReader(str(export)).names if not name.startswith(f"model.layers.{layers}.")}
    rounded = {name for name, result in found.items() if isinstance(result, Int4Weight)}
    for problem, names in (
        ("lacks", wanted - found.keys()),
        ("has unknown", found.keys() - wanted),
        ("has other than projections quantized, or not all of them:", rounded ^ set(filter(is_projection, wanted))),
    ):
        if names:
            raise WeightsError(f"the quantized folder of {export} {problem} {', '.join(sorted(names))}")
