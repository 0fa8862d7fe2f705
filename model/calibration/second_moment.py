"""Second moment of a linear layer's inputs, H = mean of x x^T, and the output error that it measures.

With H the squared error of the outputs over all calibration rows needs neither the rows nor the outputs:
||(W - Q) X||^2 = tr((W - Q) H (W - Q)^T).

Shapes: N row, O output channel, I input channel.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SecondMoment:
    """Sum of x x^T over the rows seen, fp32 [I, I]: 4 I^2 bytes, 206 MB for 7,168 channels."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.sum_II = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Add rows [..., I] of any float type."""
        x_NI = x.reshape(-1, x.shape[-1]).float()
        self.sum_II.addmm_(x_NI.T, x_NI)
        self.rows += x_NI.shape[0]

    def mean(self) -> Tensor:
        """H, fp32 [I, I]; zeros when no row was seen."""
        return self.sum_II / max(self.rows, 1)

    def shrinkage(self) -> float:
        """Share of a multiple of the identity in `shrunk`: 1 without rows, nearly 0 with many rows a channel.

        The oracle approximating shrinkage of Chen, Wiesel, Eldar and Hero 2010 (arXiv 0907.4698, equation 23).
        """
        width = self.sum_II.shape[0]
        square = self.mean().double().square().sum().item()
        trace = self.mean().double().trace().item()
        spread = (self.rows + 1 - 2 / width) * (square - trace**2 / width)
        return min(1.0, ((1 - 2 / width) * square + trace**2) / spread) if spread > 0 else 1.0

    def shrunk(self) -> Tensor:
        """H moved towards its mean diagonal where the rows are few, fp32 [I, I]; then errors count as the weights' own.

        Few rows leave directions in which H is zero by chance, and GPTQ moves all error there. A feed-forward of 128
        and 384 channels, error of unseen rows over that of rounding to the nearest: from 96 rows GPTQ gives 1.63 with
        H dampened by 1 % of its mean diagonal and 0.73 with this, from 384 rows 0.92 and 0.60, from 16,384 both 0.47
        (a trained model of 4 layers, 2026-11-30).
        """
        part = self.shrinkage()
        mean_II = self.mean()
        diagonal = mean_II.diagonal().mean().item()
        mean_II.mul_(1 - part).diagonal().add_(part * diagonal)
        return mean_II


def output_error(error_OI: Tensor, moment_II: Tensor) -> Tensor:
    """Squared error of each output channel [O] for weights that are off by `error_OI`, over H's rows (their mean)."""
    return ((error_OI.float() @ moment_II) * error_OI.float()).sum(dim=1).clamp_min_(0.0)
