"""Plots of a run: planned memory, loss, learning rate, expert load, quantization, a comparison's intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cherry.train_record import TrainRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@contextmanager
def _figure(path: Path, *, height: float = 4.5, rows: int = 1) -> Iterator[list[Axes]]:
    """Axes in `rows` rows, saved to `path` on the way out. pyplot is not safe in a task's thread."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    yield list(figure.subplots(rows, 1, squeeze=False)[:, 0])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _plot_loss(axes: Axes, steps: Sequence[int], values: Sequence[float], label: str, color: str) -> None:
    """A loss and, of a run with steps enough, its moving average, which gets the label."""
    window = len(steps) // 40
    if window < 2:
        axes.plot(steps, values, color=color, label=label)
        return
    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.25)
    axes.plot(steps, _smooth(values, window), color=color, label=f"{label}, mean of {window} steps")


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Moving average: at each index the mean of the last `window` values."""
    sums = [0.0, *accumulate(values)]
    return [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(values))]


def plot_training(records: Sequence[TrainRecord], folder: Path, *, first_moe_layer: int = 0) -> list[Path]:
    """Paths of loss.png, learning_rate.png and, for a mixture of experts, expert_load.png, drawn into `folder`.

    The loss is that of the steps that were taken; a red line marks a skipped one.
    """
    skipped = [record.step for record in records if record.skipped is not None]
    taken = [record for record in records if record.skipped is None and record.loss is not None]
    steps = [record.step for record in taken]
    paths = [folder / "loss.png", folder / "learning_rate.png"]
    with _figure(paths[0]) as [axes]:
        mtp = [record.mtp_loss or 0.0 for record in taken]
        main = [record.loss or 0.0 for record in taken]
        for values, label, color in ((mtp, "MTP loss", "tab:orange"), (main, "training loss", "tab:blue")):
            if any(values):
                _plot_loss(axes, steps, values, label, color)
        held = [(record.step, record.heldout_loss) for record in taken if record.heldout_loss is not None]
        for step in skipped:
            axes.axvline(
                step, color="tab:red", linewidth=0.8, alpha=0.5, label="skipped" if step == skipped[0] else None
            )
        if held:
            axes.plot(*zip(*held, strict=True), "o-", color="tab:green", label="held-out loss")
        axes.set(xlabel="optimizer step", ylabel="nats per token", title="Loss")
        axes.grid(alpha=0.3)
        axes.legend()
    with _figure(paths[1], height=3.0) as [axes]:
        axes.plot(steps, [record.learning_rate or 0.0 for record in taken])
        axes.set(xlabel="optimizer step", ylabel="learning rate", title="Learning rate")
        axes.grid(alpha=0.3)
    loads = [(record.step, record.expert_load) for record in taken if record.expert_load is not None]
    if loads:
        paths.append(folder / "expert_load.png")
        _plot_load(loads, paths[-1], first_moe_layer)
    return paths


def _plot_load(loads: Sequence[tuple[int, Sequence[Sequence[float]]]], path: Path, first_layer: int) -> None:
    """Draw a heat map: rows are experts by layer (MTP modules last), columns steps; 1 is an even share."""
    layers, experts = len(loads[0][1]), len(loads[0][1][0])
    columns = [[share * experts for layer in load for share in layer] for _, load in loads]
    rows = list(zip(*columns, strict=True))
    with _figure(path, height=max(3.0, min(12.0, 0.15 * layers * experts))) as [axes]:
        image = axes.imshow(rows, aspect="auto", cmap="coolwarm", vmin=0.0, vmax=2.0, interpolation="nearest")
        marks = sorted({round(i * (len(loads) - 1) / 5) for i in range(6)})
        axes.set_xticks(marks, [str(loads[i][0]) for i in marks])
        axes.set_yticks(
            [(i + 0.5) * experts - 0.5 for i in range(layers)], [f"layer {first_layer + i}" for i in range(layers)]
        )
        for boundary in range(1, layers):
            axes.axhline(boundary * experts - 0.5, color="black", linewidth=0.8)
        axes.set(xlabel="optimizer step", title="Expert load (tokens over an even share)")
        assert axes.figure is not None
        bar = axes.figure.colorbar(image, ax=axes, extend="max", ticks=[0.0, 0.5, 1.0, 1.5, 2.0])
        bar.ax.set_yticklabels(["0", "0.5", "1", "1.5", "2 or more"])


def plot_quantization(tensors: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw the relative error of each quantized tensor, largest first, to `path`."""
    errors = sorted((tensor["rel_error"] for tensor in tensors), reverse=True)
    with _figure(path, height=3.5) as [axes]:
        axes.plot([100 * error for error in errors])
        axes.set(
            xlabel="tensor, by error", ylabel="relative error, %", title="Quantization error by tensor", ylim=(0, None)
        )
        axes.grid(alpha=0.3)
    return path


