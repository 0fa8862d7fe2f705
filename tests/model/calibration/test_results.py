import pytest
import torch

from base.errors import MissingFileError
from model.calibration.expert_rows import ExpertCoverage
from model.calibration.int4_weight import Int4Weight, nearest
from model.calibration.results import (
    CalibrationResults,
    LayerResults,
    LayerWriter,
    layer_directory,
    read_coverage,
    read_results,
)
from tests.model.calibration.inputs import weight


@pytest.mark.parametrize("part_bytes", [1, 1 << 20])
def test_results_come_back_as_they_were_kept(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr("model.calibration.results._PART_BYTES", part_bytes)
    directory = str(tmp_path / "layer")
    int4, odd = nearest(weight(6, 64), 32, torch.bfloat16), nearest(weight(3, 21), 16, torch.float32)
    plain = weight(4, 5)
    coverage = [ExpertCoverage(3, 0, 17, 2), ExpertCoverage(3, 1, 0, 19)]
    writer = LayerWriter(directory)
    for name, result in (("a.weight", int4), ("b.weight", odd), ("c.weight", plain)):
        writer.keep(name, result)
    with pytest.raises(MissingFileError):
        list(read_results([directory]))
    writer.commit(coverage)
    found = dict(read_results([directory]))
    assert set(found) == {"a.weight", "b.weight", "c.weight"}
    assert torch.equal(found["c.weight"], plain)
    for name, expected in (("a.weight", int4), ("b.weight", odd)):
        result = found[name]
        assert isinstance(result, Int4Weight)
        assert torch.equal(result.values_OI, expected.values_OI)
        assert torch.equal(result.scale_OG, expected.scale_OG)
        assert result.scale_OG.dtype == expected.scale_OG.dtype
        assert result.group == expected.group
    assert read_coverage(directory) == coverage


def test_what_an_unfinished_layer_left_is_gone_when_it_is_written_again(tmp_path):
    first = LayerWriter(str(tmp_path))
    first.keep("old.weight", weight(2, 2))
    first.commit([])
    again = LayerWriter(str(tmp_path))
    again.keep("new.weight", weight(2, 2))
    again.commit([])
    assert [name for name, _ in read_results([str(tmp_path)])] == ["new.weight"]


@pytest.mark.parametrize("part_bytes", [1, 1 << 20])
def test_factors_of_rows_and_columns_come_back_and_are_no_results_of_their_own(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr("model.calibration.results._PART_BYTES", part_bytes)
    row_O, column_I = weight(1, 6)[0], weight(1, 64)[0]
    plain = nearest(weight(6, 64), 32, torch.bfloat16)
    kept = {
        "a.weight": plain,
        "b.weight": plain._replace(column_factor_I=column_I),
        "c.weight": plain._replace(row_factor_O=row_O, column_factor_I=column_I),
    }
    writer = LayerWriter(str(tmp_path))
    for name, result in kept.items():
        writer.keep(name, result)
    writer.commit([])
    found = LayerResults(str(tmp_path))
    assert sorted(found.names) == sorted(kept)
    for name, result in kept.items():
        read = found.read(name)
        for one, expected in zip(read[:2] + read[3:], result[:2] + result[3:], strict=True):
            assert (one is None and expected is None) or torch.equal(one, expected)
    assert found.factors("a.weight") == (None, None)
    assert found.read("d.weight") is None


def test_results_of_a_work_directory_are_found_by_the_layer_in_a_name(tmp_path):
    for number in (1, 2):
        writer = LayerWriter(layer_directory(tmp_path, number))
        writer.keep(f"model.layers.{number}.norm.weight", torch.full((2,), float(number)))
        if number == 1:
            writer.commit([])
    results = CalibrationResults(tmp_path)
    assert results.of("model.norm.weight") is None
    assert results.of("model.layers.0.norm.weight") is None
    assert results.of("model.layers.2.norm.weight") is None, "it was never finished"
    layer = results.of("model.layers.1.other.weight")
    assert layer is results.of("model.layers.1.norm.weight")
    assert layer.read("model.layers.1.other.weight") is None
    assert torch.equal(layer.read("model.layers.1.norm.weight"), torch.ones(2))
