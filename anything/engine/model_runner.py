"""Owns one step of the embedded engine on tensors: the paged latent cache, ragged attention over it, and sampling.

It knows nothing of requests, threads or text, and takes weights, rotary embeddings, router and experts from model/.

The cache holds kv_lora_rank + qk_rope_head_dim numbers a token and layer (DeepSeek-V2, arXiv 2405.04434, section 2.1).
Decoding is absorbed: W_UK goes into the query and W_UV behind the sum, so that attention runs on the latents
themselves, and all heads share one key and one value. Prompts take model/'s own attention, which needs fewer FLOPs
for many queries.

Shapes: N token of this step, L layer, Z slot of the cache, X = C + R numbers of a slot, C latent, R rotary, D hidden,
B sequence that decodes, S position in a sequence, T token of one prompt's chunk, H head, P unrotated width, V value
width, Y vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequenced
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from anything.engine.scheduler import Row
from model.attention import Attention, Latents
from model.rope import rotary_tables
from model.transformer import Block, DeepseekV3


@dataclass(frozen=True)
class Sampling:
    """How one sequence's next token is drawn."""

    temperature: float
    """0 takes the likeliest."""
    generator: torch.Generator | None = None
    """Needed when the temperature is not 0."""


@dataclass(frozen=True)
class _Chunk:
    """Rows [first, last) of the step that are one prompt's, and the slots of that sequence up to the last of them."""

    first: int
    last: int
    slots_S: Tensor
    mask_11TS: Tensor | None


@dataclass(frozen=True)
class _Batch:
    """A step's rows as tensors. The rows of sequences that decode come first."""

    tokens_N: Tensor
    positions_N: Tensor
    slots_N: Tensor
    decode_slots_BS: Tensor
    decode_mask_B1S: Tensor
    """False behind a sequence's last token."""
    chunks: list[_Chunk]
    sampled_rows: list[int]


