"""Fingerprints of tensors by their bits: equal tensors have equal ones, whatever order an adder takes."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD_BYTES = 8


@torch.no_grad()
def bit_sum(x: Tensor) -> Tensor:
    """Sum of a tensor's bytes read as 64-bit integers, modulo 2^64: 0-dim int64 on its device.

    Integers add up exactly, so that a device's order of adding does not show; one flipped bit does, in a NaN too.
    """
    # A dimension of one element may have any stride and count as contiguous.
    bytes_N = x.detach().contiguous().as_strided((x.numel(),), (1,)).view(torch.uint8)
    odd = bytes_N.numel() % _WORD_BYTES
    if odd or bytes_N.storage_offset() % _WORD_BYTES:  # no words as it lies: a shard may begin anywhere
        bytes_N = torch.cat([bytes_N, bytes_N.new_zeros((_WORD_BYTES - odd) % _WORD_BYTES)])
    return bytes_N.view(torch.int64).sum()
