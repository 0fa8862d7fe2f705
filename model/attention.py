"""Multi-head latent attention, MLA (DeepSeek-V2, arXiv 2405.04434, section 2.1), with and without a low-rank query.

Queries, latents and attend are public methods, so that an engine can keep a KV cache of latents between them.

Shapes: B batch, T query position, S key position, D hidden, H head, Q = qk_nope + qk_rope width of a head,
V value width of a head, C latent width (kv_lora_rank), R rotary width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.document_mask import Documents, has_varlen_kernel, varlen_attention
from model.layers import RMSNorm
from model.model_config import ModelConfig
from model.rope import RotaryTables, rotate

# Fastest first for 192/128-wide heads (measured on an H200, torch 2.11, 2026-11-24: cuDNN 0.64 ms forward against
# 1.42 for flash with padded values and 2.50 for memory-efficient). cuDNN takes no fp32: the others follow.
_CUDA_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# Without gradients lengths vary from call to call (prompts, documents), and cuDNN plans 60 to 75 ms for each new
# shape, where the memory-efficient kernel takes 0.1 to 0.3 ms (H100, torch 2.11, 2026-11-24).
_CUDA_BACKENDS_WITHOUT_GRADIENTS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

# Of the norms of both latents, whatever rms_norm_eps is: the released code and transformers leave it out there.
_LATENT_NORM_EPS = 1e-6


class Latents(NamedTuple):
    """MLA's compressed keys and values: normalised latents, and the rotated key part that all heads share."""

    compressed_BSC: Tensor
    k_rope_BSR: Tensor


GatherLatents = Callable[[Latents], tuple[Latents, tuple[int, ...]]]
"""Latents of this rank's positions -> latents of the whole sequence, and the end in it of each equal query chunk."""


class Attention(nn.Module):
    """Causal multi-head latent attention. Parameter names are those of the released files."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gather_latents: GatherLatents | None = None
        """Set under context parallelism: this rank has only some positions of each sequence."""
        self.heads = config.num_attention_heads
        self.nope_width, self.rope_width = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value_width, self.latent_width = config.v_head_dim, config.kv_lora_rank
        self.scale = config.softmax_scale
        width, query_width = config.hidden_size, config.num_attention_heads * config.qk_head_dim
        self.low_rank_query = config.q_lora_rank is not None
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(width, query_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(width, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, _LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(width, self.latent_width + self.rope_width, bias=False)
        self.kv_a_layernorm = RMSNorm(self.latent_width, _LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(self.latent_width, self.heads * (self.nope_width + self.value_width), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value_width, width, bias=False)

    def queries(self, x_BTD: Tensor, tables: RotaryTables) -> tuple[Tensor, Tensor]:
        """Unrotated part [B, T, H, qk_nope] and rotated part [B, T, H, R] of each query head."""
        latent = self.q_a_layernorm(self.q_a_proj(x_BTD)) if self.low_rank_query else x_BTD
        q_BTX = self.q_b_proj(latent) if self.low_rank_query else self.q_proj(latent)
        q_BTHQ = q_BTX.unflatten(-1, (self.heads, -1))
        q_nope, q_rope = q_BTHQ.split([self.nope_width, self.rope_width], dim=-1)
        return q_nope, rotate(q_rope, tables)

    def latents(self, x_BTD: Tensor, tables: RotaryTables) -> Latents:
        """Latent [B, S, C] and rotated shared key [B, S, R] of each token: C + R numbers, all that a KV cache needs."""
        compressed, k_rope = self.kv_a_proj_with_mqa(x_BTD).split([self.latent_width, self.rope_width], dim=-1)
        return Latents(self.kv_a_layernorm(compressed), rotate(k_rope[:, :, None], tables)[:, :, 0])

    def attend(
        self,
        queries: tuple[Tensor, Tensor],
        latents: Latents,
        mask_BHTS: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Attention of `queries` over `latents`, projected back to [B, T, D].

        Args:
            mask_BHTS: True where a query attends to a key (any dimension may be 1). `None` is causal, T = S.
            documents: instead of a mask: causal within each of these.
        """
        q_BHTQ = torch.cat(queries, dim=-1).transpose(1, 2)
        k_BHSQ, v_BHSV = self._keys_and_values(latents)
        if documents is not None and has_varlen_kernel(q_BHTQ):
            return self._project(varlen_attention(q_BHTQ, k_BHSQ, v_BHSV, self.scale, documents))
        mask_BHTS = mask_BHTS if documents is None else documents.mask_B1TT
        return self._project(scaled_dot_product(q_BHTQ, k_BHSQ, v_BHSV, self.scale, mask_BHTS))

    def _keys_and_values(self, latents: Latents) -> tuple[Tensor, Tensor]:
        kv_BSHX = self.kv_b_proj(latents.compressed_BSC).unflatten(-1, (self.heads, -1))
        k_nope, v_BSHV = kv_BSHX.split([self.nope_width, self.value_width], dim=-1)
        k_rope = latents.k_rope_BSR[:, :, None].expand(-1, -1, self.heads, -1)
        return torch.cat([k_nope, k_rope], dim=-1).transpose(1, 2), v_BSHV.transpose(1, 2)

    def _project(self, mixed_BHTV: Tensor) -> Tensor:
        out: Tensor = self.o_proj(mixed_BHTV.transpose(1, 2).flatten(2))
        return out

    def forward(self, x_BTD: Tensor, tables: RotaryTables, documents: Documents | None = None) -> Tensor:
        """Causal self-attention [B, T, D] within each sequence, or within each of `documents`.

        Under context parallelism the T positions of this rank attend over all S.
        """
        queries, latents = self.queries(x_BTD, tables), self.latents(x_BTD, tables)
        if self.gather_latents is None:
            return self.attend(queries, latents, documents=documents)
        latents, ends = self.gather_latents(latents)
        k_BHSQ, v_BHSV = self._keys_and_values(latents)
        chunks = torch.cat(queries, dim=-1).transpose(1, 2).chunk(len(ends), dim=2)
        mixed = [
            suffix_attention(q_BHTQ, k_BHSQ[:, :, :end], v_BHSV[:, :, :end], self.scale)
            for q_BHTQ, end in zip(chunks, ends, strict=True)
        ]
        return self._project(torch.cat(mixed, dim=2))


