"""Measures what int4 weights cost by each method: held-out loss, KL and top-1 agreement with the plain weights.

    python -m benchmarks.quantize_methods --run_dir RUN [--groups 128 32] [--methods NAME ...] [--output FILE]

RUN is a training run with `data` and `export` (python -m cherry.export). The calibration set is the first sequences of
its training shards; the held-out documents are scored as the evaluation does, in windows of the sequence length. All
projections are rounded: attention, dense, shared and routed experts; with `--experts_only` the routed experts alone,
which is the mix that is released. `gptq` is the paper's; scale search, coordinate descent and the correction of
down_proj are added to it one by one. Prints a JSON row for each method and group: `dnll` is the loss that rounding
costs in nats per token, `dnll_upper` its one-sided 95 % bound over documents, `gb_s_read` the bytes of plain weights
over the whole calibration's time, beside `copy_gb_s`, a plain copy of the same files.

With `--peer_python` llm-compressor's rows follow, of the same model, tokens and documents
(benchmarks/quantize_peer.py). Its environment is its own:

    python -m venv peer && peer/bin/pip install llmcompressor==0.14.0
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import date
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from anything.statistics.compare import Comparison, compare
from benchmarks.quantize_peer import (
    PEERS,
    read_packed,
    require_complete,
    require_same,
    run_peer,
    write_tokens,
)
from cherry.data.prepare import HeldoutDocument, iterate_heldout
from cherry.data.shards import TokenDataset
from model.calibration.int4_weight import Int4Weight
from model.calibration.method import Method
from model.calibration.results import Result, read_results
from model.calibration.runner import calibrated_layers, coverage_of
from model.numerics.formats import is_projection
from model.transformer import DeepseekV3
from model.weights.hf_names import pieces
from model.weights.pretrained import load_pretrained

PLAIN = Method(gptq=False, search=False)
MTP = "mtp."  # the module that no score depends on
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


def put(model: DeepseekV3, results: Iterable[tuple[str, Result]]) -> float:
    """Replace a model's weights by calibrated ones; the bytes as stored over those in bf16, of all that is scored."""
    found = dict(results)
    stored = plain = 0
    with torch.no_grad():
        for name, entry in model.state_dict().items():
            for hf_name, part in pieces(name, entry.shape, model.config):
                result, size = found.get(hf_name), 2 * entry[part].numel()
                if isinstance(result, Int4Weight):
                    entry[part] = result.dequantized()
                    size = result.values_OI.numel() // 2 + result.scale_OG.numel() * result.scale_OG.itemsize
                elif result is not None:
                    entry[part] = result
                if not name.startswith(MTP):
                    stored += size
                    plain += 2 * entry[part].numel()
    return stored / plain


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


def copy_speed(folder: Path) -> float:
    size = sum(file.stat().st_size for file in folder.iterdir())
    with tempfile.TemporaryDirectory(prefix="copy-") as target:
        started = time.perf_counter()
        shutil.copytree(folder, Path(target) / "copy")
        return size / (time.perf_counter() - started) / 1e9


class Calibration(NamedTuple):
    """What came of one calibration, beside the weights."""

    bytes_ratio: float
    plain_bytes: int
    """Of the weights that it had."""
    seconds: float
    peak_gib: float
    expert_tokens: dict[str, int] | None
    """Fewest tokens of a routed expert, and those that were borrowed; unknown for a peer."""


def measure(name: str, group: int, options: argparse.Namespace) -> dict[str, object]:
    """Row of one of our methods."""
    export = options.run_dir / "export"
    method = replace(METHODS[name], group=group)
    plain, rounded = (load_pretrained(str(export), dtype=torch.float32) for _ in range(2))
    documents = calibration_set(options.run_dir, options.sequences)
    with tempfile.TemporaryDirectory(prefix="calibration-") as work:
        reset_peak()
        started = time.perf_counter()
        wanted = _is_expert if options.experts_only else is_projection
        results = list(read_results(calibrated_layers(str(export), documents, Path(work), method, wanted=wanted)))
        seconds, peak = time.perf_counter() - started, peak_gib()
        coverage = coverage_of(Path(work))
    size = 2 * sum(entry.numel() for entry in plain.state_dict().values())
    tokens = {"least": min(one.tokens for one in coverage), "borrowed": sum(x.borrowed for x in coverage)}
    return row_of(
        name,
        group,
        options,
        Calibration(put(rounded, results), size, seconds, peak, tokens),
        score(plain, rounded, options),
        plain,
    )


