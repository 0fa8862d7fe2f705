"""Inputs of linear layers as they are in models, and the results of a calibration.

The inputs' channels depend on each other, and differ in magnitude.
"""

from collections.abc import Iterator
from typing import Any

import torch

from model.calibration.results import Result, read_results
from model.calibration.runner import calibrated_layers


def correlated_rows(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -1.5, columns)
    return torch.randn(rows, columns, generator=generator) @ mixing.T / columns**0.5


def weight(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5


def calibrated(*arguments: Any, **settings: Any) -> Iterator[tuple[str, Result]]:
    """Results of `calibrated_layers`, layer after layer."""
    return read_results(calibrated_layers(*arguments, **settings))
