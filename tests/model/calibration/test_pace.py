import pytest

from model.calibration import pace

SIZES = {f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": 10**9 for layer in (1, 2) for expert in range(2)}


def test_lines_of_layers_and_between_them(monkeypatch):
    now, lines = 100.0, []
    monkeypatch.setattr(pace.time, "monotonic", lambda: now)
    found = pace.Pace(SIZES, 3, 0, lambda *line: lines.append(line))
    found.finish_layer()
    assert lines == [("calibrated layer 1/3", 0.0)], "it has no weight that is rounded, so there is no rate yet"
    names = list(SIZES)
    now = 104.0
    found.keep(names[0])
    assert len(lines) == 1, "too soon"
    now = 110.0
    found.keep("model.layers.1.mlp.gate.weight")
    assert lines[-1] == ("calibrating layer 2/3, 100 MB/s, 30s left", 0.25)
    found.keep(names[1])
    found.finish_layer()
    assert lines[-1] == ("calibrated layer 2/3, 200 MB/s, 10s left", 0.5)
    now = 200.0
    for name in names[2:]:
        found.keep(name)
    found.finish_layer()
    assert lines[-1] == ("calibrated layer 3/3, 40 MB/s", 1.0)


@pytest.mark.parametrize(("layers", "fraction"), [(2, 0.5), (3, 1.0)])
def test_what_an_earlier_start_did_is_told_once_and_is_no_part_of_the_rate(monkeypatch, layers, fraction):
    now, lines = 0.0, []
    monkeypatch.setattr(pace.time, "monotonic", lambda: now)
    found = pace.Pace(SIZES, 3, layers, lambda *line: lines.append(line))
    assert lines == [(f"resumed: {layers} of 3 layers are calibrated", fraction)]
    if layers == 2:
        now = 10.0
        found.keep("model.layers.2.mlp.experts.0.up_proj.weight")
        assert lines[-1] == ("calibrating layer 3/3, 100 MB/s, 10s left", 0.75)
