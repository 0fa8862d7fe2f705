"""Model runner of the embedded engine: forward pass over a paged latent cache, ragged attention, and sampling.

Weights, rotary embeddings, router and experts are those of model/.

The cache holds kv_lora_rank + qk_rope_head_dim numbers a token and layer (DeepSeek-V2, arXiv 2405.04434, section 2.1).
Decode is absorbed: W_UK is applied to the query and W_UV to the weighted sum, so that attention runs on the latents
themselves, and all heads share one key and one value. Prefill uses model/'s own attention, which needs fewer FLOPs
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

from anything.engine.scheduler import ScheduledChunk, Sequence
from model.attention import Attention, Latents
from model.rope import rotary_tables
from model.transformer import Block, DeepseekV3

# Below this a temperature is greedy: logits as float32 do not tell such small differences apart, and 1e-46 is no
# float32 at all. vLLM's limit (v1/sample/sampler.py, _SAMPLING_EPS).
_GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of one sequence."""

    temperature: float
    """0 is greedy, as is anything below 1e-5."""
    generator: torch.Generator | None = None
    """Random state; needed when the temperature is not 0."""


class NonFiniteError(ArithmeticError):
    """The model gave a NaN or infinite number for a sequence, so that there is no next token."""


@dataclass(frozen=True)
class StepOutput:
    """Logits of a step, and the chunks whose numbers are not finite."""

    sampled: list[int]
    """Indices of the chunks that sample."""
    logits_NY: Tensor
    """Logits in the order of `sampled`, fp32."""
    broken: list[int]
    """Indices of the chunks with a NaN or infinite number in their latents. The cache has zeros in its place."""


@dataclass(frozen=True)
class _Prefill:
    """Tokens [first, last) of the step that are one prefill chunk, and its sequence's cache slots up to there."""

    first: int
    last: int
    slots_S: Tensor
    mask_11TS: Tensor | None


@dataclass(frozen=True)
class _Batch:
    """Tensors of a step's tokens, those of decoding sequences first."""

    tokens_N: Tensor
    positions_N: Tensor
    slots_N: Tensor
    decode_slots_BS: Tensor
    decode_mask_B1S: Tensor
    """False beyond a sequence's last token."""
    prefills: list[_Prefill]
    sampled_rows: list[int]