def measure_peer(name: str, group: int, options: argparse.Namespace) -> dict[str, object]:
    """Row of one of llm-compressor's methods, in an environment of its own.

    Raises:
        SystemExit, WeightsError: it failed, or what it had or wrote is not this model.
    """
    export = options.run_dir / "export"
    plain, rounded = (load_pretrained(str(export), dtype=torch.float32) for _ in range(2))
    window = _window(options)
    with tempfile.TemporaryDirectory(prefix="peer-") as work:
        tokens, target = Path(work) / "tokens.safetensors", Path(work) / "quantized"
        heldout = (one for document in heldout_documents(options) for one in windows(document, window))
        write_tokens(tokens, calibration_set(options.run_dir, options.sequences), heldout)
        report = run_peer(options.peer_python, export, tokens, target, {**PEERS[name], "group": group})
        found = dict(read_packed(target, group))
    require_complete(found, export, plain.config.num_hidden_layers)
    ratio = put(rounded, found.items())
    scores = score(plain, rounded, options)
    require_same("the plain model", report["plain_loss"], scores[1].baseline_loss)
    require_same("the quantized model", report["rounded_loss"], scores[1].candidate_loss)
    calibration = Calibration(ratio, 2 * _main_values(plain), report["seconds"], report["peak_rss_gib"], None)
    row = row_of(name, group, options, calibration, scores, plain)
    losses = {name: round(report[f"{name}_loss"], 5) for name in ("plain", "rounded")}
    return {**row, "settings": report["settings"], "losses_there": losses, "peer_versions": report["versions"]}


def score(plain: DeepseekV3, rounded: DeepseekV3, options: argparse.Namespace) -> tuple[Scores, Comparison]:
    """Scores of both models on the held-out documents, and their losses compared."""
    scores = Scores()
    for document in heldout_documents(options):
        scores.add(document, plain, rounded, _window(options))
    cost = compare(scores.plain, scores.rounded, margin=0.01, confidence=0.95, bootstrap_samples=2000, seed=0)
    return scores, cost


def heldout_documents(options: argparse.Namespace) -> Iterator[HeldoutDocument]:
    """Held-out documents that have something to score."""
    found = islice(iterate_heldout(str(options.run_dir / "data"), options.max_tokens), options.documents)
    return (document for document in found if any(document.loss_mask))


def row_of(
    name: str,
    group: int,
    options: argparse.Namespace,
    calibration: Calibration,
    scored: tuple[Scores, Comparison],
    plain: DeepseekV3,
) -> dict[str, object]:
    """Row of a method, without date and command."""
    scores, cost = scored
    timed = not options.without_speeds
    row: dict[str, object] = {
        "format": f"W4A16 g{group}" + (", routed experts" if options.experts_only else ""),
        "method": name,
        "model": f"{options.run_dir.name}: hidden {plain.config.hidden_size}, {plain.config.num_hidden_layers} layers",
        "bytes_ratio": round(calibration.bytes_ratio, 4),
        "dnll": round(cost.difference, 5),
        "dnll_upper": round(cost.upper_one_sided, 5),
        "kl": round(scores.kl / cost.tokens, 5),
        "top1": round(scores.agreed / cost.tokens, 4),
        "gb_s_read": round(calibration.plain_bytes / calibration.seconds / 1e9, 5) if timed else None,
        "copy_gb_s": round(copy_speed(options.run_dir / "export"), 3) if timed else None,
        "peak_rss_gib": round(calibration.peak_gib, 3),
        "plain_loss": round(cost.baseline_loss, 4),
        "tokens": {
            "calibration": sum(map(len, calibration_set(options.run_dir, options.sequences))),
            "heldout": cost.tokens,
        },
        "expert_tokens": calibration.expert_tokens,
    }
    return {**row, "seconds": round(calibration.seconds, 1)} if timed else row


def _main_values(model: DeepseekV3) -> int:
    return sum(entry.numel() for name, entry in model.state_dict().items() if not name.startswith(MTP))


def _window(options: argparse.Namespace) -> int:
    return TokenDataset(str(options.run_dir / "data")).manifest.sequence_length


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
    parser.add_argument("--peer_python", type=Path, help="python of an environment with llm-compressor, for its rows")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--without_speeds", action="store_true", help="other programs keep the machine busy")
    parser.add_argument("--output", help="append the rows to this file too")
    options = parser.parse_args()
    about = {
        "date": date.today().isoformat(),
        "device": f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "command": "python -m benchmarks.quantize_methods " + shlex.join(sys.argv[1:]),
    }
    if options.experts_only and options.peer_python:
        parser.error("--peer_python quantizes all projections: leave out --experts_only")
    measures = [(measure, name) for name in options.methods]
    if options.peer_python:
        measures += [(measure_peer, name) for name in options.peers]
    for group in options.groups:
        for one, name in measures:
            row = {**one(name, group, options), **about}
            print(json.dumps(row), flush=True)
            if options.output:
                with open(options.output, "a") as handle:
                    handle.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
