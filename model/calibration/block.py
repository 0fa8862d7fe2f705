"""One decoder block calibrated: rounded stage by stage on its inputs, and its outputs with the rounded weights.

Shapes: N token of all documents, B document, T position, R row of one expert, D hidden, E expert, K top-k slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.calibration.awq import ScalingSearch, fold_norm
from model.calibration.expert_rows import ROWS_PER_CHANNEL, ExpertCoverage, ExpertRows, routed, rows_of
from model.calibration.feed_forward import (
    FeedForward,
    Rows,
    activation,
    chunks,
    gate_up_moment,
    round_feed_forward,
)
from model.calibration.int4_weight import Int4Weight
from model.calibration.layer import Layer, load_block, read_expert
from model.calibration.method import Method
from model.calibration.results import Result
from model.calibration.stages import Rounding, attention_stages, fold_attention, round_stages, scaling
from model.calibration.token_rows import Batch
from model.layers import SwiGLU
from model.moe import MoE
from model.rope import rotary_tables
from model.weights.reader import WeightsReader


class BlockRows(NamedTuple):
    """Hidden states [N, D] before the block, after its attention, and after it; the last two are written."""

    before_ND: Tensor
    middle_ND: Tensor
    after_ND: Tensor


class Settings(NamedTuple):
    """What is rounded, how, and what it is computed with."""

    method: Method
    wanted: Callable[[str], bool]
    """Whether a weight of this released name is rounded."""
    dtype: torch.dtype
    device: torch.device


Keep = Callable[[str, Result], None]
"""Function that takes each result, by released name, as soon as it is there."""


class BlockCalibration:
    """Calibration of one block. Beside the rows' files, memory holds the block without its routed experts, one expert,
    and the second moments of one stage.
    """

    def __init__(
        self, reader: WeightsReader, layer: Layer, rows: BlockRows, batches: Sequence[Batch], settings: Settings
    ) -> None:
        self._reader, self._layer, self._rows = reader, layer, rows
        self._batches, self._settings = batches, settings
        self._block = load_block(reader, layer, settings.dtype, settings.device)
        wanted: set[Tensor] = {
            parameter
            for name, parameter in self._block.named_parameters()
            if all(settings.wanted(piece.hf_name) for piece in layer.pieces(name, parameter.shape))
        }
        self._rounding = Rounding(settings.method, wanted, {}, {})
        self._expert_scaling_D: Tensor | None = None

    @torch.no_grad()
    def run(self, keep: Keep) -> list[ExpertCoverage]:
        """Round the block's weights and write the rows after it; what each routed expert was calibrated with."""
        self._attention()
        coverage: list[ExpertCoverage] = []
        if isinstance(self._block.mlp, MoE):
            coverage = self._mixture(self._block.mlp, keep)
        else:
            self._feed_forward(self._block.mlp)
        for name, parameter in self._block.named_parameters():
            rounded = self._rounding.rounded.get(parameter)
            if rounded is None and parameter not in self._rounding.folded:
                continue
            for hf_name, part in self._layer.pieces(name, parameter.shape):
                keep(hf_name, parameter[part] if rounded is None else _piece(rounded, part))
        return coverage

    def _attend(self, write: Tensor | None = None) -> None:
        """Run attention over all documents; with `write`, residual and output are written there."""
        block = self._block
        for batch in self._batches:
            x_BTD = batch.of(self._rows.before_ND).to(self._settings.device)
            tables = rotary_tables(self._layer.config, torch.arange(batch.length, device=x_BTD.device))
            out_BTD = block.self_attn(block.input_layernorm(x_BTD), tables)
            if write is not None:
                batch.of(write).copy_(x_BTD + out_BTD)

    def _attention(self) -> None:
        block, rounding = self._block, self._rounding
        if rounding.method.awq:
            fold_attention(block.input_layernorm, block.self_attn, self._attend, rounding)
        round_stages(attention_stages(block.self_attn), self._attend, rounding)
        self._attend(self._rows.middle_ND)

    def _feed(self, mlp: SwiGLU) -> None:
        """Run a feed-forward over all tokens, and write residual and output."""
        for batch in self._batches:
            x_BTD = batch.of(self._rows.middle_ND).to(self._settings.device)
            batch.of(self._rows.after_ND).copy_(x_BTD + mlp(self._block.post_attention_layernorm(x_BTD)))

    def _feed_forward(self, mlp: SwiGLU) -> None:
        norm, rounding = self._block.post_attention_layernorm, self._rounding
        if rounding.method.awq and rounding.chosen([mlp.gate_up_proj]):
            moment = gate_up_moment(self._everyone(), self._normed)
            fold_norm(norm, [mlp.gate_up_proj], scaling([mlp.gate_up_proj.weight], moment, rounding.method))
            rounding.folded.update(dict.fromkeys([norm.weight, mlp.gate_up_proj.weight]))
        self._dense(mlp)
        self._feed(mlp)

    def _everyone(self) -> Rows:
        tokens = self._rows.middle_ND.shape[0]
        return Rows(torch.arange(tokens), torch.ones(tokens))

    def _dense(self, mlp: SwiGLU) -> None:
        """Round a feed-forward that all tokens go through, in place."""
        rounding, gate_up, down = self._rounding, mlp.gate_up_proj.weight, mlp.down_proj.weight
        plain = FeedForward(gate_up, down, gate_up in rounding.wanted, down in rounding.wanted)
        found = round_feed_forward(plain, self._everyone(), self._normed, rounding.method)
        for weight, values, int4 in (
            (gate_up, found.gate_up_XD, found.gate_up),
            (down, found.down_DF, found.down),
        ):
            weight.copy_(values)
            if int4 is not None:
                rounding.rounded[weight] = int4
        if rounding.method.awq and plain.round_down:
            rounding.folded[gate_up] = None

    def _mixture(self, moe: MoE, keep: Keep) -> list[ExpertCoverage]:
        config = moe.config
        experts_NK, weight_NK = self._route(moe)
        least = ROWS_PER_CHANNEL * max(config.hidden_size, config.moe_intermediate_size)
        rows = [rows_of(expert, experts_NK, weight_NK, least) for expert in range(config.n_routed_experts)]
        if self._rounding.method.awq:
            self._fold_mixture(moe, rows)
        if moe.shared_experts is None:
            self._rows.after_ND.copy_(self._rows.middle_ND)
        else:
            self._dense(moe.shared_experts)
            self._feed(moe.shared_experts)
        return [self._expert(expert, rows[expert], keep) for expert in range(config.n_routed_experts)]

    def _route(self, moe: MoE) -> tuple[Tensor, Tensor]:
        """Experts and routing weights [N, K] of all tokens, on the CPU."""
        choices = []
        for batch in self._batches:
            last = batch.first + batch.documents * batch.length
            choices.append(routed(moe, self._normed(torch.arange(batch.first, last))))
        return torch.cat([one.experts_NK.cpu() for one in choices]), torch.cat([one.weight_NK.cpu() for one in choices])

    def _normed(self, token_R: Tensor) -> Tensor:
        """Rows [R, D] as router and experts get them."""
        rows_RD: Tensor = self._block.post_attention_layernorm(self._rows.middle_ND[token_R].to(self._settings.device))
        return rows_RD

    def _fold_mixture(self, moe: MoE, rows: Sequence[ExpertRows]) -> None:
        """One scaling for all readers of post_attention_layernorm, by the errors of those that are rounded."""
        method, rounding = self._rounding.method, self._rounding
        everyone = gate_up_moment(self._everyone(), self._normed)
        search = ScalingSearch(everyone.mean(), method.group, method.scale_dtype)
        readers = [moe.gate]
        if moe.shared_experts is not None:
            readers.append(moe.shared_experts.gate_up_proj)
            if rounding.chosen(readers):
                search.add(moe.shared_experts.gate_up_proj.weight, everyone.sum_II)
        for expert, of_expert in enumerate(rows):
            if (weights := self._read(expert)).round_gate_up:
                search.add(weights.gate_up_XD, gate_up_moment(of_expert.all, self._normed).sum_II)
        self._expert_scaling_D = search.best()
        fold_norm(self._block.post_attention_layernorm, readers, self._expert_scaling_D)
        changed = [self._block.post_attention_layernorm.weight, *(linear.weight for linear in readers)]
        rounding.folded.update(dict.fromkeys(changed))

    def _read(self, expert: int) -> FeedForward:
        settings = self._settings
        gate_up_XD, down_DF = read_expert(self._reader, self._layer, expert, settings.dtype, settings.device)
        if self._expert_scaling_D is not None:
            gate_up_XD.mul_(self._expert_scaling_D)
        gate, up, down = map(settings.wanted, self._layer.expert_names(expert))
        return FeedForward(gate_up_XD, down_DF, gate and up, down)

    def _expert(self, expert: int, rows: ExpertRows, keep: Keep) -> ExpertCoverage:
        """Round one expert, keep it, and add its outputs to the rows after the block."""
        found = round_feed_forward(self._read(expert), rows.all, self._normed, self._rounding.method)
        gate_name, up_name, down_name = self._layer.expert_names(expert)
        half = found.gate_up_XD.shape[0] // 2
        up_factor_F = None if found.scaling_F is None else found.scaling_F.reciprocal()
        for name, part, row_factor_F in ((gate_name, slice(0, half), None), (up_name, slice(half, None), up_factor_F)):
            if found.gate_up is not None:
                piece = _piece(found.gate_up, (part,))
                keep(name, piece._replace(row_factor_O=row_factor_F, column_factor_I=self._expert_scaling_D))
            elif self._rounding.method.awq:
                keep(name, found.gate_up_XD[part])
        if found.down is not None:
            keep(down_name, found.down._replace(column_factor_I=found.scaling_F))
        for chunk in chunks(rows.own):
            act_RF = activation(self._normed(chunk.token_R), found.gate_up_XD, chunk.weight_R)
            out_RD = nn.functional.linear(act_RF, found.down_DF).to(self._rows.after_ND)
            self._rows.after_ND.index_add_(0, chunk.token_R, out_RD)
        own, used = rows.own.token_R.shape[0], rows.all.token_R.shape[0]
        return ExpertCoverage(self._layer.number, expert, own, used - own)


def _piece(rounded: Int4Weight, part: tuple[int | slice, ...]) -> Int4Weight:
    """Rows of a rounded weight that are one released tensor."""
    return Int4Weight(rounded.values_OI[part], rounded.scale_OG[part], rounded.group)
