from dataclasses import replace

import pytest
import torch

from model.calibration.feed_forward import Drift, FeedForward, Rows, activation, chunks, round_feed_forward
from model.calibration.method import Method
from tests.model.calibration.inputs import correlated_rows, weight

METHOD = Method(group=32)
WIDTH, INNER = 64, 96


def plain(round_gate_up=True, round_down=True):
    return FeedForward(weight(2 * INNER, WIDTH) * 3, weight(WIDTH, INNER, 2), round_gate_up, round_down)


def outputs(x_ND, gate_up_XD, down_DF, weight_N):
    return activation(x_ND, gate_up_XD, weight_N) @ down_DF.T


def error(found, x_ND, weight_N):
    exact = plain()
    difference = outputs(x_ND, found.gate_up_XD, found.down_DF, weight_N) - outputs(x_ND, *exact[:2], weight_N)
    return difference.square().mean().item()


def test_outputs_of_unseen_rows_come_nearer_by_gptq_and_nearer_by_correction():
    x_ND, weight_N = correlated_rows(6000, WIDTH), torch.rand(6000, generator=torch.Generator().manual_seed(4)) + 0.1
    rows = Rows(torch.arange(4000), weight_N[:4000])
    nearest = replace(METHOD, gptq=False, search=False)
    errors = [
        error(round_feed_forward(plain(), rows, lambda token_R: x_ND[token_R], method), x_ND[4000:], weight_N[4000:])
        for method in (nearest, replace(METHOD, correct=False), METHOD)
    ]
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.98 * errors[1]


@pytest.mark.parametrize(("gate_up", "down"), [(True, False), (False, True), (False, False)])
def test_what_is_not_to_be_rounded_stays(gate_up, down):
    x_ND = correlated_rows(300, WIDTH)
    rows = Rows(torch.arange(300), torch.ones(300))
    given = plain(gate_up, down)
    found = round_feed_forward(given, rows, lambda token_R: x_ND[token_R], METHOD)
    for rounded, values, int4, before in (
        (gate_up, found.gate_up_XD, found.gate_up, given.gate_up_XD),
        (down, found.down_DF, found.down, given.down_DF),
    ):
        assert (int4 is not None) == rounded
        assert torch.equal(values, int4.dequantized() if rounded else before)


def test_a_corrected_weight_is_the_regression_of_old_outputs_on_new_inputs():
    generator = torch.Generator().manual_seed(6)
    exact_RF = correlated_rows(500, 12)
    rounded_RF = exact_RF @ (torch.eye(12) + 0.1 * torch.randn(12, 12, generator=generator))
    drift, weight_OF = Drift(12, torch.device("cpu")), weight(5, 12)
    for part in range(0, 500, 100):
        drift.add(exact_RF[part : part + 100], rounded_RF[part : part + 100])
    old_RO = exact_RF @ weight_OF.T
    best = torch.linalg.lstsq(rounded_RF, old_RO)
    least = (rounded_RF @ best.solution - old_RO).norm()
    before, after = ((rounded_RF @ one.T - old_RO).norm() for one in (weight_OF, drift.corrected(weight_OF, 1e-6)))
    assert least < 1e-3 * before
    assert after < 0.1 * before


def test_without_rows_nothing_is_corrected_and_weights_are_rounded_by_their_own_error():
    weight_OF = weight(5, 12)
    assert torch.equal(Drift(12, torch.device("cpu")).corrected(weight_OF, 0.01), weight_OF)
    none = Rows(torch.empty(0, dtype=torch.int64), torch.empty(0))
    found = round_feed_forward(plain(), none, lambda token_R: torch.empty(len(token_R), WIDTH), METHOD)
    assert torch.isfinite(found.gate_up_XD).all()
    assert (found.down_DF - plain().down_DF).norm() < 0.2 * plain().down_DF.norm()


def test_rows_in_pieces_are_all_of_them_and_at_least_one_piece():
    rows = Rows(torch.arange(20_001), torch.rand(20_001))
    parts = list(chunks(rows))
    assert len(parts) > 1
    for place in (0, 1):
        assert torch.equal(torch.cat([part[place] for part in parts]), rows[place])
    assert len(list(chunks(Rows(torch.arange(0), torch.rand(0))))) == 1
