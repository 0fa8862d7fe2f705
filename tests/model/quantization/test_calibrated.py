"""A calibrated folder: better than rounding, read alike by compressed-tensors, gone on with, and begun anew."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor

from base import storage
from base.errors import ConfigError, InvalidInputError
from model.calibration import method as methods
from model.calibration.names import CALIBRATED
from model.model_config import ModelConfig
from model.numerics.formats import FORMATS, is_projection
from model.numerics.int4_groups import Int4Groups
from model.numerics.scheme_format import SchemeFormat
from model.quantization.calibrated import Calibration, work_directory
from model.quantization.folder import quantize_folder
from model.weights.pretrained import load_pretrained, read_model_config, save_pretrained, state_to_hf
from model.weights.reader import WeightsReader
from tests.model.conftest import random_model, random_tokens, small_config

# Groups of 32 input channels; a dense layer, a mixture of experts, and MTP's.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "moe_intermediate_size": 96,
    "intermediate_size": 128,
    "n_routed_experts": 4,
}
CONFIG = small_config(num_hidden_layers=2, **SIZES)
LAYERS = 3


def restored(quantization: SchemeFormat, stored: dict[str, Tensor], name: str) -> Tensor:
    """fp32 weight of its stored tensors."""
    scheme = quantization.scheme(name)
    assert scheme is not None
    out = torch.empty(scheme.shape({key.removeprefix(name): tensor for key, tensor in stored.items()}))
    quantization.restorers(stored)[name](slice(0, out.shape[0]), out)
    return out


def saved(config: ModelConfig, folder: Path, *, quiet: Sequence[str] = ()) -> str:
    """Folder of a random model in bf16, in several shards; weights whose names have a part of `quiet` are small."""
    model = random_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in quiet):
                parameter.mul_(0.05)
    named = (pair for name, tensor in model.state_dict().items() for pair in state_to_hf(name, tensor, config))
    save_pretrained(named, str(folder), config, dtype=torch.bfloat16, max_shard_bytes=60_000)
    return str(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(CONFIG, tmp_path_factory.mktemp("calibrated") / "plain")


def documents(count: int = 24) -> Sequence[Tensor]:
    return list(random_tokens(CONFIG, count, 48))


def made(source: str, target: Path | str, method: str | None = "gptq", **options: Any) -> list[str]:
    """Lines of progress of making a w4a16 folder; `method` None rounds to the nearest."""
    lines: list[str] = []
    calibration = None if method is None else Calibration(method, options.pop("tokens", documents()))
    told = lambda line, _: lines.append(line)  # noqa: E731
    quantize_folder(source, str(target), told, format_name="w4a16", calibration=calibration, **options)
    return lines


@pytest.fixture(scope="module")
def folders(source: str) -> dict[str, str]:
    """Folders of the model in w4a16, by method."""
    targets = {name: str(Path(source).parent / name) for name in ("nearest", *CALIBRATED)}
    for name, target in targets.items():
        made(source, target, None if name == "nearest" else name)
    return targets


def contents(folder: Path | str) -> dict[str, bytes]:
    """Every file of a folder, by name."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def report_of(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = storage.read_json(storage.join(folder, "quantization.json"))
    return found


@torch.no_grad()
def logits_of(folder: str, tokens_BT: Tensor) -> Tensor:
    model = load_pretrained(folder, dtype=torch.float32)
    return model.logits(model(tokens_BT).hidden_BTD)


def test_each_method_s_model_is_nearer_to_the_plain_one_than_rounding(tmp_path: Path) -> None:
    """By the logits of tokens that no calibration saw.

    Every token goes to all experts, and what else is quantized adds little to the residual: an expert that is chosen
    only sometimes, for a change in the last digit, and the fp8 of the rest would drown what int4 costs.
    """
    everyone = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": SIZES["n_routed_experts"]}
    more = {"num_hidden_layers": 2, "num_nextn_predict_layers": 0, "routed_scaling_factor": 2.0}
    config = small_config(**SIZES, **everyone, **more)
    source = saved(config, tmp_path / "plain", quiet=["o_proj", "shared_experts.down_proj", "mlp.down_proj"])
    tokens_BT = random_tokens(config, 16, 48, seed=9)
    exact, errors = logits_of(source, tokens_BT), dict[str, float]()
    for name in ("nearest", *CALIBRATED):
        made(source, tmp_path / name, None if name == "nearest" else name)
        found = logits_of(str(tmp_path / name), tokens_BT)
        errors[name] = ((found - exact).norm() / exact.norm()).item()
    assert 0.01 < errors["gptq"] < 0.6 * errors["nearest"], errors
    assert errors["awq"] < 0.95 * errors["nearest"], errors
    assert errors["search"] < 0.95 * errors["nearest"], errors


def stored_of(reader: WeightsReader, name: str) -> dict[str, Tensor]:
    """Stored tensors of one weight, by suffix."""
    return {key.removeprefix(name): reader.read(key) for key in reader.names if key.startswith(name)}


