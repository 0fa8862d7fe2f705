"""Plots what share of one GPU's speed each layout keeps on several.

    python -m benchmarks.train_step --nproc 2 --layout kept "expert, kept" --output benchmarks/results/multi_gpu.json
    python -m benchmarks.multi_gpu_plot [ROWS] [PICTURE]

A point is a row: its tokens a second of a GPU over those of the same implementation on one GPU in the same call.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).with_name("results")
MARKERS = {"cherry": "o", "cherry-fp8": "s", "transformers": "^", "torchtitan": "v"}


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "multi_gpu.json"
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else RESULTS / "multi_gpu.png"
    rows = [row for row in json.loads(source.read_text()) if row.get("of_one_gpu")]
    best: dict[str, float] = {}
    for row in rows:
        best[row["layout"]] = max(best.get(row["layout"], 0.0), row["of_one_gpu"])
    layouts = sorted(best, key=lambda layout: -best[layout])
    figure, axis = plt.subplots(figsize=(8, 4), constrained_layout=True)
    for impl, marker in MARKERS.items():
        own = [row for row in rows if row["impl"] == impl]
        if own:
            at = [layouts.index(row["layout"]) for row in own]
            axis.plot([row["of_one_gpu"] for row in own], at, marker, label=impl, alpha=0.8)
    axis.axvline(1.0, color="grey", linestyle="--")
    axis.set_yticks(range(len(layouts)), layouts)
    axis.invert_yaxis()
    axis.set(xlabel="tokens a second of a GPU, of one GPU alone", xlim=(None, 1.05))
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left")
    axis.set_title(f"{rows[0]['world']} {rows[0]['gpu']}, torch {rows[0]['versions']['torch']}, {rows[0]['date']}")
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main()
