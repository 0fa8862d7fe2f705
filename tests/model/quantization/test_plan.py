"""The plan: every weight is in one group of one file, a group's members together, and scales in none."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from model.quantization.plan import plan_groups
from model.weights.pretrained import write_index
from model.weights.reader import WeightsReader
from model.weights.safetensors_file import write_file


def test_a_group_is_written_where_its_first_member_is(tmp_path: Path) -> None:
    files = {
        "a.safetensors": ["x.gate.weight", "x.up.weight_scale_inv", "norm.weight"],
        "b.safetensors": ["x.up.weight", "y.gate.weight"],
        "c.safetensors": ["y.up.weight"],
    }
    for file, names in files.items():
        write_file(str(tmp_path / file), {name: torch.ones(2) for name in names})
    write_index(str(tmp_path), {name: file for file, names in files.items() for name in names})
    fused: Any = SimpleNamespace(
        group=lambda name: re.sub("gate|up", "both", name) if re.search("gate|up", name) else None
    )
    assert plan_groups(WeightsReader(str(tmp_path)), fused) == {
        "a.safetensors": [["x.gate.weight", "x.up.weight"], ["norm.weight"]],
        "b.safetensors": [["y.gate.weight", "y.up.weight"]],
        "c.safetensors": [],
    }
