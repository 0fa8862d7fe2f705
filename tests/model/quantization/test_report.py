"""The report: kinds and layers of released names, totals over tensors, and the largest errors."""

from __future__ import annotations

import math
from typing import Any

import pytest

from model.numerics.weight_kinds import layer_of
from model.quantization.report import kind_of, make_report


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "attention", 0),
        ("model.layers.12.self_attn.o_proj.weight", "attention", 12),
        ("model.layers.12.self_attn.kv_a_layernorm.weight", "norm", 12),
        ("model.layers.2.mlp.gate_proj.weight", "dense MLP", 2),
        ("model.layers.3.mlp.gate.weight", "router", 3),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "router", 3),
        ("model.layers.60.mlp.experts.255.down_proj.weight", "routed expert", 60),
        ("model.layers.60.mlp.shared_experts.up_proj.weight", "shared expert", 60),
        ("model.layers.61.eh_proj.weight", "MTP projection", 61),
        ("model.layers.61.enorm.weight", "norm", 61),
        ("model.layers.61.shared_head.head.weight", "head", 61),
        ("model.embed_tokens.weight", "embedding", None),
        ("model.norm.weight", "norm", None),
        ("lm_head.weight", "head", None),
        ("something.else", "other", None),
    ],
)
def test_kind_and_layer(name: str, kind: str, layer: int | None) -> None:
    assert (kind_of(name), layer_of(name)) == (kind, layer)


def row(name: str, error: float, **changes: Any) -> dict[str, Any]:
    base = {"name": name, "kind": kind_of(name), "layer": layer_of(name), "shape": [2, 5], "max_abs_error": error}
    sums = {"rel_error": error, "squared": 4.0, "error_squared": 4.0 * error**2, "clipped": 0.1}
    return {**base, **sums, "bytes_before": 20, "bytes_after": 12, **changes}


def record(file: str, *rows: dict[str, Any], kept: int = 0) -> dict[str, Any]:
    others = [{"name": "model.norm.weight", "kind": "norm", "layer": None, "bytes": kept}] if kept else []
    sizes = {key: kept + sum(one[key] for one in rows) for key in ("bytes_before", "bytes_after")}
    return {"file": file, "bytes": 100, "sha256": "ab", **sizes, "tensors": list(rows), "kept": others}


def test_totals_weigh_tensors_by_their_size_and_name_the_largest_errors() -> None:
    first, second = "model.layers.1.self_attn.o_proj.weight", "model.layers.10.self_attn.o_proj.weight"
    expert = "model.layers.10.mlp.experts.3.up_proj.weight"
    records = [
        record("a", row(second, 0.3), row(first, 0.1, squared=12.0, error_squared=0.12, clipped=0.3), kept=14),
        record("b", row(expert, 0.2, clipped=None)),
    ]
    report = make_report("a format", records)
    assert (report["bytes_before"], report["bytes_after"]) == (74, 50)
    assert report["ratio"] == 50 / 74
    assert [item["name"] for item in report["tensors"]] == [second, first, expert]
    assert [item["name"] for item in report["largest_errors"]] == [second, expert, first]
    assert report["worst_tensor"] == second
    assert report["method"] == "nearest"
    assert "calibration" not in report
    assert report["mean_rel_error"] == pytest.approx(0.2)
    attention, routed = report["by_kind"]
    assert (attention["kind"], attention["tensors"], attention["bytes_after"]) == ("attention", 2, 24)
    assert attention["rel_error"] == pytest.approx(math.sqrt((0.36 + 0.12) / 16))
    assert attention["clipped"] == pytest.approx(0.2)
    assert routed["clipped"] is None
    assert [item["layer"] for item in report["by_layer"]] == [1, 10]
    pairs = [(item["layer"], item["kind"]) for item in report["by_layer_and_kind"]]
    assert pairs == [(1, "attention"), (10, "attention"), (10, "routed expert")]
    assert report["kept"] == [{"kind": "norm", "tensors": 1, "bytes": 14}]
    assert report["shards"]["b"] == {"bytes": 100, "sha256": "ab"}


def test_a_folder_without_projections_has_a_report_without_errors() -> None:
    report = make_report("a format", [record("a", kept=8)])
    assert report["quantized_tensors"] == 0
    assert "worst_tensor" not in report
    assert report["by_kind"] == []


def test_a_calibration_names_the_method() -> None:
    report = make_report("w4a16", [record("a", row("model.norm.weight", 0.1))], {"method": "gptq", "tokens": 7})
    assert (report["method"], report["calibration"]) == ("gptq", {"method": "gptq", "tokens": 7})
