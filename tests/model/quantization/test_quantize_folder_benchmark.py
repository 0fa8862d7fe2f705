"""The benchmark's checkpoint is of DeepSeek-V3's shapes, and its row tells speed beside a copy, and memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.quantize_folder import SHARD_BYTES, layer_weights, shards_of, size_of
from model.model_config import PRESETS, ModelConfig

CONFIG = ModelConfig(**PRESETS["671b"])


def test_a_layer_has_the_published_parameters() -> None:
    weights = layer_weights(3, CONFIG)
    assert sum(math.prod(shape) for _, shape in weights.values()) == 11_507_286_272
    attention = [math.prod(shape) for name, (_, shape) in weights.items() if ".self_attn." in name]
    assert sum(attention) == 187_107_328


def test_shards_have_the_asked_size_together_and_each_weight_once() -> None:
    total = 40 << 30
    shards = list(shards_of(CONFIG, total))
    sizes = [sum(size_of(*one) for one in shard.values()) for shard in shards]
    assert max(sizes) <= SHARD_BYTES
    assert total * 0.99 < sum(sizes) <= total
    names = [name for shard in shards for name in shard]
    assert len(names) == len(set(names))
    assert {name.split(".")[2] for name in names} == {"3", "4"}


@pytest.mark.slow
def test_a_row_tells_speed_beside_a_copy_and_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.quantize_folder", "--gib", "0.03", "--workers", "1"]
    command += ["--folder", str(tmp_path), "--output", str(tmp_path / "rows.json")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    [row] = json.loads((tmp_path / "rows.json").read_text())
    assert row == json.loads(ended.stdout)
    names = ["format", "method", "model", "bytes_ratio", "dnll", "dnll_upper", "kl", "top1", "gb_s_read"]
    assert list(row)[: len(names)] == names
    assert row["dnll"] is None
    assert 0 <= row["gb_s_written"] <= row["gb_s_read"]
    assert row["copy_gb_s"] > 0
    assert 0.2 < row["peak_rss_gib"] < 4
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
