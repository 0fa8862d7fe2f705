"""Quantization of a weights folder as a program, calibrated or not: `model.quantize` with a calibration's flags.

    python -m cherry.calibration.quantize --source <folder> --target <folder> [--format <name>] [--workers <n>]
        [--method <name> --calibration <data> [--calibration-tokens <n>]]

Calibration data is a run's prepared directory (`runs/NAME/data`), or text and records, which are encoded by the
tokenizer beside the weights. The same command goes on after it was interrupted: with the layer after the last one that
is calibrated, then with the shards that are not written.
"""

from __future__ import annotations

from argparse import Namespace

import torch

from base.errors import ConfigError, run_program
from cherry.calibration.documents import FILE_SEQUENCE_LENGTH, calibration_documents
from model.calibration.names import CALIBRATED, DEFAULT_SEQUENCES, METHODS, NEAREST, method_rule
from model.numerics.formats import find_format
from model.quantization.calibrated import Calibration, check_method
from model.quantize import make_parser, quantize


def main() -> None:
    """Quantize the folder `--source` into `--target`, and print progress and the errors by kind."""
    parser = make_parser("python -m cherry.calibration.quantize")
    parser.add_argument(
        "--method", default=NEAREST, help=f"how int4 weights are rounded: {', '.join(METHODS)} ({NEAREST})"
    )
    parser.add_argument("--calibration", help="a run's data directory, or a file, folder or glob of text or JSON lines")
    parser.add_argument(
        "--calibration-tokens",
        type=int,
        help=f"tokens to calibrate with (default: {DEFAULT_SEQUENCES} sequences, of {FILE_SEQUENCE_LENGTH} of a file)",
    )
    arguments = parser.parse_args()
    quantize(arguments, _calibration(arguments))


def _calibration(arguments: Namespace) -> Calibration | None:
    """The calibration that the flags ask for.

    Raises:
        ConfigError: they contradict each other.
        CherryError: see `calibration_documents`.
    """
    method, data, tokens = arguments.method, arguments.calibration, arguments.calibration_tokens
    if method not in METHODS:
        raise ConfigError(f"--method: {method_rule()} (got {method!r})")
    find_format(arguments.format)
    check_method(method, arguments.format)
    if tokens is not None and tokens < 1:
        raise ConfigError(f"--calibration-tokens: must be at least 1 (got {tokens})")
    if method == NEAREST:
        for flag, value in (("--calibration", data), ("--calibration-tokens", tokens)):
            if value is not None:
                raise ConfigError(
                    f"{flag}: --method {NEAREST} needs no calibration (got {value}). Leave it out, or take --method "
                    f"{' or '.join(CALIBRATED)}."
                )
        return None
    if data is None:
        raise ConfigError(
            f"--method {method} needs --calibration: name a run's data directory, or a file of text like what the "
            "model will read."
        )
    documents = calibration_documents(data, arguments.source, tokens)
    return Calibration(method, [torch.from_numpy(document.copy()) for document in documents])


if __name__ == "__main__":
    raise SystemExit(run_program(main))
