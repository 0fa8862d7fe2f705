"""Inputs of linear layers as they are in models: channels that depend on each other, and differ in magnitude."""

import torch


def correlated_rows(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -1.5, columns)
    return torch.randn(rows, columns, generator=generator) @ mixing.T / columns**0.5


def weight(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5
