"""Document masking for packed sequences: block-causal masks, and variable-length (varlen) attention.

Each document in a packed row begins with bos. A row's first tokens may be the rest of a document that began in another
row: they are a document of their own here.

Shapes: B batch, T position, N = B T tokens, S document (and boundary), H head, Q query and key width, V value width.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

# Boundaries come in multiples of this, so that a kernel (or its compiler) sees few different shapes.
_BOUNDARY_MULTIPLE = 64


class Documents:
    """Document boundaries of a batch of packed rows. Build it on the CPU: on a GPU counting documents synchronizes.

    Not a tuple or a dataclass, so that FSDP2's mixed precision does not cast its tensors (see `RotaryTables`).
    """

    def __init__(self, tokens_BT: Tensor, bos_id: int) -> None:
        starts_BT = tokens_BT == bos_id
        place_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        self.document_BT = starts_BT.cumsum(dim=1, dtype=torch.int32)
        """Document index of each token within its row."""
        self.position_BT = place_T - torch.where(starts_BT, place_T, 0).cummax(dim=1).values
        """Position of each token, from 0 in every document."""
        begins_S = (self.position_BT == 0).flatten().nonzero().flatten()
        padding = _BOUNDARY_MULTIPLE - begins_S.shape[0] % _BOUNDARY_MULTIPLE
        self.boundaries_S = F.pad(begins_S, (0, padding), value=tokens_BT.numel()).to(torch.int32)
        """Cumulative document lengths (cu_seqlens) over all N tokens, padded with N: those are empty documents."""
        self._mask_B1TT: Tensor | None = None

    def to(self, device: torch.device) -> Self:
        """Move all tensors to `device`, in place."""
        for name in ("document_BT", "position_BT", "boundaries_S"):
            setattr(self, name, getattr(self, name).to(device, non_blocking=True))
        self._mask_B1TT = None
        return self

    def pin_memory(self) -> Self:
        """Move all tensors to page-locked memory, in place."""
        for name in ("document_BT", "position_BT", "boundaries_S"):
            setattr(self, name, getattr(self, name).pin_memory())
        return self

    @property
    def mask_B1TT(self) -> Tensor:
        """Mask [B, 1, T, T], True where a query (row) attends to a key (column); built once for all layers."""
        if self._mask_B1TT is None:
            length = self.document_BT.shape[1]
            causal_TT = torch.ones(length, length, dtype=torch.bool, device=self.document_BT.device).tril()
            same_BTT = self.document_BT[:, :, None] == self.document_BT[:, None, :]
            self._mask_B1TT = (same_BTT & causal_TT)[:, None]
        return self._mask_B1TT


def has_varlen_kernel(q_BHTQ: Tensor) -> bool:
    """True for queries that `varlen_attention` takes: half precision on CUDA."""
    return q_BHTQ.is_cuda and q_BHTQ.dtype in (torch.bfloat16, torch.float16)


def varlen_attention(q_BHTQ: Tensor, k_BHTQ: Tensor, v_BHTV: Tensor, scale: float, documents: Documents) -> Tensor:
    """softmax(q k^T scale) v [B, H, T, V], causal within each document; scores across documents are not computed.

    FlashAttention with cu_seqlens, values padded to the keys' width, which it needs. 4 x 16 heads x 4,096 of 192/128,
    forward and backward, documents of 256 / 1,024 tokens: 2.8 / 3.8 ms; a compiled flex_attention 3.2 / 4.3 and 0.5 for
    its mask; cuDNN with a mask 11; the memory-efficient kernel with one 55; cuDNN over whole rows 3.1 (H100,
    torch 2.11, 2026-11-25).
    """
    from torch.nn.attention.varlen import varlen_attn

    rows, length, width = q_BHTQ.shape[0], q_BHTQ.shape[2], v_BHTV.shape[-1]
    v_BHTV = F.pad(v_BHTV, (0, q_BHTQ.shape[-1] - width))
    q_NHQ, k_NHQ, v_NHQ = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTQ, k_BHTQ, v_BHTV))
    at_S = documents.boundaries_S
    out_NHQ = varlen_attn(q_NHQ, k_NHQ, v_NHQ, at_S, at_S, length, length, scale=scale, window_size=(-1, 0))
    assert isinstance(out_NHQ, Tensor)
    return out_NHQ[..., :width].view(rows, length, -1, width).transpose(1, 2)
