"""A quantized folder: what is kept, the report, memory, what an earlier start left, refusals, and object stores."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from base import storage
from base.errors import InvalidInputError, WeightsError
from model.numerics.formats import FORMATS, is_projection
from model.quantization.folder import default_workers, quantize_folder
from model.weights.pretrained import read_model_config
from model.weights.reader import WeightsReader
from model.weights.safetensors_file import Box


def told(source: str, target: str, workers: int | None = None) -> list[str]:
    """Lines of progress of a quantization."""
    lines: list[str] = []
    quantize_folder(source, target, lambda line, _: lines.append(line), workers=workers)
    return lines


def test_what_is_quantized_and_what_is_kept(bf16_folder: str) -> None:
    quantized = {name for name in WeightsReader(bf16_folder).names if is_projection(name)}
    kept = set(WeightsReader(bf16_folder).names) - quantized
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in quantized
    assert "model.layers.3.self_attn.kv_a_proj_with_mqa.weight" in quantized
    assert "model.layers.0.mlp.down_proj.weight" in quantized
    assert all("_proj" in name for name in quantized)
    for part in ("embed_tokens", "lm_head", "norm", "mlp.gate.weight", "e_score_correction_bias", "eh_proj"):
        assert any(part in name for name in kept)
    assert not any("_proj" in name and "eh_proj" not in name for name in kept if "with_mqa" not in name)


def test_report_and_folder_agree(bf16_folder: str, tmp_path: Path) -> None:
    target, lines = str(tmp_path / "quantized"), list[tuple[str, float]]()
    report = quantize_folder(bf16_folder, target, lambda line, fraction: lines.append((line, fraction)))
    assert storage.is_committed(target)
    assert not storage.damage(target)
    assert not (tmp_path / "quantized" / "manifest").exists()
    assert storage.read_json(storage.join(target, "quantization.json")) == report
    before, after = WeightsReader(bf16_folder), WeightsReader(target)
    fractions = [fraction for _, fraction in lines]
    assert (len(fractions), fractions) == (len(before.files), sorted(fractions))
    assert after.files == before.files
    assert {item["name"] for item in report["tensors"]} == {name for name in before.names if is_projection(name)}
    for name in before.names:
        if not is_projection(name):
            assert torch.equal(before.read(name), after.read(name)), name
    for item in report["tensors"]:
        weight = before.read(item["name"]).float()
        error = after.read(item["name"]) * after.read(item["name"] + "_scale") - weight
        assert item["shape"] == list(weight.shape)
        assert item["rel_error"] == pytest.approx((error.norm() / weight.norm()).item(), rel=1e-4)
        assert item["max_abs_error"] == pytest.approx(error.abs().max().item(), rel=1e-4)
        assert item["bytes_before"] == 2 * weight.numel()
        assert item["bytes_after"] == weight.numel() + 4 * weight.shape[0]
    for reader, key in ((before, "bytes_before"), (after, "bytes_after")):
        assert report[key] == sum(reader.info(name).stop - reader.info(name).start for name in reader.names)
    for file, state in report["shards"].items():
        path = os.path.join(target, file)
        assert state == {"bytes": os.path.getsize(path), "sha256": storage.digest(path)}
    config = storage.read_json(storage.join(target, "config.json"))["quantization_config"]
    assert config == FORMATS["int8"].load(read_model_config(bf16_folder)[0]).quantization_config


def test_no_more_than_one_shard_is_in_memory(bf16_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: set[int] = set()
    most = 0
    plain = WeightsReader.read_box

    def counted(reader: WeightsReader, name: str, box: Box) -> Tensor:
        nonlocal most
        tensor = plain(reader, name, box)
        alive.add(id(tensor))
        weakref.finalize(tensor, alive.discard, id(tensor))
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(WeightsReader, "read_box", counted)
    quantize_folder(bf16_folder, str(tmp_path / "quantized"))
    reader = WeightsReader(bf16_folder)
    largest = max(len(reader.names_in(file)) for file in reader.files)
    assert 0 < most <= largest < len(reader.names)


def test_workers_and_an_object_store_make_the_same_files(bf16_folder: str, tmp_path: Path) -> None:
    one, two, remote = str(tmp_path / "one"), str(tmp_path / "two"), "memory://quantized-folder"
    quantize_folder(bf16_folder, one)
    lines = told(bf16_folder, two, workers=2)
    assert len([line for line in lines if line.startswith("quantized")]) == len(WeightsReader(bf16_folder).files)
    copy = "memory://bf16-folder"
    for name in os.listdir(bf16_folder):
        storage.write_bytes(storage.join(copy, name), Path(bf16_folder, name).read_bytes())
    quantize_folder(copy, remote)
    names = sorted(os.listdir(one))
    assert sorted(os.listdir(two)) == storage.list_names(remote) == names
    for name in names:
        if name != storage.MARKER:  # it names the source
            content = Path(one, name).read_bytes()
            assert Path(two, name).read_bytes() == content, name
            assert storage.read_bytes(storage.join(remote, name)) == content, name


@pytest.mark.slow
def test_from_and_to_s3_a_call_that_was_interrupted_is_gone_on_with(bf16_folder: str, tmp_path: Path, s3: str) -> None:
    source, target, local = f"{s3}/export", f"{s3}/quantized", str(tmp_path / "quantized")
    for name in os.listdir(bf16_folder):
        storage.write_bytes(storage.join(source, name), Path(bf16_folder, name).read_bytes())
    lines: list[str] = []

    def stop_in_the_middle(line: str, fraction: float) -> None:
        lines.append(line)
        if fraction > 0.4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_folder(source, target, stop_in_the_middle)
    assert not storage.is_committed(target)
    done = len(lines)
    assert told(source, target, workers=1)[0].startswith(f"resumed: {done} of ")
    assert "is finished" in told(source, target)[0]
    quantize_folder(bf16_folder, local)
    names = sorted(os.listdir(local))
    assert storage.list_names(target) == names
    for name in set(names) - {storage.MARKER}:
        assert storage.read_bytes(storage.join(target, name)) == Path(local, name).read_bytes(), name
    storage.write_bytes(storage.join(source, "config.json"), Path(bf16_folder, "config.json").read_bytes() + b" ")
    assert told(source, target)[0].endswith("was made from other files of the source: starting over")


def test_a_finished_target_is_only_checked(bf16_folder: str, tmp_path: Path) -> None:
    target = str(tmp_path / "quantized")
    report = quantize_folder(bf16_folder, target)
    times = {path: path.stat().st_mtime_ns for path in Path(target).iterdir()}
    assert quantize_folder(bf16_folder, target) == report
    assert {path: path.stat().st_mtime_ns for path in Path(target).iterdir()} == times
    file = sorted(Path(target).glob("*.safetensors"))[2]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)  # of the same size
    assert "no longer as it was committed: starting over" in told(bf16_folder, target)[0]
    assert storage.digest(str(file)) == report["shards"][file.name]["sha256"]


def test_another_source_or_format_starts_over(bf16_folder: str, tmp_path: Path) -> None:
    target = str(tmp_path / "quantized")
    quantize_folder(bf16_folder, target)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in Path(bf16_folder).iterdir():
        os.link(path, copy / path.name)
    lines = told(str(copy), target)
    assert lines[0] == f"{target} was made from another source ({bf16_folder}): starting over"
    rewritten = copy / "config.json"
    content = rewritten.read_bytes()
    rewritten.unlink()
    rewritten.write_bytes(content + b" ")
    assert told(str(copy), target)[0].endswith("was made from other files of the source: starting over")
    assert storage.is_committed(target)


def test_a_quantized_or_identical_folder_is_refused(bf16_folder: str, tmp_path: Path) -> None:
    target = str(tmp_path / "quantized")
    quantize_folder(bf16_folder, target)
    with pytest.raises(WeightsError, match="quantized already"):
        quantize_folder(target, str(tmp_path / "again"))
    with pytest.raises(InvalidInputError, match="name another folder"):
        quantize_folder(bf16_folder, bf16_folder + "/")
    assert storage.is_committed(bf16_folder)


@pytest.mark.parametrize("name", ["thesis.tex", "photos/1.jpg", "config.json"])
def test_a_target_that_holds_something_else_is_not_emptied(name: str, bf16_folder: str, tmp_path: Path) -> None:
    file = tmp_path / "target" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(InvalidInputError, match=rf"\({name.split('/')[0]}\), and would be emptied"):
        quantize_folder(bf16_folder, str(tmp_path / "target"))
    assert file.read_text() == "mine"


def test_a_truncated_source_leaves_the_target_without_a_marker(bf16_folder: str, tmp_path: Path) -> None:
    shard = sorted(Path(bf16_folder).glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(WeightsError, match="truncated"):
        quantize_folder(bf16_folder, str(tmp_path / "quantized"))
    assert not storage.is_committed(str(tmp_path / "quantized"))


def test_a_small_source_gets_no_workers(bf16_folder: str, tmp_path: Path) -> None:
    assert default_workers(bf16_folder) is None
    (tmp_path / "one.safetensors").touch()
    os.truncate(tmp_path / "one.safetensors", 1 << 30)  # its folder's other files are shards of none
    assert default_workers(str(tmp_path)) == 1