@pytest.mark.parametrize("method", CALIBRATED)
def test_compressed_tensors_finds_the_same_weights(method: str, folders: dict[str, str]) -> None:
    reader = WeightsReader(folders[method])
    names = [key.removesuffix("_packed") for key in reader.names if key.endswith("_packed")]
    assert len(names) == 2 * CONFIG.n_routed_experts * 3
    ours = FORMATS["w4a16"].load(CONFIG)
    assert isinstance(ours, SchemeFormat)
    scheme = ours.scheme(names[0])
    assert isinstance(scheme, Int4Groups)
    library = BaseCompressor.get_value_from_registry("pack-quantized")
    described = QuantizationScheme.model_validate({"targets": ["Linear"], **scheme.config})
    for name in names:
        stored = stored_of(reader, name)
        theirs = library.decompress({f"weight{suffix}": tensor for suffix, tensor in stored.items()}, described)[
            "weight"
        ]
        found = restored(ours, {name + suffix: tensor for suffix, tensor in stored.items()}, name)
        assert torch.equal(theirs, found.to(theirs.dtype)), name


def test_only_the_experts_of_gptq_differ_from_rounding(folders: dict[str, str]) -> None:
    nearest, gptq = (WeightsReader(folders[name]) for name in ("nearest", "gptq"))
    assert nearest.names == gptq.names
    changed = {name for name in nearest.names if not torch.equal(nearest.read(name), gptq.read(name))}
    assert changed
    assert all(".mlp.experts." in name for name in changed)
    config = storage.read_json(storage.join(folders["gptq"], "config.json"))
    assert config == storage.read_json(storage.join(folders["nearest"], "config.json"))


def test_awq_changes_what_reads_the_experts_inputs_and_keeps_its_type(source: str, folders: dict[str, str]) -> None:
    plain, awq = WeightsReader(source), WeightsReader(folders["awq"])
    kept = [name for name in plain.names if not is_projection(name)]
    changed = {name for name in kept if not torch.equal(plain.read(name), awq.read(name))}
    assert changed == {
        f"model.layers.{layer}.{name}.weight"
        for layer in range(1, LAYERS)
        for name in ("post_attention_layernorm", "mlp.gate")
    }
    assert all(plain.dtype(name) == awq.dtype(name) for name in kept)


def test_errors_are_of_the_source_s_own_weights(source: str, folders: dict[str, str]) -> None:
    """Of AWQ's too, whose stored weights are multiplied by factors that others take back."""
    of_expert = {}
    for name, folder in folders.items():
        [row] = [row for row in report_of(folder)["by_kind"] if row["kind"] == "routed expert"]
        of_expert[name] = row["rel_error"]
    assert 0.05 < of_expert["nearest"] < 0.15
    assert of_expert["search"] < of_expert["nearest"]
    assert 0.8 * of_expert["nearest"] < of_expert["awq"] < 1.5 * of_expert["nearest"]
    assert of_expert["nearest"] < of_expert["gptq"] < 1.5 * of_expert["nearest"], "it keeps outputs, not weights"
    [row] = [row for row in report_of(folders["gptq"])["tensors"] if "layers.1.mlp.experts.2.down" in row["name"]]
    reader, name = WeightsReader(folders["gptq"]), row["name"]
    stored = {name + suffix: tensor for suffix, tensor in stored_of(reader, name).items()}
    weight = WeightsReader(source).read(name).float()
    error = restored(FORMATS["w4a16"].load(CONFIG), stored, name) - weight
    assert row["rel_error"] == pytest.approx((error.norm() / weight.norm()).item(), rel=1e-4)


def test_the_report_has_method_tokens_and_what_each_expert_saw(folders: dict[str, str]) -> None:
    assert report_of(folders["nearest"])["method"] == "nearest"
    assert "calibration" not in report_of(folders["nearest"])
    report = report_of(folders["gptq"])
    found, tokens = report["calibration"], 24 * 48
    assert (report["method"], found["method"], found["documents"], found["tokens"]) == ("gptq", "gptq", 24, tokens)
    assert found["settings"]["group"] == 32
    assert [row["layer"] for row in found["coverage"]] == [1, 2]
    for row in found["coverage"]:
        assert sum(row["tokens"]) == tokens * CONFIG.num_experts_per_tok
        assert len(row["borrowed"]) == CONFIG.n_routed_experts
    least = min(count for row in found["coverage"] for count in row["tokens"])
    assert found["expert_tokens_least"] == found["least_covered"][0]["tokens"] == least


