"""Held-out loss against one plain forward pass a window, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from cherry.data.prepare import HeldoutDocument, iterate_heldout
from cherry.distributed.mesh import DataShard
from cherry.heldout import evaluate_heldout, model_score, paired_score, sums_of
from cherry.job_config import JobConfig
from cherry.training_model import TrainingModel
from model.transformer import DeepseekV3

WINDOW = 32
CPU = torch.device("cpu")


@pytest.fixture
def model(mini: Callable[..., JobConfig]) -> DeepseekV3:
    """An untrained model with weights large enough for losses that differ."""
    made = DeepseekV3(mini().model)
    made.init_weights(0)
    with torch.no_grad():
        made.lm_head.weight.mul_(20.0)
    return made


@torch.no_grad()
def plain_nll(model: DeepseekV3, document: HeldoutDocument, window: int) -> float:
    """Negative log-likelihood of a document's scored tokens in nats, one window at a time and without padding."""
    total = 0.0
    for start in range(0, len(document.tokens) - 1, window):
        tokens = torch.tensor(document.tokens[start : start + window + 1])
        bears = document.loss_mask[start + 1 : start + window + 1]
        logits_TV = model.logits(model(tokens[None, :-1]).hidden_BTD)[0].double()
        losses = F.cross_entropy(logits_TV, tokens[1:], reduction="none")
        total += float(losses[torch.tensor(bears)].sum())
    return total


@pytest.mark.parametrize("window", [WINDOW, 7])
def test_scores_of_documents_are_those_of_plain_forward_passes(
    model: DeepseekV3, prepared_data: Path, window: int
) -> None:
    documents = list(iterate_heldout(str(prepared_data), None))
    assert max(len(document.tokens) for document in documents) > 2 * WINDOW, "several windows a document"
    progress: list[float] = []
    sums_DS = sums_of(model_score(model, CPU), documents, window, progress.append)
    for [nll], document in zip(sums_DS.tolist(), documents, strict=True):
        assert nll == pytest.approx(plain_nll(model, document, window), rel=1e-4)
    assert progress == sorted(progress)
    assert progress[-1] == 1.0


def test_tokens_that_bear_no_loss_are_read_and_not_scored(model: DeepseekV3, prepared_data: Path) -> None:
    whole = next(iterate_heldout(str(prepared_data), WINDOW))
    mask = [bears and place % 3 == 0 for place, bears in enumerate(whole.loss_mask)]
    thin = replace(whole, loss_mask=mask)
    assert sum(mask) < sum(whole.loss_mask)
    [[nll]] = sums_of(model_score(model, CPU), [thin], WINDOW).tolist()
    assert 0 < nll == pytest.approx(plain_nll(model, thin, WINDOW), rel=1e-4)


@torch.no_grad()
def test_a_model_beside_another_one(model: DeepseekV3, mini: Callable[..., JobConfig], prepared_data: Path) -> None:
    other = DeepseekV3(mini().model)
    other.init_weights(1)
    other.lm_head.weight.mul_(20.0)
    documents = list(iterate_heldout(str(prepared_data), None))[:12]
    sums_DS = sums_of(paired_score(other, model, CPU), documents, WINDOW)
    for document, [own, reference, divergence, agreed] in zip(documents, sums_DS.tolist(), strict=True):
        assert own == pytest.approx(plain_nll(other, document, WINDOW), rel=1e-4)
        assert reference == pytest.approx(plain_nll(model, document, WINDOW), rel=1e-4)
        expected, same = 0.0, 0
        for start in range(0, len(document.tokens) - 1, WINDOW):
            tokens = torch.tensor(document.tokens[start : start + WINDOW + 1])[None, :-1]
            bears = torch.tensor(document.loss_mask[start + 1 : start + WINDOW + 1])
            p, q = (one.logits(one(tokens).hidden_BTD)[0].double().log_softmax(-1)[bears] for one in (model, other))
            expected += float(F.kl_div(q, p, reduction="sum", log_target=True))
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
        assert divergence == pytest.approx(expected, rel=1e-3)
        assert agreed == same
    alike_DS = sums_of(paired_score(model, model, CPU), documents, WINDOW)
    assert alike_DS[:, 2].abs().max() < 1e-6
    assert alike_DS[:, 3].tolist() == [sum(document.loss_mask) for document in documents]


@pytest.mark.parametrize("sequences", [3, 1000])
def test_the_loss_in_training_is_that_of_the_first_documents_cut_to_a_window(
    mini: Callable[..., JobConfig],
    model: DeepseekV3,
    prepared_data: Path,
    group: dist.ProcessGroup,
    sequences: int,
) -> None:
    config = mini(f"train.heldout_sequences={sequences}")
    documents = list(iterate_heldout(str(prepared_data), WINDOW))[:sequences]
    network = TrainingModel(model, 64)
    found = evaluate_heldout(network, config, str(prepared_data.parent), CPU, DataShard())
    nll = sum(plain_nll(model, document, WINDOW) for document in documents)
    assert found.loss == pytest.approx(nll / sum(sum(document.loss_mask) for document in documents), rel=1e-4)
    covered = sum(document.bytes for document in documents)
    assert found.bits_per_byte == pytest.approx(nll / math.log(2) / covered, rel=1e-4)
    assert network.training, "training goes on in training mode"
