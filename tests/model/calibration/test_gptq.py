"""GPTQ beside optimal brain quantization, written out column by column in fp64, and beside plain rounding."""

import pytest
import torch

from model.calibration.gptq import gptq, inverse_factor
from model.calibration.int4_weight import nearest, with_scale
from model.calibration.scale_search import search_scale
from model.calibration.second_moment import output_error
from tests.model.calibration.inputs import correlated_rows, weight


def optimal_brain_quantization(weight_OI, moment_II, scale_OI, order):
    """Each column rounded in turn; the inverse of what is left of H gives the change of the columns after it."""
    work, moment = weight_OI.double()[:, order].clone(), moment_II.double()[order][:, order]
    scale = scale_OI.double()[:, order]
    values = torch.zeros_like(work)
    for place in range(work.shape[1]):
        inverse = torch.linalg.inv(moment[place:, place:])
        values[:, place] = (work[:, place] / scale[:, place]).round().clamp(-8, 7)
        error = work[:, place] - values[:, place] * scale[:, place]
        work[:, place:] -= error[:, None] * inverse[0] / inverse[0, 0]
    return values[:, order.argsort()].to(torch.int8)


def moment_of(columns, rows=400):
    x_NI = correlated_rows(rows, columns)
    return x_NI.T @ x_NI / rows


def dampened(moment_II, share=0.01):
    return moment_II + torch.eye(moment_II.shape[0]) * share * moment_II.diagonal().mean()


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("columns", [64, 80, 160])
def test_values_are_those_of_optimal_brain_quantization(columns, ordered):
    weight_OI, moment_II = weight(12, columns), moment_of(columns, 900)
    found = gptq(weight_OI, moment_II, 32, torch.float32, search=False, ordered=ordered)
    order = moment_II.diagonal().argsort(descending=True, stable=True) if ordered else torch.arange(columns)
    scale_OI = found.scale_OG.repeat_interleave(32, 1)[:, :columns]
    expected_OI = optimal_brain_quantization(weight_OI, dampened(moment_II), scale_OI, order)
    # A value halfway between two falls to either side in fp32 and fp64, and changes its row from there on.
    same_O = (found.values_OI == expected_OI).all(dim=1)
    assert same_O.float().mean() >= 0.75
    found_O = output_error(found.dequantized() - weight_OI, moment_II)
    expected_O = output_error(expected_OI * scale_OI - weight_OI, moment_II)
    assert found_O.sum() <= 1.05 * expected_O.sum()


def test_the_factor_is_that_of_the_inverse():
    moment_II = moment_of(40)
    factor_II = inverse_factor(moment_II, 0.01)
    assert torch.equal(factor_II, factor_II.triu())
    torch.testing.assert_close(factor_II.T @ factor_II @ dampened(moment_II), torch.eye(40), rtol=0, atol=1e-3)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("group", [32, 128])
def test_no_row_is_worse_than_rounding_and_all_together_are_far_better(group, ordered, search):
    columns = 192
    x_NI, weight_OI = correlated_rows(600, columns), weight(48, columns)
    moment_II = x_NI.T @ x_NI
    if search:
        plain = with_scale(weight_OI, search_scale(weight_OI, group, moment_II, torch.bfloat16), group)
    else:
        plain = nearest(weight_OI, group, torch.bfloat16)
    found = gptq(weight_OI, moment_II, group, torch.bfloat16, search=search, ordered=ordered)
    plain_O = ((plain.dequantized() - weight_OI) @ x_NI.T).square().sum(1)
    found_O = ((found.dequantized() - weight_OI) @ x_NI.T).square().sum(1)
    assert (found_O <= plain_O * 1.001).all()
    assert found_O.sum() < 0.5 * plain_O.sum()


def test_searching_the_scale_by_trial_is_better_than_covering_the_largest():
    weight_OI, moment_II = weight(48, 192), moment_of(192)
    covering, searched = (
        output_error(gptq(weight_OI, moment_II, 64, torch.bfloat16, search=search).dequantized() - weight_OI, moment_II)
        for search in (False, True)
    )
    assert searched.sum() < 0.9 * covering.sum()


def test_inputs_never_seen_are_rounded_to_the_nearest():
    weight_OI, x_NI = weight(16, 64), correlated_rows(300, 64)
    unseen = [0, 17, 40, 63]
    x_NI[:, unseen] = 0.0
    found = gptq(weight_OI, x_NI.T @ x_NI, 32, torch.float32)
    scale_OI = found.scale_OG.repeat_interleave(32, 1)
    nearest_OI = (weight_OI / scale_OI).round().clamp(-8, 7)
    assert torch.equal(found.values_OI[:, unseen].float(), nearest_OI[:, unseen])


@pytest.mark.parametrize("search", [False, True])
def test_without_any_input_it_is_rounding(search):
    weight_OI = weight(8, 64)
    found = gptq(weight_OI, torch.zeros(64, 64), 32, torch.float32, search=search)
    assert torch.isfinite(found.scale_OG).all()
    scale_OI = found.scale_OG.repeat_interleave(32, 1)
    assert torch.equal(found.values_OI.float(), (weight_OI / scale_OI).round().clamp(-8, 7))


def test_a_moment_of_few_rows_or_slightly_indefinite_still_decomposes():
    x_NI = correlated_rows(5, 64)
    moment_II = x_NI.T @ x_NI
    moment_II -= torch.eye(64) * moment_II.diagonal().mean() * 0.02
    factor_II = inverse_factor(moment_II, 0.01)
    assert torch.isfinite(factor_II).all()
    assert (factor_II.diagonal() > 0).all()