def test_workers_and_an_object_store_make_the_same_files(
    source: str, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    expected, remote, local = contents(folders["awq"]), "memory://calibrated", tmp_path / "quantized"
    lines = made(source, remote, "awq")
    assert any(line.startswith("calibrated layer 3/3") for line in lines)
    assert storage.list_names(remote) == sorted(expected)
    for name in set(expected) - {storage.MARKER}:  # which has no digests of remote files
        assert storage.read_bytes(storage.join(remote, name)) == expected[name], name
    made(source, local, "awq", workers=2)
    assert contents(local) == expected
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_finished_folder_is_only_checked_and_leaves_no_work(
    source: str, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not work_directory(folders["gptq"]).exists()
    monkeypatch.setattr(methods.Method, "round", None)  # nothing is rounded again
    assert "is finished" in made(source, folders["gptq"])[0]


# The program ends itself by SIGKILL when it is about to tell a line that begins like this.
KILLED = """
import os, signal, sys
from model.calibration import pace
from model.quantization.calibrated import Calibration
from model.quantization.folder import quantize_folder
from tests.model.quantization.test_calibrated import documents
pace._REPORT_SECONDS = 0.0
def told(line, _):
    print(line, flush=True)
    if line.startswith(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
quantize_folder(sys.argv[1], sys.argv[2], told, format_name="w4a16", calibration=Calibration("gptq", documents()))
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    source: str, folders: dict[str, str], tmp_path: Path
) -> None:
    target = tmp_path / "quantized"
    root, told = Path(__file__).parents[3], list[str]()
    # Within a layer, between two, and between two shards.
    for moment in ("calibrating layer 2/3", "calibrated layer 2/3", "quantized 4/"):
        words = [sys.executable, "-c", KILLED, source, str(target), moment]
        ended = subprocess.run(words, capture_output=True, text=True, cwd=root, timeout=300, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        told.append(ended.stdout)
        assert not storage.is_committed(str(target))
        assert work_directory(str(target)).is_dir()
    assert "resumed: 1 of 3 layers" in told[1]
    assert "resumed: 2 of 3 layers" in told[2]
    lines = made(source, target)
    assert re.match(r"resumed: 4 of \d+ shards are there", lines[0])
    assert lines[1] == "resumed: 3 of 3 layers are calibrated"
    assert contents(target) == contents(folders["gptq"])
    assert not work_directory(str(target)).exists()


def test_another_method_or_other_tokens_start_over(source: str, folders: dict[str, str], tmp_path: Path) -> None:
    target = tmp_path / "quantized"
    few = documents(2)

    class StoppedError(Exception):
        pass

    def stop(line: str, _: float) -> None:
        if line.startswith("quantized 2/"):
            raise StoppedError

    with pytest.raises(StoppedError):
        quantize_folder(source, str(target), stop, format_name="w4a16", calibration=Calibration("awq", few))
    lines = made(source, target, "search", tokens=few)
    assert lines[0] == f"{target} was begun from another method (awq): starting over"
    assert not any(line.startswith("resumed") for line in lines)
    assert "was made from other calibration tokens" in made(source, target, "search")[0]
    assert contents(target) == contents(folders["search"])
    # What a calibration left unfinished is gone, too, once its target is made without one.
    with pytest.raises(StoppedError):
        quantize_folder(source, str(target), stop, format_name="w4a16", calibration=Calibration("awq", few))
    assert work_directory(str(target)).exists()
    assert "another method (awq)" in made(source, target, None)[0]
    assert not work_directory(str(target)).exists()
    assert contents(target) == contents(folders["nearest"])


def test_a_folder_beside_the_target_that_is_no_calibration_s_stays(source: str, tmp_path: Path) -> None:
    target = tmp_path / "quantized"
    own = work_directory(str(target)) / "layer-notes"
    own.parent.mkdir()
    own.write_text("mine")
    made(source, target, None)
    assert own.read_text() == "mine"


def test_a_model_without_experts_is_calibrated_to_nothing(tmp_path: Path) -> None:
    config = small_config(
        **{**SIZES, "num_hidden_layers": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
    )
    plain, target = saved(config, tmp_path / "plain"), tmp_path / "quantized"
    made(plain, target)
    made(plain, tmp_path / "nearest", None)
    assert report_of(str(target))["calibration"]["coverage"] == []
    for path in target.glob("*.safetensors"):
        assert (tmp_path / "nearest" / path.name).read_bytes() == path.read_bytes()
    assert read_model_config(str(target))[0].num_hidden_layers == 1


def test_what_cannot_be_calibrated_is_refused_and_nothing_is_written(source: str, tmp_path: Path) -> None:
    target = str(tmp_path / "quantized")
    calibration = Calibration("gptq", documents())
    with pytest.raises(ConfigError, match="method gptq: rounds int4 weights in groups, and the format int8 has none"):
        quantize_folder(source, target, calibration=calibration)
    with pytest.raises(InvalidInputError, match="must be 0 to 96"):
        made(source, target, tokens=[torch.tensor([3, 97])])
    with pytest.raises(InvalidInputError, match="no token"):
        made(source, target, tokens=[])
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not storage.is_committed(target)
