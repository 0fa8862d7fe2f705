"""DeepSeek-V3 transformer: blocks, the whole model, the multi-token prediction (MTP) module, and initial weights.

Shapes: B batch, T position, D hidden, V vocabulary, E expert.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.document_mask import Documents
from model.layers import RMSNorm, SwiGLU
from model.model_config import ModelConfig
from model.moe import MoE
from model.rope import RotaryTables, rotary_tables

# Elements that one random generator draws: rows can then be drawn without those before them.
_INIT_CHUNK_ELEMENTS = 1 << 20


class BlockOutput(NamedTuple):
    """Output of one decoder layer; the last two are None for a dense layer."""

    hidden_BTD: Tensor
    balance_loss: Tensor | None
    counts_E: Tensor | None


class ModelOutput(NamedTuple):
    """Output of the model before the head."""

    hidden_BTD: Tensor
    """Hidden states after the final norm: `logits` of position t predict token t + 1."""
    mtp_hidden_BTD: Tensor | None
    """Hidden states after the MTP module's norm: position t has seen tokens up to t + 1 and predicts t + 2. The last
    position has no next token to see: leave it out of the loss. None without an MTP module, and outside training."""
    balance_loss: Tensor
    """Sum over the MoE layers (MTP's included), unweighted, 0-dim fp32."""


class Block(nn.Module):
    """Decoder layer: attention, then a dense feed-forward or a mixture of experts, each with a residual connection."""

    def __init__(self, config: ModelConfig, *, moe: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MoE | SwiGLU = MoE(config) if moe else SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x_BTD: Tensor, tables: RotaryTables, documents: Documents | None = None) -> BlockOutput:
        """Output of the layer for whole sequences; with `documents`, attention stays within each of them."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), tables, documents)
        return self.feed_forward(x_BTD)

    def feed_forward(self, x_BTD: Tensor) -> BlockOutput:
        """Output of the layer's second half, residual included (for engines that have their own attention)."""
        out = self.mlp(self.post_attention_layernorm(x_BTD))
        if isinstance(out, Tensor):
            return BlockOutput(x_BTD + out, None, None)
        return BlockOutput(x_BTD + out.hidden_BTD, out.balance_loss, out.counts_E)


def _moe_of(block: nn.Module) -> MoE | None:
    mlp = getattr(block, "mlp", None)
    return mlp if isinstance(mlp, MoE) else None


class MTP(nn.Module):
    """The multi-token prediction module (V3, section 2.2); embedding and head are the model's own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(width, eps)
        self.hnorm = RMSNorm(width, eps)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.block = Block(config, moe=True)
        self.norm = RMSNorm(width, eps)

    def forward(
        self,
        hidden_BTD: Tensor,
        next_embedding_BTD: Tensor,
        tables: RotaryTables,
        documents: Documents | None = None,
    ) -> BlockOutput:
        """Hidden states for token t + 2, from the model's hidden state and the embedding of token t + 1.

        The released weights take the embedding first, then the hidden state, the opposite of the paper's equation.
        """
        mixed = torch.cat([self.enorm(next_embedding_BTD), self.hnorm(hidden_BTD)], dim=-1)
        out: BlockOutput = self.block(self.eh_proj(mixed), tables, documents)
        return out._replace(hidden_BTD=self.norm(out.hidden_BTD))


class DeepseekV3(nn.Module):
    """DeepSeek-V3 language model. Can be built under `torch.device("meta")`; every buffer starts at zero."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        dense = config.first_k_dense_replace
        self.layers = nn.ModuleList(Block(config, moe=i >= dense) for i in range(config.num_hidden_layers))
        # None for the dense layers. A plain list: the modules are registered once, under `layers` and `mtp`.
        self._moe_by_layer = [_moe_of(layer) for layer in self.layers]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = MTP(config) if config.num_nextn_predict_layers else None

    def forward(
        self,
        tokens_BT: Tensor,
        documents: Documents | None = None,
        *,
        positions_T: Tensor | None = None,
        next_BT: Tensor | None = None,
    ) -> ModelOutput:
        """Hidden states of int64 tokens; positions count from 0 in each row, or in each of its `documents`.

        In training mode every MoE layer's `tokens_per_expert_E` grows by the tokens that chose each expert.

        Args:
            positions_T: positions of the tokens in their sequences, under context parallelism.
            next_BT: the token that follows each token (for the MTP module), under context parallelism.
        """
        if positions_T is None:
            positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        tables = rotary_tables(self.config, positions_T if documents is None else documents.position_BT)
        x_BTD = self.embed_tokens(tokens_BT)
        balance_loss = torch.zeros((), dtype=torch.float32, device=tokens_BT.device)
        for layer, moe in zip(self.layers, self._moe_by_layer, strict=True):
            out: BlockOutput = layer(x_BTD, tables, documents)
            x_BTD = out.hidden_BTD
            balance_loss = self._record(moe, out, balance_loss)
        hidden_BTD = self.norm(x_BTD)
        if self.mtp is None or not self.training:
            return ModelOutput(hidden_BTD, None, balance_loss)
        if next_BT is None:
            next_BT = next_tokens(tokens_BT)
        out = self.mtp(hidden_BTD, self.embed_tokens(next_BT), tables, documents)
        balance_loss = self._record(_moe_of(self.mtp.block), out, balance_loss)
        return ModelOutput(hidden_BTD, out.hidden_BTD, balance_loss)

    def _record(self, moe: MoE | None, out: BlockOutput, balance_loss: Tensor) -> Tensor:
        if moe is None or not self.training or out.counts_E is None or out.balance_loss is None:
            return balance_loss
        moe.tokens_per_expert_E += out.counts_E.detach()
        return balance_loss + out.balance_loss

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of any hidden states [..., D]."""
        scores: Tensor = self.lm_head(hidden)
        return scores

    def moe_layers(self) -> list[MoE]:
        """MoE layers in order, MTP's last."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialize every parameter from `seed` and its name alone, and zero the buffers (see `initial_values`)."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_values(name, parameter.shape, seed=seed, std=self.config.initializer_range))
        for buffer in self.buffers():
            buffer.zero_()


def next_tokens(tokens_BT: Tensor) -> Tensor:
    """Token t + 1 at each position [B, T], the MTP module's input; the last position repeats its own token."""
    return torch.cat([tokens_BT[:, 1:], tokens_BT[:, -1:]], dim=1)


def initial_values(
    name: str, shape: torch.Size, *, seed: int, std: float, rows: tuple[int, int] | None = None
) -> Tensor:
    """Initial fp32 values of the parameter `name` on the CPU: ones for norms, else normal with `std`.

    Each chunk of rows has a generator seeded by (seed, name, chunk), so that any slice of rows can be drawn by itself
    and the values are the same however the parameter is sharded.

    Args:
        shape: shape of the unsharded parameter.
        rows: first and one past the last row (index of the first dimension) to return; None is all of them.
    """
    first, last = rows or (0, shape[0])
    if len(shape) == 1:
        return torch.ones(last - first)
    tail = shape[1:]
    chunk_rows = max(1, _INIT_CHUNK_ELEMENTS // math.prod(tail))
    slices = []
    for chunk in range(first // chunk_rows, math.ceil(last / chunk_rows)):
        start = chunk * chunk_rows
        stop = min(start + chunk_rows, shape[0])
        digest = hashlib.sha256(f"{seed}/{name}/{chunk}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        values = torch.empty(stop - start, *tail).normal_(std=std, generator=generator)
        slices.append(values[max(first - start, 0) : min(last, stop) - start])
    return torch.cat(slices) if slices else torch.empty(0, *tail)
