"""Pictures from figures as the steps write them: real PNG files, also of short, dense or quantization-free runs."""

import re
import struct

import matplotlib
import pytest
from matplotlib.figure import Figure

from cherry.train_record import read_records
from tasks.plots import (
    _plot_load,
    _plot_loss,
    plot_comparison,
    plot_expert_coverage,
    plot_formats,
    plot_memory,
    plot_quantization,
    plot_quantization_map,
    plot_training,
)


def size(path):
    """Width and height that a PNG's header states."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


def lines(steps, *, mtp=0.5, load=((0.5, 0.5), (0.1, 0.9)), every=10):
    written = []
    for step in range(1, steps + 1):
        line = {"step": step, "loss": 9.0 / step, "mtp_loss": mtp, "learning_rate": 1e-3 * step}
        if step == 1 or step % every == 0:
            line |= {"expert_load": [list(layer) for layer in load]} if load else {}
            line["heldout_loss"] = 9.5 / step
        written.append(line)
    return read_records(written)


def test_a_run_has_its_loss_its_rate_and_the_load_of_its_experts(tmp_path):
    paths = plot_training(lines(100), tmp_path / "plots")
    assert [path.name for path in paths] == ["loss.png", "learning_rate.png", "expert_load.png"]
    assert all(size(path)[0] == 960 for path in paths)


@pytest.mark.parametrize("metrics", [lines(1), lines(3, mtp=0.0, load=()), lines(2, every=50, load=((1.0,),))])
def test_a_run_of_few_steps_without_experts_or_a_second_head_is_drawn(tmp_path, metrics):
    paths = plot_training(metrics, tmp_path)
    assert len(paths) == 2 + any(record.expert_load is not None for record in metrics)
    assert all(min(size(path)) > 100 for path in paths)


@pytest.mark.parametrize(("steps", "labels"), [(79, ["loss"]), (80, ["loss, mean of 2 steps"])])
def test_a_loss_is_smoothed_over_more_than_one_step_or_not_at_all(steps, labels):
    axes = Figure().subplots()
    _plot_loss(axes, range(steps), [1.0] * steps, "loss", "tab:blue")
    assert axes.get_legend_handles_labels()[1] == labels


def test_many_experts_stay_within_a_page(tmp_path):
    load = [[1 / 64] * 64] * 20
    path = plot_training(lines(4, load=load, every=1), tmp_path)[-1]
    assert size(path)[1] <= 12 * 120


def test_loads_carry_the_models_layer_numbers_and_a_scale_that_says_where_it_stops(tmp_path):
    loads = [(record.step, record.expert_load) for record in lines(4, every=1)]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        _plot_load(loads, tmp_path / "load.svg", 3)
    text = (tmp_path / "load.svg").read_text()
    assert all(f">{label}<" in text for label in ("layer 3", "layer 4", "2 or more"))


def test_a_component_of_memory_has_one_color_whether_others_are_there_or_not(tmp_path):
    stages = {"forward": {"parameters": 2**30, "dispatch": 2**28, "communication": 2**29}, "optimizer": {}}
    colors = []
    for dispatch in (0, 2**28):
        stages["optimizer"] = stages["forward"] = {**stages["forward"], "dispatch": dispatch}
        path = plot_memory(stages, 2**31, tmp_path / f"{dispatch}.svg", title="planned")
        bars = re.findall(r'<g id="patch_\d+">.*?style="fill: (#[0-9a-f]{6})', path.read_text(), re.DOTALL)
        colors.append({color for color in bars if color != "#ffffff"})
    assert len(colors[0]) == 2
    assert colors[0] < colors[1]


def test_each_comparison_has_a_panel_of_its_own(tmp_path):
    row = ("candidate - untrained", -1.5, -1.6, -1.4)
    heights = [size(plot_comparison([row] * n, 0.01, tmp_path / f"{n}.png"))[1] for n in (1, 2)]
    assert heights[1] > heights[0] + 120


def test_the_error_of_each_tensor_is_drawn(tmp_path):
    assert size(plot_quantization([{"rel_error": 0.004 * n} for n in range(5)], tmp_path / "new" / "q.png"))[0] == 960


@pytest.mark.parametrize("layers", [1, 3, 62])
def test_errors_are_mapped_by_kind_and_layer(tmp_path, layers):
    cells = [{"layer": layer, "kind": "attention", "rel_error": 0.01 * (layer + 1)} for layer in range(layers)]
    cells.append({"layer": layers - 1, "kind": "routed expert", "rel_error": 0.02})
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = plot_quantization_map(cells, tmp_path / "map.svg").read_text()
    assert all(f">{label}<" in text for label in ("attention", "routed expert", str(layers - 1), "relative error, %"))
    assert size(plot_quantization_map(cells, tmp_path / "map.png"))[0] == 960


def test_formats_are_drawn_by_what_they_keep_and_cost(tmp_path):
    rows = [
        {"format": name, "bytes_ratio": ratio, "dnll": cost, "dnll_low": cost - 0.01, "dnll_high": cost + 0.01}
        | {"passed": cost < 0.02}
        for name, ratio, cost in (("int8", 0.52, 0.001), ("w4a16", 0.37, 0.03))
    ]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = plot_formats(rows, 0.02, tmp_path / "formats.svg").read_text()
    assert all(f">{words}<" in text for words in ("int8", "w4a16, refused", "quantize.max_dnll", "bytes, % of bf16"))


@pytest.mark.parametrize(("layers", "tokens"), [(1, [5, 5]), (4, [0, 900, 30]), (59, [10**6, 3])])
def test_the_coverage_of_a_calibration_has_its_layers_and_how_many_experts_borrowed(tmp_path, layers, tokens):
    rows = [
        {"layer": 3 + number, "tokens": tokens, "borrowed": [0] * (len(tokens) - 1) + [8]} for number in range(layers)
    ]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = plot_expert_coverage(rows, tmp_path / "map.svg").read_text()
    title = f"Calibration tokens of each expert; {layers} took others' too"
    assert all(f">{label}<" in text for label in (title, "3", str(2 + layers)))
    assert size(plot_expert_coverage(rows, tmp_path / "map.png"))[0] == 960
