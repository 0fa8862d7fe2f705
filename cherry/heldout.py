"""Held-out loss: negative log-likelihood per document, in windows of the training sequence length.

A document is bos and its tokens, cut into windows of `sequence_length`. Each token is predicted from those before it in
its window, the document's first token from bos. Only text tokens are scored, so that nats convert to bits per byte of
exactly the text they cover.

Shapes: B window, T position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor, nn

from base import storage
from base.progress import busy
from cherry.data.prepare import HeldoutDocument, iterate_heldout
from cherry.distributed.mesh import DataShard
from cherry.job_config import JobConfig
from cherry.loss import IGNORE_INDEX
from model.transformer import DeepseekV3

_WINDOWS_PER_BATCH = 16

Score = Callable[[Tensor, Tensor], Tensor]
"""tokens [B, T], targets [B, T] -> nll in nats [B], or several sums [B, S], over targets that are not IGNORE_INDEX."""


@dataclass(frozen=True)
class Heldout:
    """Held-out loss over all scored tokens: `loss` in nats per token, and bits per byte of text."""

    loss: float
    bits_per_byte: float


def sums_of(
    score: Score, documents: Sequence[HeldoutDocument], window: int, on_progress: Callable[[float], None] | None = None
) -> Tensor:
    """A score's sums over each document, fp64 [documents, S]; several windows are scored at a time.

    Args:
        on_progress: called with the fraction that is done.
    """
    sums: list[Tensor | float] = [0.0] * len(documents)
    windows = list(_windows(documents, window))
    windows.sort(key=lambda item: len(item[1]))  # less padding; sums per document do not depend on the order
    for start in range(0, len(windows), _WINDOWS_PER_BATCH):
        batch = windows[start : start + _WINDOWS_PER_BATCH]
        length = max(len(tokens) for _, tokens, _ in batch)
        tokens_BT = torch.zeros(len(batch), length, dtype=torch.int64)
        targets_BT = torch.full((len(batch), length), IGNORE_INDEX, dtype=torch.int64)
        for row, (_, tokens, targets) in enumerate(batch):
            tokens_BT[row, : len(tokens)] = torch.tensor(tokens)
            targets_BT[row, : len(targets)] = torch.tensor(targets)
        found_BS = score(tokens_BT, targets_BT).double().view(len(batch), -1)
        for (document, _, _), found_S in zip(batch, found_BS, strict=True):
            sums[document] += found_S
        if on_progress is not None:
            on_progress(min(1.0, (start + _WINDOWS_PER_BATCH) / len(windows)))
    return torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in sums]) if sums else torch.zeros(0, 1)


def _windows(documents: Sequence[HeldoutDocument], window: int) -> Iterator[tuple[int, list[int], list[int]]]:
    for index, document in enumerate(documents):
        pairs = zip(document.tokens[1:], document.loss_mask[1:], strict=True)
        targets = [token if bears else IGNORE_INDEX for token, bears in pairs]
        for start in range(0, len(targets), window):
            yield (
                index,
                document.tokens[start : start + window][: len(targets) - start],
                targets[start : start + window],
            )


def model_score(model: DeepseekV3, device: torch.device) -> Score:
    """`Score` function of an unsharded model, by plain forward passes."""

    @torch.no_grad()
    def score(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        targets_BT = targets_BT.to(device)
        hidden_BTD = model(tokens_BT.to(device)).hidden_BTD
        rows = []
        for hidden_TD, targets_T in zip(hidden_BTD, targets_BT, strict=True):  # one row's logits at a time
            logits_TV = model.logits(hidden_TD).float()
            rows.append(
                nn.functional.cross_entropy(logits_TV, targets_T, ignore_index=IGNORE_INDEX, reduction="sum").double()
            )
        return torch.stack(rows).cpu()

    return score


def paired_score(model: DeepseekV3, reference: DeepseekV3, device: torch.device) -> Score:
    """`Score` function of a model beside another one: sums [B, 4] of

    the model's nll and the reference's, the divergence KL(reference || model) over the whole vocabulary in nats, and
    the targets before which both have the same likeliest token.
    """

    @torch.no_grad()
    def score(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        hidden = [one(tokens_BT.to(device)).hidden_BTD for one in (model, reference)]
        rows = []
        for row, targets_T in enumerate(targets_BT.to(device)):  # one row's logits at a time
            at_T = targets_T != IGNORE_INDEX
            own_NV, other_NV = (
                one.logits(hidden_BTD[row][at_T]).float().log_softmax(-1)
                for one, hidden_BTD in zip((model, reference), hidden, strict=True)
            )
            targets_N1 = targets_T[at_T, None]
            divergence = (other_NV.exp() * (other_NV - own_NV)).sum(dtype=torch.float64)
            agreed = (own_NV.argmax(-1) == other_NV.argmax(-1)).sum()
            nll = [-log_NV.gather(1, targets_N1).sum(dtype=torch.float64) for log_NV in (own_NV, other_NV)]
            rows.append(torch.stack([*nll, divergence, agreed.double()]))
        return torch.stack(rows).cpu()

    return score


@torch.no_grad()
@busy("evaluation")
def evaluate_heldout(
    network: nn.Module, config: JobConfig, run_directory: str, device: torch.device, share: DataShard
) -> Heldout:
    """Held-out loss of a model in training, sharded or not. Every rank takes part and gets the result.

    All ranks run the same number of forward passes, since each of them all-gathers shards.
    """
    window = config.data.sequence_length
    bearing = (d for d in iterate_heldout(storage.join(run_directory, "data"), window) if any(d.loss_mask))
    documents = list(islice(bearing, config.train.heldout_sequences))
    rank, ranks = share.data_rank, share.data_ranks
    sums = torch.zeros(3, dtype=torch.float64)
    network.eval()
    try:
        for start in range(0, len(documents), ranks * _WINDOWS_PER_BATCH):
            here = documents[start : start + ranks * _WINDOWS_PER_BATCH]
            own = here[rank::ranks]
            # As many rows on every rank; one without a document counts nothing.
            tokens_BT = torch.zeros(-(-len(here) // ranks), window, dtype=torch.int64)
            targets_BT = torch.full_like(tokens_BT, IGNORE_INDEX)
            for row, (_, tokens, targets) in enumerate(_windows(own, window)):
                tokens_BT[row, : len(tokens)] = torch.tensor(tokens)
                targets_BT[row, : len(targets)] = torch.tensor(targets)
            loss, _, _ = network(tokens_BT.to(device), targets_BT.to(device))
            # Each context rank has a part of the loss, but counts all of the text.
            counted = sum(sum(document.loss_mask) for document in own) / share.context_ranks
            size = sum(document.bytes for document in own) / share.context_ranks
            sums += torch.tensor([float(loss), counted, size], dtype=torch.float64)
    finally:
        network.train()
    if dist.get_world_size() > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    nll, tokens, covered = sums.tolist()
    return Heldout(nll / max(tokens, 1.0), nll / math.log(2) / max(covered, 1.0))
