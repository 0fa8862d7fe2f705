"""The quantize step: the format is given to the program, its report becomes plots and tables, and a retry goes on."""

import csv
import dataclasses
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
from model.weights.pretrained import load_pretrained, save_pretrained, state_to_hf
from model.weights.safetensors_file import write_file
from tasks.overrides import resolve
from tasks.quantize import coverage_rows, quantize, write_kinds
from tasks.steps import NotFinishedError, RunContext, StepRecord
from tests.model.conftest import random_model
from tests.training_job import prepare_documents


def context_and_records(tmp_path, **changes):
    config = resolve(
        "configs/tiny.yaml", {"name": "one", "runs_directory": str(tmp_path), "tracking": {"uri": "json:"}}
    )
    changed = config.model_copy(update={"quantize": config.quantize.model_copy(update={"compare": (), **changes})})
    context = RunContext(str(tmp_path / "one"), changed)
    records = [
        StepRecord(step, "f", {step: str(context.path / step)}, {}, 1.0, 0.0, None, None) for step in ("data", "export")
    ]
    return context, *records


@pytest.mark.slow
def test_the_program_gets_the_format(tmp_path):
    context, data, exported = context_and_records(tmp_path, format="int3")
    storage.commit(str(context.path / "export"))
    with disable_run_logger(), warnings.catch_warnings(), pytest.raises(ConfigError, match=r"\(got 'int3'\)"):
        warnings.simplefilter("ignore")  # what MLflow's tables use, which shows when they are first used
        quantize.fn(context, data, exported)


@pytest.mark.slow
def test_a_retry_goes_on_and_a_damaged_output_is_made_again(tmp_path):
    context, data, exported = context_and_records(tmp_path)
    source, target = str(context.path / "export"), context.path / "quantized"
    names = [f"model.layers.{layer}.mlp.experts.0.up_proj.weight" for layer in range(2)]
    write_file(storage.join(source, "model.safetensors"), {name: torch.randn(4, 8) for name in names})
    storage.write_json(storage.join(source, "config.json"), hf_config(ModelConfig(**PRESETS["tiny"])))
    storage.commit(source)

    def told():
        with disable_run_logger():
            record = quantize.fn(context, data, exported)
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


@pytest.mark.slow
def test_a_calibration_takes_the_run_s_data_and_its_coverage_is_published(tmp_path):
    context, data, exported = context_and_records(tmp_path, format="w4a16", method="gptq", calibration_tokens=320)
    for folder in (tmp_path / "documents", context.path):
        folder.mkdir()
    prepare_documents(tmp_path / "documents").rename(context.path / "data")
    config = ModelConfig(**{**PRESETS["tiny"], "vocab_size": 600, "num_hidden_layers": 2})
    state = random_model(config).state_dict()
    named = (pair for name, tensor in state.items() for pair in state_to_hf(name, tensor, config))
    tokenizer = str(context.path / "data" / "tokenizer.json")
    save_pretrained(named, exported.outputs["export"], config, dtype=torch.bfloat16, tokenizer_uri=tokenizer)
    with disable_run_logger():
        record = quantize.fn(context, data, exported)
    target = context.path / "quantized"
    report = storage.read_json(str(target / "quantization.json"))
    assert (report["method"], report["calibration"]["tokens"]) == ("gptq", 320)
    assert record.inputs["calibration_tokens"] == 320
    assert record.figures["calibration_tokens"] == 320
    keys = ("expert_tokens_least", "expert_tokens_mean", "experts_borrowed")
    assert [record.figures[key] for key in keys] == [report["calibration"][key] for key in keys]
    assert struct.unpack(">I", (target / "calibration_coverage.png").read_bytes()[16:20]) == (960,)
    assert "calibrated layer 3/3" in (context.path / "events.jsonl").read_text()
    load_pretrained(str(target), dtype=torch.float32)
    assert [path.name for path in context.path.glob("quantized*")] == ["quantized"]

    def would_run(**changes):
        settings = context.config.quantize.model_copy(update=changes)
        changed = context.config.model_copy(update={"quantize": settings})
        quantize.fn(dataclasses.replace(context, config=changed, dry_run=True), data, exported)

    with disable_run_logger():
        would_run()  # is found
        for changes in ({"calibration_tokens": 64}, {"method": "awq"}, {"method": "nearest"}):
            with pytest.raises(NotFinishedError):
                would_run(**changes)


def test_a_layer_s_coverage_is_a_row():
    layer = {"layer": 3, "tokens": [40, 7, 20], "borrowed": [0, 30, 5]}
    assert coverage_rows([layer]) == [
        {
            "layer": 3,
            "least tokens": 7,
            "of expert": 1,
            "median tokens": 20,
            "experts that borrowed": 2,
        }
    ]
