"""Measures what int4 weights cost by each method: held-out loss, KL and top-1 agreement with the plain weights.

    python -m benchmarks.quantize_methods --run_dir RUN [--groups 128 32] [--methods NAME ...] [--output FILE]

RUN is a training run with `data` and `export` (python -m cherry.export). The calibration set is the first sequences of
its training shards; the held-out documents are scored as the evaluation does, in windows of the sequence length. All
projections are rounded: attention, dense, shared and routed experts; with `--experts_only` the routed experts alone,
which is the mix that is released. `gptq` is the paper's; scale search, coordinate descent and the correction of
down_proj are added to it one by one. Prints a JSON row for each method and group: `dnll` is the loss that rounding
costs in nats per token, `dnll_upper` its one-sided 95 % bound over documents, `gb_s_read` the bytes of plain weights
over the whole calibration's time, beside `copy_gb_s`, a plain copy of the same files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import date
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from anything.statistics.compare import compare
from cherry.data.prepare import HeldoutDocument, iterate_heldout
from cherry.data.shards import TokenDataset
from model.calibration.int4_weight import Int4Weight
from model.calibration.method import Method
from model.calibration.results import Result
from model.calibration.runner import calibrated, coverage_of
from model.numerics.formats import is_projection
from model.transformer import DeepseekV3
from model.weights.hf_names import pieces
from model.weights.pretrained import load_pretrained

PLAIN = Method(gptq=False, search=False)
GPTQ = Method(search=False, sweeps=0, correct=False)
METHODS = {
    "nearest": PLAIN,
    "scale search": replace(PLAIN, search=True),
    "awq": replace(PLAIN, awq=True),
    "awq, scale search": replace(PLAIN, awq=True, search=True),
    "gptq": GPTQ,
    "gptq, ordered": replace(GPTQ, ordered=True),
    "gptq, scale search": replace(GPTQ, search=True),
    "gptq, scale search, descent": Method(correct=False),
    "gptq, scale search, descent, correction": Method(),
    "awq, gptq, scale search, descent, correction": Method(awq=True),
}


def calibration_set(run: Path, sequences: int) -> list[Tensor]:
    """Tokens [T] of the first training sequences."""
    dataset = TokenDataset(str(run / "data"))
    length = dataset.manifest.sequence_length
    return [torch.from_numpy(dataset.sequence(index)[0][:length].copy()) for index in range(sequences)]


def put(model: DeepseekV3, results: Iterable[tuple[str, Result]]) -> int:
    """Replace a model's weights by calibrated ones; the bytes of what is stored in their place."""
    found = dict(results)
    size = 0
    with torch.no_grad():
        for name, entry in model.state_dict().items():
            for hf_name, part in pieces(name, entry.shape, model.config):
                result = found.get(hf_name)
                if isinstance(result, Int4Weight):
                    entry[part] = result.dequantized()
                    size += result.values_OI.numel() // 2 + result.scale_OG.numel() * result.scale_OG.itemsize
                else:
                    if result is not None:
                        entry[part] = result
                    size += 2 * entry[part].numel()
    return size


class Scores:
    """Losses by document, and sums of KL divergence and top-1 agreement, of one model beside the plain one."""

    def __init__(self) -> None:
        self.plain: dict[str, tuple[float, int]] = {}
        self.rounded: dict[str, tuple[float, int]] = {}
        self.kl = self.agreed = 0.0

    @torch.no_grad()
    def add(self, document: HeldoutDocument, plain: DeepseekV3, rounded: DeepseekV3, window: int) -> None:
        sums, counted = [0.0, 0.0], 0
        for tokens_T, targets_T, scored_T in windows(document, window):
            rows = [model.logits(model(tokens_T[None]).hidden_BTD[0]).log_softmax(-1) for model in (plain, rounded)]
            plain_NV, rounded_NV = (row[scored_T] for row in rows)
            targets_N1 = targets_T[scored_T, None]
            for place, row_NV in enumerate((plain_NV, rounded_NV)):
                sums[place] -= row_NV.gather(1, targets_N1).sum().item()
            self.kl += (plain_NV.exp() * (plain_NV - rounded_NV)).sum().item()
            self.agreed += (plain_NV.argmax(-1) == rounded_NV.argmax(-1)).sum().item()
            counted += len(targets_N1)
        self.plain[document.id], self.rounded[document.id] = (sums[0], counted), (sums[1], counted)


