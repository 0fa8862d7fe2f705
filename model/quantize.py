"""Quantization of a weights folder as a program: shard by shard, in any registered format, with an error report.

Weights that the format does not quantize keep their type. The loss that quantization costs is measured elsewhere, by an
evaluation. The same command goes on after it was interrupted, killed, or ran out of disk. Weights are rounded to the
nearest here; `python -m cherry.calibration.quantize` takes the same flags, and those of a calibration.

    python -m model.quantize --source <folder> --target <folder> [--format <name>] [--workers <n>]
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from base import storage
from base.errors import ArgumentParser, ConfigError, run_program
from base.progress import print_progress
from model.numerics.formats import DEFAULT_FORMAT
from model.quantization.calibrated import Calibration
from model.quantization.coverage import calibration_line
from model.quantization.folder import default_workers, quantize_folder
from model.quantization.plan import plan_groups
from model.quantization.report import REPORT_NAME
from model.quantization.shard import quantize_groups

__all__ = ["REPORT_NAME", "plan_groups", "quantize_folder", "quantize_groups"]

_SHOWN = 3


def main() -> None:
    """Quantize the folder `--source` into `--target`, and print progress and the errors by kind."""
    quantize(make_parser("python -m model.quantize").parse_args())


def make_parser(program: str) -> ArgumentParser:
    """Parser of the arguments that `quantize` takes."""
    parser = ArgumentParser(prog=program, description="quantize a weights folder, shard by shard")
    parser.add_argument("--source", required=True, help="folder or URI in Hugging Face's layout")
    parser.add_argument("--target", required=True, help="folder or URI to write")
    parser.add_argument("--format", default=DEFAULT_FORMAT, help=f"quantization format ({DEFAULT_FORMAT})")
    parser.add_argument(
        "--workers", type=int, help="processes, each with a shard in memory (default: a core each, at most the shards)"
    )
    return parser


def quantize(arguments: Namespace, calibration: Calibration | None = None) -> None:
    """Quantize as `make_parser`'s arguments say, and print progress and the errors by kind.

    Raises:
        ConfigError: an argument breaks a rule.
        CherryError: see `quantize_folder`.
    """
    if arguments.workers is not None and arguments.workers < 1:
        raise ConfigError(f"--workers: must be at least 1 (got {arguments.workers})")
    report = quantize_folder(
        arguments.source,
        arguments.target,
        lambda line, fraction: print_progress(f"{fraction:4.0%} {line}", fraction),
        format_name=arguments.format,
        workers=default_workers(arguments.source) if arguments.workers is None else arguments.workers,
        calibration=calibration,
    )
    for line in _summary(report, arguments.target):
        print(line)


def _summary(report: dict[str, Any], target_uri: str) -> list[str]:
    lines = []
    for row in report["by_kind"]:
        clipped = "" if row["clipped"] is None else f", {row['clipped']:.4%} clipped"
        size = f"{row['bytes_before']:,} -> {row['bytes_after']:,} bytes"
        lines.append(
            f"  {row['kind']}: {row['tensors']} tensors, {size}, relative error {row['rel_error']:.2%}{clipped}"
        )
    if "calibration" in report:
        lines.append(f"  {calibration_line(report['method'], report['calibration'])}")
    worst = [f"{row['name']} {row['rel_error']:.2%}" for row in report.get("largest_errors", [])[:_SHOWN]]
    return [
        *lines,
        *([f"  largest: {', '.join(worst)}"] if worst else []),
        f"{report['quantized_tensors']} tensors, {report['bytes_before']:,} -> {report['bytes_after']:,} bytes "
        f"({report['ratio']:.3f}), mean relative error {report.get('mean_rel_error', 0.0):.2%}; "
        f"report in {storage.join(target_uri, REPORT_NAME)}",
    ]


if __name__ == "__main__":
    raise SystemExit(run_program(main))
