"""The quantize step: the format is given to the program, its report becomes plots and tables, and a retry goes on."""

import csv
import struct
import warnings

import pytest
import torch
from prefect.logging import disable_run_logger

from base import storage
from base.errors import ConfigError
from model.model_config import PRESETS, ModelConfig
from model.quantize import quantize_folder
from model.weights.hf_config import hf_config
from model.weights.safetensors_file import write_file
from tasks.overrides import resolve
from tasks.quantize import quantize, write_kinds
from tasks.steps import RunContext, StepRecord


def context_and_export(tmp_path, **changes):
    config = resolve(
        "configs/tiny.yaml", {"name": "one", "runs_directory": str(tmp_path), "tracking": {"uri": "json:"}}
    )
    changed = config.model_copy(update={"quantize": config.quantize.model_copy(update={"compare": (), **changes})})
    context = RunContext(str(tmp_path / "one"), changed)
    return context, StepRecord("export", "f", {"export": str(context.path / "export")}, {}, 1.0, 0.0, None, None)


@pytest.mark.slow
def test_the_program_gets_the_format(tmp_path):
    context, exported = context_and_export(tmp_path, format="int3")
    storage.commit(str(context.path / "export"))
    with disable_run_logger(), warnings.catch_warnings(), pytest.raises(ConfigError, match=r"\(got 'int3'\)"):
        warnings.simplefilter("ignore")  # what MLflow's tables use, which shows when they are first used
        quantize.fn(context, exported)


@pytest.mark.slow
def test_a_retry_goes_on_and_a_damaged_output_is_made_again(tmp_path):
    context, exported = context_and_export(tmp_path)
    source, target = str(context.path / "export"), context.path / "quantized"
    names = [f"model.layers.{layer}.mlp.experts.0.up_proj.weight" for layer in range(2)]
    write_file(storage.join(source, "model.safetensors"), {name: torch.randn(4, 8) for name in names})
    storage.write_json(storage.join(source, "config.json"), hf_config(ModelConfig(**PRESETS["tiny"])))
    storage.commit(source)

    def told():
        with disable_run_logger():
            record = quantize.fn(context, exported)
        assert record.outputs == {"quantized": str(target)}
        assert {"quantized_bytes_ratio", "rel_error_mean", "rel_error_max"} <= set(record.figures)
        text = (context.path / "events.jsonl").read_text()
        (context.path / "events.jsonl").unlink()
        return text

    quantize_folder(source, str(target))  # an attempt that ended before its record was written
    assert "is finished: made from the same source" in told()
    for name in ("quantization.png", "quantization_map.png"):
        assert struct.unpack(">I", (target / name).read_bytes()[16:20]) == (960,)
    [row] = csv.DictReader((target / "quantization_by_kind.csv").read_text().splitlines())
    assert (row["kind"], row["tensors"]) == ("routed expert", "2")
    (target / "quantization.json").unlink()
    assert "100% quantized 1/1 shards" in told()
    assert storage.is_committed(str(target))


def test_rows_of_a_table_have_their_names_on_top(tmp_path):
    path = write_kinds([{"kind": "attention", "rel_error": 0.5}, {"kind": "b", "rel_error": None}], tmp_path / "a.csv")
    assert path.read_text().splitlines() == ["kind,rel_error", "attention,0.5", "b,"]