class Forward:
    """A model and its cache. Not for several threads at a time."""

    def __init__(self, model: DeepseekV3, *, blocks: int, block_tokens: int) -> None:
        config = model.config
        self._model = model
        self._block_tokens = block_tokens
        self._latent_width = config.kv_lora_rank
        weight = model.embed_tokens.weight
        self._device = weight.device
        width = config.kv_lora_rank + config.qk_rope_head_dim
        shape = (config.num_hidden_layers, blocks * block_tokens, width)
        self.cache_LZX = torch.zeros(shape, dtype=weight.dtype, device=weight.device)

    @torch.inference_mode()
    def step(self, rows: Sequenced[Row]) -> tuple[list[int], Tensor]:
        """Compute the rows, and fill their places in the cache.

        Returns:
            The indices in `rows` of those that sample, and their logits [N, Y] in that order, fp32.
        """
        order = sorted(range(len(rows)), key=lambda index: rows[index].count > 1)
        batch = self._batch([rows[index] for index in order])
        tables = rotary_tables(self._model.config, batch.positions_N)
        x_1ND = self._model.embed_tokens(batch.tokens_N)[None]
        for index, module in enumerate(self._model.layers):
            layer = cast(Block, module)
            normed_1ND = layer.input_layernorm(x_1ND)
            queries = layer.self_attn.queries(normed_1ND, tables)
            cache_ZX = self.cache_LZX[index]
            cache_ZX[batch.slots_N] = torch.cat(layer.self_attn.latents(normed_1ND, tables), dim=-1)[0]
            x_1ND = x_1ND + self._attend(layer.self_attn, queries, cache_ZX, batch)
            x_1ND = layer.feed_forward(x_1ND).hidden_BTD
        last_ND = self._model.norm(x_1ND[0, batch.sampled_rows])
        logits_NY = self._model.logits(last_ND).float()
        return [index for index in order if rows[index].samples], logits_NY

    def _attend(self, attention: Attention, queries: tuple[Tensor, Tensor], cache_ZX: Tensor, batch: _Batch) -> Tensor:
        decoding = batch.decode_slots_BS.shape[0]
        parts = []
        if decoding:
            latents_BSX = cache_ZX[batch.decode_slots_BS]
            of_decode = (queries[0][0, :decoding], queries[1][0, :decoding])
            parts.append(absorbed_attention(attention, of_decode, latents_BSX, batch.decode_mask_B1S)[None])
        for chunk in batch.chunks:
            latents_1SX = cache_ZX[chunk.slots_S][None]
            latents = Latents(latents_1SX[..., : self._latent_width], latents_1SX[..., self._latent_width :])
            of_chunk = (queries[0][:, chunk.first : chunk.last], queries[1][:, chunk.first : chunk.last])
            parts.append(attention.attend(of_chunk, latents, chunk.mask_11TS))
        return torch.cat(parts, dim=1)

    def _batch(self, rows: list[Row]) -> _Batch:
        decoding = [row for row in rows if row.count == 1]
        lengths_B = self._tensor([row.start + 1 for row in decoding])
        longest = max((row.start + 1 for row in decoding), default=0)
        chunks, sampled, first = [], [], 0
        for row in rows:
            last = first + row.count
            if row.count > 1:
                slots_S = self._slots([row], last=row.start + row.count)[0]
                chunks.append(_Chunk(first, last, slots_S, self._causal_mask(row)))
            if row.samples:
                sampled.append(last - 1)
            first = last
        positions = [row.start + offset for row in rows for offset in range(row.count)]
        owners = [row for row in rows for _ in range(row.count)]
        size = self._block_tokens
        slots = [row.blocks[p // size] * size + p % size for row, p in zip(owners, positions, strict=True)]
        return _Batch(
            tokens_N=self._tensor([token for row in rows for token in row.tokens]),
            positions_N=self._tensor(positions),
            slots_N=self._tensor(slots),
            decode_slots_BS=self._slots(decoding, last=longest),
            decode_mask_B1S=(torch.arange(longest, device=self._device) < lengths_B[:, None])[:, None],
            chunks=chunks,
            sampled_rows=sampled,
        )

    def _slots(self, rows: list[Row], *, last: int) -> Tensor:
        """The cache's slots [B, last] of each row's sequence; what a sequence does not reach points anywhere."""
        size = self._block_tokens
        width = -(-last // size)
        tables = [[*row.blocks, *[0] * width][:width] for row in rows]
        blocks_BX = self._tensor(tables).view(len(rows), width)
        within = torch.arange(size, device=self._device)
        return (blocks_BX[:, :, None] * size + within).flatten(1)[:, :last]

    def _causal_mask(self, row: Row) -> Tensor | None:
        """True where a query of the chunk may look; None at a prompt's start: causal attention needs no mask there."""
        if row.start == 0:
            return None
        query_T = torch.arange(row.start, row.start + row.count, device=self._device)
        key_S = torch.arange(row.start + row.count, device=self._device)
        return (key_S <= query_T[:, None])[None, None]

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def absorbed_attention(
    attention: Attention, queries: tuple[Tensor, Tensor], latents_BSX: Tensor, mask_B1S: Tensor
) -> Tensor:
    """Attention of one query per sequence on cached latents, projected back to [B, D].

    Plain matrix products: heads share key and value, so they are the rows of one product per sequence. No fused
    kernel takes a width of C + R = 576, and cuDNN plans anew for each length, which changes at every step.

    Args:
        queries: the unrotated part [B, H, P] and the rotated part [B, H, R].
        mask_B1S: True where a sequence has a token.
    """
    width = attention.latent_width
    kv_b_HXC = attention.kv_b_proj.weight.view(attention.heads, -1, width)
    w_uk_HPC, w_uv_HVC = torch.split(kv_b_HXC, [attention.nope_width, attention.value_width], dim=1)
    q_latent_BHC = torch.einsum("bhp,hpc->bhc", queries[0], w_uk_HPC)
    q_BHX = torch.cat([q_latent_BHC, queries[1]], dim=-1) * attention.scale
    scores_BHS = torch.bmm(q_BHX, latents_BSX.transpose(1, 2)).float()
    share_BHS = scores_BHS.masked_fill(~mask_B1S, float("-inf")).softmax(dim=-1)
    mixed_BHC = torch.bmm(share_BHS.to(latents_BSX.dtype), latents_BSX[..., :width])
    value_BHV = torch.einsum("bhc,hvc->bhv", mixed_BHC, w_uv_HVC)
    out_BD: Tensor = attention.o_proj(value_BHV.flatten(1))
    return out_BD


@torch.inference_mode()
def draw(logits_NY: Tensor, samplings: Sequenced[Sampling]) -> list[int]:
    """The next token of each row. The same generator and logits give the same token, whatever else is in the batch."""
    tokens = cast(list[int], logits_NY.argmax(dim=-1).tolist())
    for row, sampling in enumerate(samplings):
        if sampling.temperature > 0.0:
            # Shifted before dividing: a small temperature gives -inf, not inf - inf.
            scaled_Y = (logits_NY[row] - logits_NY[row].max()).cpu() / sampling.temperature
            tokens[row] = int(torch.multinomial(scaled_Y.softmax(dim=-1), 1, generator=sampling.generator))
    return tokens