def plot_quantization_map(cells: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw the relative error of each kind of weight in each layer, a row a kind and a column a layer, to `path`.

    Args:
        cells: rows of a report's `by_layer_and_kind`: layer, kind, rel_error.
    """
    layers = sorted({cell["layer"] for cell in cells if cell["layer"] is not None})
    kinds = sorted({cell["kind"] for cell in cells})
    errors = {(cell["kind"], cell["layer"]): 100 * cell["rel_error"] for cell in cells}
    rows = [[errors.get((kind, layer), float("nan")) for layer in layers] for kind in kinds]
    with _figure(path, height=1.6 + 0.45 * len(kinds)) as [axes]:
        axes.set_facecolor("lightgrey")  # of what a layer does not have
        image = axes.imshow(rows, aspect="auto", cmap="viridis", interpolation="nearest")
        marks = sorted({round(i * (len(layers) - 1) / 10) for i in range(11)})
        axes.set_xticks(marks, [str(layers[i]) for i in marks])
        axes.set_yticks(range(len(kinds)), kinds)
        axes.set(xlabel="layer", title="Quantization error by kind and layer")
        assert axes.figure is not None
        axes.figure.colorbar(image, ax=axes, label="relative error, %")
    return path


def plot_expert_coverage(coverage: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw the calibration tokens of each expert, a row a layer and a column an expert, to `path`.

    The scale is logarithmic, so that experts with few tokens stand out; none counts as one.

    Args:
        coverage: rows of a report: layer, tokens, borrowed.
    """
    with _figure(path, height=min(9.0, 1.8 + 0.25 * len(coverage))) as [axes]:
        rows = [[max(1, tokens) for tokens in layer["tokens"]] for layer in coverage]
        image = axes.imshow(rows, aspect="auto", cmap="viridis", interpolation="nearest", norm="log")
        borrowed = sum(count > 0 for layer in coverage for count in layer["borrowed"])
        marks = sorted({round(i * (len(coverage) - 1) / 10) for i in range(11)})
        axes.set_yticks(marks, [str(coverage[i]["layer"]) for i in marks])
        axes.set(
            xlabel="expert", ylabel="layer", title=f"Calibration tokens of each expert; {borrowed} took others' too"
        )
        assert axes.figure is not None
        axes.figure.colorbar(image, ax=axes, label="tokens")
    return path


def plot_comparison(rows: Sequence[tuple[str, float, float, float]], margin: float, path: Path) -> Path:
    """Draw intervals of differences in nats per token, each on its own scale: (label, difference, low, high)."""
    with _figure(path, height=1.7 * len(rows) + 0.4, rows=len(rows)) as panels:
        for axes, (label, difference, low, high) in zip(panels, rows, strict=True):
            axes.axvspan(-margin, margin, color="grey", alpha=0.2, label="margin")
            axes.axvline(0.0, color="black", linewidth=1)
            axes.plot([low, high], [0, 0], color="tab:blue", linewidth=4, solid_capstyle="butt")
            axes.plot([difference], [0], "o", color="tab:blue")
            axes.set(yticks=[], ylim=(-1, 1), title=f"{label}: {difference:+.4f} ({low:+.4f} to {high:+.4f})")
        panels[0].legend(loc="upper right")
        panels[-1].set_xlabel("difference of the held-out loss, nats per token (left is better)")
    return path


def plot_formats(rows: Sequence[Mapping[str, Any]], limit: float, path: Path) -> Path:
    """Draw what each quantization format costs, with its interval, over the share of the bytes that it keeps.

    Args:
        rows: format, bytes_ratio, dnll with dnll_low and dnll_high, and passed of each.
        limit: largest loss that may be caused, in nats per token.
    """
    with _figure(path) as [axes]:
        axes.axhline(limit, color="tab:red", linestyle="--", linewidth=1, label="quantize.max_dnll")
        axes.axhline(0.0, color="black", linewidth=1)
        for row in rows:
            color = "tab:blue" if row["passed"] else "tab:red"
            share, cost = 100 * row["bytes_ratio"], row["dnll"]
            axes.plot([share, share], [row["dnll_low"], row["dnll_high"]], color=color, linewidth=4, alpha=0.4)
            axes.plot([share], [cost], "o", color=color)
            words = f"{row['format']}{'' if row['passed'] else ', refused'}"
            axes.annotate(words, (share, cost), xytext=(8, 6), textcoords="offset points")
        axes.set(
            xlabel="bytes, % of bf16", ylabel="cost in held-out loss, nats per token", title="Quantization formats"
        )
        axes.margins(x=0.25)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right")
    return path


def plot_memory(
    stages: Mapping[str, Mapping[str, int]], usable_bytes: int, path: Path, *, title: str = "Planned memory"
) -> Path:
    """Draw a plan's memory at each stage of a step, stacked by component, with a line at the usable memory.

    A component has the same color in every plan.
    """
    components = list(next(iter(stages.values())))
    names = [name for name in components if any(stage[name] for stage in stages.values())]
    with _figure(path, height=1.6 + 0.4 * len(stages)) as [axes]:
        left = [0.0] * len(stages)
        for name in names:
            sizes = [stage[name] / 2**30 for stage in stages.values()]
            axes.barh(range(len(stages)), sizes, left=left, label=name, color=f"C{components.index(name)}")
            left = [before + size for before, size in zip(left, sizes, strict=True)]
        for place, total in enumerate(left):
            axes.annotate(f" {total:.3g}", (total, place), va="center", fontsize="small")
        axes.margins(x=0.1)
        if usable_bytes / 2**30 < 4 * max(left):  # else the bars would be a hair beside an empty page
            axes.axvline(usable_bytes / 2**30, color="black", linestyle="--", label="usable")
        axes.set_yticks(range(len(stages)), list(stages))
        axes.invert_yaxis()
        axes.set(xlabel="GiB of a rank", title=title)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")
    return path