def windows(document: HeldoutDocument, window: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens [T], the tokens that follow them [T], and which of those are scored [T]."""
    tokens_T, scored_T = torch.tensor(document.tokens), torch.tensor(document.loss_mask)
    for first in range(0, len(tokens_T) - 1, window):
        last = min(first + window, len(tokens_T) - 1)
        yield tokens_T[first:last], tokens_T[first + 1 : last + 1], scored_T[first + 1 : last + 1]


def reset_peak() -> None:
    """Forget the process's highest memory so far, where Linux can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak of memory is that of the whole program", file=sys.stderr)


def peak_gib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / (1 << 20)


def copy_speed(folder: Path, size: int) -> float:
    with tempfile.TemporaryDirectory(prefix="copy-") as target:
        started = time.perf_counter()
        shutil.copytree(folder, Path(target) / "copy")
        return size / (time.perf_counter() - started) / 1e9


def measure(name: str, group: int, options: argparse.Namespace) -> dict[str, object]:
    """Row of one method."""
    run, export = options.run_dir, options.run_dir / "export"
    method = replace(METHODS[name], group=group)
    plain, rounded = (load_pretrained(str(export), dtype=torch.float32) for _ in range(2))
    plain_bytes = 2 * sum(entry.numel() for entry in plain.state_dict().values())
    documents = calibration_set(run, options.sequences)
    with tempfile.TemporaryDirectory(prefix="calibration-") as work:
        reset_peak()
        started = time.perf_counter()
        wanted = _is_expert if options.experts_only else is_projection
        results = list(calibrated(str(export), documents, Path(work), method, wanted=wanted))
        seconds, peak = time.perf_counter() - started, peak_gib()
        coverage = coverage_of(Path(work))
    ratio = put(rounded, results) / plain_bytes
    scores = Scores()
    window = TokenDataset(str(run / "data")).manifest.sequence_length
    for document in islice(iterate_heldout(str(run / "data"), options.max_tokens), options.documents):
        if any(document.loss_mask):
            scores.add(document, plain, rounded, window)
    cost = compare(scores.plain, scores.rounded, margin=0.01, confidence=0.95, bootstrap_samples=2000, seed=0)
    return {
        "format": f"W4A16 g{group}" + (", routed experts" if options.experts_only else ""),
        "method": name,
        "model": f"{run.name}: hidden {plain.config.hidden_size}, {plain.config.num_hidden_layers} layers",
        "bytes_ratio": round(ratio, 4),
        "dnll": round(cost.difference, 5),
        "dnll_upper": round(cost.upper_one_sided, 5),
        "kl": round(scores.kl / cost.tokens, 5),
        "top1": round(scores.agreed / cost.tokens, 4),
        "gb_s_read": round(plain_bytes / seconds / 1e9, 5),
        "copy_gb_s": round(copy_speed(export, plain_bytes), 3),
        "peak_rss_gib": round(peak, 3),
        "plain_loss": round(cost.baseline_loss, 4),
        "tokens": {"calibration": sum(map(len, documents)), "heldout": cost.tokens},
        "expert_tokens": {"least": min(one.tokens for one in coverage), "borrowed": sum(x.borrowed for x in coverage)},
        "seconds": round(seconds, 1),
    }


def _is_expert(name: str) -> bool:
    return is_projection(name) and ".experts." in name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument("--groups", type=int, nargs="*", default=[128, 32])
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--sequences", type=int, default=128, help="calibration sequences")
    parser.add_argument("--documents", type=int, default=80, help="held-out documents")
    parser.add_argument("--max_tokens", type=int, default=1024, help="of a held-out document")
    parser.add_argument("--experts_only", action="store_true")
    parser.add_argument("--output", help="append the rows to this file too")
    options = parser.parse_args()
    about = {
        "date": date.today().isoformat(),
        "device": f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "command": "python -m benchmarks.quantize_methods " + " ".join(sys.argv[1:]),
    }
    for group in options.groups:
        for name in options.methods:
            row = {**measure(name, group, options), **about}
            print(json.dumps(row), flush=True)
            if options.output:
                with open(options.output, "a") as handle:
                    handle.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