class ModelRunner:
    """A model and its latent cache. Not thread-safe."""

    def __init__(self, model: DeepseekV3, *, blocks: int, block_tokens: int) -> None:
        config = model.config
        self._model = model
        self._block_tokens = block_tokens
        self._latent_width = config.kv_lora_rank
        weight = model.embed_tokens.weight
        self._device = weight.device
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self._shape = (config.num_hidden_layers, blocks * block_tokens, width)
        self._dtype = weight.dtype
        self.cache_LZX = self._new_cache()

    def reset(self) -> None:
        """Allocate the cache anew, and raise what one token raises if the model still does not run."""
        self.cache_LZX = torch.empty(0)  # there may be no memory for two
        self.cache_LZX = self._new_cache()
        probe = Sequence(0, [0], 1)
        self.step([ScheduledChunk(probe, 0, (0,), (0,), samples=True)])

    @torch.inference_mode()
    def step(self, chunks: Sequenced[ScheduledChunk]) -> StepOutput:
        """Logits of the chunks that sample; fills the cache, which never holds a number that is not finite.

        A later sequence reads slots of the cache that are masked out: there 0 * NaN would be NaN.
        """
        order = sorted(range(len(chunks)), key=lambda index: chunks[index].count > 1)
        batch = self._batch([chunks[index] for index in order])
        tables = rotary_tables(self._model.config, batch.positions_N)
        finite_N = torch.ones_like(batch.tokens_N, dtype=torch.bool)
        x_1ND = self._model.embed_tokens(batch.tokens_N)[None]
        for index, module in enumerate(self._model.layers):
            layer = cast(Block, module)
            normed_1ND = layer.input_layernorm(x_1ND)
            queries = layer.self_attn.queries(normed_1ND, tables)
            cache_ZX = self.cache_LZX[index]
            latents_NX = torch.cat(layer.self_attn.latents(normed_1ND, tables), dim=-1)[0]
            finite_NX = latents_NX.isfinite()
            finite_N &= finite_NX.all(dim=-1)
            cache_ZX[batch.slots_N] = latents_NX.where(finite_NX, 0.0)
            x_1ND = x_1ND + self._attend(layer.self_attn, queries, cache_ZX, batch)
            x_1ND = layer.feed_forward(x_1ND).hidden_BTD
        last_ND = self._model.norm(x_1ND[0, batch.sampled_rows])
        logits_NY = self._model.logits(last_ND).float()
        owners = [index for index in order for _ in range(chunks[index].count)]
        broken = {index for index, finite in zip(owners, finite_N.tolist(), strict=True) if not finite}
        return StepOutput([index for index in order if chunks[index].samples], logits_NY, sorted(broken))

    def _new_cache(self) -> Tensor:
        return torch.zeros(self._shape, dtype=self._dtype, device=self._device)

    def _attend(self, attention: Attention, queries: tuple[Tensor, Tensor], cache_ZX: Tensor, batch: _Batch) -> Tensor:
        decoding = batch.decode_slots_BS.shape[0]
        outputs = []
        if decoding:
            latents_BSX = cache_ZX[batch.decode_slots_BS]
            of_decode = (queries[0][0, :decoding], queries[1][0, :decoding])
            outputs.append(absorbed_attention(attention, of_decode, latents_BSX, batch.decode_mask_B1S)[None])
        for prefill in batch.prefills:
            latents_1SX = cache_ZX[prefill.slots_S][None]
            latents = Latents(latents_1SX[..., : self._latent_width], latents_1SX[..., self._latent_width :])
            of_prefill = (queries[0][:, prefill.first : prefill.last], queries[1][:, prefill.first : prefill.last])
            outputs.append(attention.attend(of_prefill, latents, prefill.mask_11TS))
        return torch.cat(outputs, dim=1)

    def _batch(self, chunks: list[ScheduledChunk]) -> _Batch:
        decoding = [chunk for chunk in chunks if chunk.count == 1]
        lengths_B = self._tensor([chunk.start + 1 for chunk in decoding])
        longest = max((chunk.start + 1 for chunk in decoding), default=0)
        prefills, sampled, first = [], [], 0
        for chunk in chunks:
            last = first + chunk.count
            if chunk.count > 1:
                slots_S = self._slots([chunk], last=chunk.start + chunk.count)[0]
                prefills.append(_Prefill(first, last, slots_S, self._causal_mask(chunk)))
            if chunk.samples:
                sampled.append(last - 1)
            first = last
        positions = [chunk.start + offset for chunk in chunks for offset in range(chunk.count)]
        owners = [chunk for chunk in chunks for _ in range(chunk.count)]
        size = self._block_tokens
        slots = [chunk.blocks[p // size] * size + p % size for chunk, p in zip(owners, positions, strict=True)]
        return _Batch(
            tokens_N=self._tensor([token for chunk in chunks for token in chunk.tokens]),
            positions_N=self._tensor(positions),
            slots_N=self._tensor(slots),
            decode_slots_BS=self._slots(decoding, last=longest),
            decode_mask_B1S=(torch.arange(longest, device=self._device) < lengths_B[:, None])[:, None],
            prefills=prefills,
            sampled_rows=sampled,
        )

    def _slots(self, chunks: list[ScheduledChunk], *, last: int) -> Tensor:
        """Cache slots [B, last] of each chunk's sequence; arbitrary beyond a sequence's last token."""
        size = self._block_tokens
        width = -(-last // size)
        tables = [[*chunk.blocks, *[0] * width][:width] for chunk in chunks]
        blocks_BX = self._tensor(tables).view(len(chunks), width)
        within = torch.arange(size, device=self._device)
        return (blocks_BX[:, :, None] * size + within).flatten(1)[:, :last]

    def _causal_mask(self, chunk: ScheduledChunk) -> Tensor | None:
        """Causal mask [1, 1, T, S] of a prefill chunk; None for the first one, where causal attention needs no mask."""
        if chunk.start == 0:
            return None
        query_T = torch.arange(chunk.start, chunk.start + chunk.count, device=self._device)
        key_S = torch.arange(chunk.start + chunk.count, device=self._device)
        return (key_S <= query_T[:, None])[None, None]

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def absorbed_attention(
    attention: Attention, queries: tuple[Tensor, Tensor], latents_BSX: Tensor, mask_B1S: Tensor
) -> Tensor:
    """Absorbed attention of one query per sequence over cached latents, projected back to [B, D].

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
def sample(logits_NY: Tensor, samplings: Sequenced[Sampling]) -> list[int | Exception]:
    """Next token of each row of logits, or the exception that its sampling raised.

    A row depends only on its generator and logits, not on the rest of the batch.
    """
    tokens: list[int | Exception] = [*cast(list[int], logits_NY.argmax(dim=-1).tolist())]
    finite = logits_NY.isfinite().all(dim=-1).tolist()
    for row, sampling in enumerate(samplings):
        if not finite[row]:
            tokens[row] = NonFiniteError("the model's logits are not finite")
        elif sampling.temperature >= _GREEDY_BELOW:
            try:
                tokens[row] = _draw(logits_NY[row].cpu(), sampling)
            except Exception as error:
                tokens[row] = error
    return tokens


def _draw(logits_Y: Tensor, sampling: Sampling) -> int:
    # Shifted before dividing: a small temperature gives -inf, not inf - inf.
    scaled_Y = (logits_Y - logits_Y.max()) / sampling.temperature
    return int(torch.multinomial(scaled_Y.softmax(dim=-1), 1, generator=sampling.generator))