def scaled_dot_product(
    q_BHTQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, scale: float, mask_BHTS: Tensor | None
) -> Tensor:
    """softmax(q k^T scale) v [B, H, T, V] by the fastest kernel that takes these shapes; causal without a mask."""
    causal = mask_BHTS is None
    if q_BHTQ.is_cuda:
        backends = _CUDA_BACKENDS if torch.is_grad_enabled() else _CUDA_BACKENDS_WITHOUT_GRADIENTS
        with sdpa_kernel(backends, set_priority=True):
            return F.scaled_dot_product_attention(
                q_BHTQ, k_BHSQ, v_BHSV, attn_mask=mask_BHTS, is_causal=causal, scale=scale
            )
    # The CPU's fused kernel needs equal key and value widths; without it the T x S scores are materialized.
    value_width = v_BHSV.shape[-1]
    padding = q_BHTQ.shape[-1] - value_width
    if padding > 0:
        v_BHSV = F.pad(v_BHSV, (0, padding))
    mixed = F.scaled_dot_product_attention(q_BHTQ, k_BHSQ, v_BHSV, attn_mask=mask_BHTS, is_causal=causal, scale=scale)
    return mixed[..., :value_width] if padding > 0 else mixed


def suffix_attention(q_BHTQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, scale: float) -> Tensor:
    """Causal attention of the last T of S positions [B, H, T, V]; `scaled_dot_product` when T is S."""
    length, total = q_BHTQ.shape[2], k_BHSQ.shape[2]
    if length == total:
        return scaled_dot_product(q_BHTQ, k_BHSQ, v_BHSV, scale, None)
    if not q_BHTQ.is_cuda:
        mask_TS = torch.ones(length, total, dtype=torch.bool, device=q_BHTQ.device).tril(total - length)
        return scaled_dot_product(q_BHTQ, k_BHSQ, v_BHSV, scale, mask_TS)
    from torch.nn.attention.bias import causal_lower_right  # imports the compiler: a second that few processes need

    # Flash applies this mask without materializing it, but only for values as wide as keys.
    value_width = v_BHSV.shape[-1]
    v_BHSV = F.pad(v_BHSV, (0, q_BHTQ.shape[-1] - value_width))
    mask = causal_lower_right(length, total)
    return F.scaled_dot_product_attention(q_BHTQ, k_BHSQ, v_BHSV, attn_mask=mask, scale=scale)[..., :value_width]
