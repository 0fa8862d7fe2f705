"""Report of a quantization: a row a tensor, totals by kind and by layer, and the largest errors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from model.calibration.names import NEAREST

REPORT_NAME = "quantization.json"
# By the part of the released name that tells them apart; the first that is found.
_KINDS = (
    (re.compile(r"\.self_attn\.\w+_proj"), "attention"),
    (re.compile(r"\.mlp\.experts\."), "routed expert"),
    (re.compile(r"\.mlp\.shared_experts\."), "shared expert"),
    (re.compile(r"\.mlp\.gate\."), "router"),
    (re.compile(r"\.mlp\."), "dense MLP"),
    (re.compile(r"norm\."), "norm"),
    (re.compile(r"\bembed_tokens\."), "embedding"),
    (re.compile(r"\b(lm_head|shared_head\.head)\."), "head"),
    (re.compile(r"\beh_proj\."), "MTP projection"),
)
_LARGEST = 10


def kind_of(name: str) -> str:
    """Kind of a released weight: attention, dense MLP, shared expert, routed expert, router, ... or `other`."""
    return next((kind for pattern, kind in _KINDS if pattern.search(name)), "other")


def make_report(
    description: str, records: Sequence[Mapping[str, Any]], calibration: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The report as JSON values, from the records of all shards (see `quantize_shard`), in the plan's order.

    `tensors` has a row for each quantized weight: name, kind, layer, shape, rel_error (Frobenius), max_abs_error,
    clipped (a share of its values), bytes_before and bytes_after. `by_kind`, `by_layer` and `by_layer_and_kind` have
    the same for all weights of a kind, layer, or both; `kept` the bytes of what keeps its type, by kind.
    `largest_errors` names the tensors with the largest rel_error. bytes_before and bytes_after are those of all
    weights, `shards` the size and SHA-256 of each file. `method` is how int4 weights were rounded, one of
    `model.calibration.names.METHODS`.

    Args:
        calibration: its part of the report, see `Calibrating.report`; `None` where weights are rounded to the nearest.
    """
    rows = [row for record in records for row in record["tensors"]]
    kept = [row for record in records for row in record["kept"]]
    totals = {key: sum(record[key] for record in records) for key in ("bytes_before", "bytes_after")}
    errors = [row["rel_error"] for row in rows]
    summary: dict[str, Any] = {"quantized_tensors": len(rows)}
    if rows:
        worst = sorted(rows, key=lambda row: (-row["rel_error"], row["name"]))[:_LARGEST]
        summary |= {
            "mean_rel_error": sum(errors) / len(errors),
            "worst_rel_error": worst[0]["rel_error"],
            "worst_tensor": worst[0]["name"],
            "largest_errors": [{key: row[key] for key in ("name", "kind", "layer", "rel_error")} for row in worst],
        }
    return {
        "format": description,
        "method": NEAREST if calibration is None else calibration["method"],
        **totals,
        "ratio": totals["bytes_after"] / totals["bytes_before"],
        **summary,
        **({} if calibration is None else {"calibration": calibration}),
        "by_kind": _totals(rows, ["kind"]),
        "by_layer": _totals(rows, ["layer"]),
        "by_layer_and_kind": _totals(rows, ["layer", "kind"]),
        "kept": _kept(kept),
        "shards": {
            record["file"]: {"bytes": record["bytes"], "sha256": record["sha256"]}
            for record in records
            if record["bytes"]
        },
        "tensors": [{key: value for key, value in row.items() if not key.endswith("squared")} for row in rows],
    }


def _totals(rows: Iterable[Mapping[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each value of `keys`, sorted."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    ordered = sorted(groups.items(), key=lambda item: [(value is None, value) for value in item[0]])
    return [dict(zip(keys, values, strict=True)) | _total(members) for values, members in ordered]


def _total(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    squared, error_squared = (math.fsum(row[key] for row in rows) for key in ("squared", "error_squared"))
    counts = [math.prod(row["shape"]) for row in rows]
    shares = [row["clipped"] for row in rows]
    clipped = None if None in shares else sum(map(math.prod, zip(shares, counts, strict=True)))
    return {
        "tensors": len(rows),
        "rel_error": math.sqrt(error_squared / squared) if squared else 0.0,
        "max_abs_error": max(row["max_abs_error"] for row in rows),
        "clipped": None if clipped is None else clipped / max(1, sum(counts)),
        "bytes_before": sum(row["bytes_before"] for row in rows),
        "bytes_after": sum(row["bytes_after"] for row in rows),
    }


def _kept(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    sizes: dict[str, list[int]] = {}
    for row in rows:
        sizes.setdefault(row["kind"], []).append(row["bytes"])
    return [{"kind": kind, "tensors": len(of), "bytes": sum(of)} for kind, of in sorted(sizes.items())]
