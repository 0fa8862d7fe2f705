"""Workers: every file once, whatever their number, the error of one, and none that is left."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from base.errors import WeightsError
from model.numerics.formats import FORMATS
from model.quantization.plan import plan_groups
from model.quantization.workers import available_cores, quantize_in_workers
from model.weights.pretrained import read_model_config
from model.weights.reader import WeightsReader
from tests.processes import command_line


def workers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "model.quantization.worker" in command_line(child)]


def test_every_file_is_done_once_and_an_error_ends_all_workers(bf16_folder: str, tmp_path: Path) -> None:
    plan = plan_groups(WeightsReader(bf16_folder), FORMATS["int8"].load(read_model_config(bf16_folder)[0]))
    with closing(quantize_in_workers(bf16_folder, str(tmp_path), "int8", plan, 2)) as events:
        done = [(file, record["file"]) for kind, file, record in events if kind == "done"]
    assert sorted(done) == [(file, file) for file in plan]
    assert workers() == []
    damaged = sorted(Path(bf16_folder).glob("*.safetensors"))[5]
    os.truncate(damaged, damaged.stat().st_size - 1)
    with pytest.raises(WeightsError, match=rf"{damaged.name} is truncated"):
        list(quantize_in_workers(bf16_folder, str(tmp_path), "int8", plan, 1))
    assert workers() == []


def test_cores_are_those_of_this_process() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)
