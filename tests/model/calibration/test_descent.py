import itertools

import pytest
import torch

from model.calibration.descent import descend
from model.calibration.gptq import gptq
from model.calibration.int4_weight import Int4Weight, nearest
from model.calibration.second_moment import output_error
from tests.model.calibration.inputs import correlated_rows, weight


def error(rounded, weight_OI, moment_II):
    return output_error(rounded.dequantized() - weight_OI, moment_II)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("columns", [96, 200])
def test_no_row_gets_worse_and_most_get_better(columns, group):
    x_NI, weight_OI = correlated_rows(500, columns), weight(32, columns)
    moment_II = x_NI.T @ x_NI
    start = gptq(weight_OI, moment_II, group, torch.bfloat16)
    before_O, errors = error(start, weight_OI, moment_II), []
    for sweeps in (1, 3):
        found = descend(weight_OI, moment_II, start, sweeps=sweeps)
        errors.append(error(found, weight_OI, moment_II))
        assert (errors[-1] <= before_O).all()
    assert errors[0].sum() < 0.97 * before_O.sum()
    assert errors[1].sum() < errors[0].sum()


def test_it_ends_where_no_single_value_can_be_changed_for_the_better():
    x_NI, weight_OI = correlated_rows(100, 12), weight(5, 12)
    moment_II = x_NI.T @ x_NI
    found = descend(weight_OI, moment_II, nearest(weight_OI, 12, torch.float32), sweeps=20)
    least_O = error(found, weight_OI, moment_II)
    for column, value in itertools.product(range(12), range(-8, 8)):
        values_OI = found.values_OI.clone()
        values_OI[:, column] = value
        changed_O = error(found._replace(values_OI=values_OI), weight_OI, moment_II)
        assert (changed_O >= least_O * 0.999).all()


def test_scales_are_the_least_squares_of_the_outputs():
    """Weights that some int4 weight gives exactly: from the right values, a wrong scale is set right."""
    generator = torch.Generator().manual_seed(2)
    values_OI = torch.randint(-8, 8, (6, 40), generator=generator).to(torch.int8)
    scale_OG = torch.rand(6, 3, generator=generator) + 0.5
    right = Int4Weight(values_OI, scale_OG, 16)
    x_NI = torch.randn(3000, 40, generator=generator)
    wrong = right._replace(scale_OG=scale_OG * 1.02)
    found = descend(right.dequantized(), x_NI.T @ x_NI, wrong, sweeps=1)
    torch.testing.assert_close(found.scale_OG, scale_OG, rtol=1e-3, atol=0)


def test_what_was_never_seen_stays():
    weight_OI, x_NI = weight(8, 64), correlated_rows(100, 64)
    x_NI[:, 16:40] = 0.0
    weight_OI[3, :16] = 0.0
    start = nearest(weight_OI, 16, torch.float32)
    found = descend(weight_OI, x_NI.T @ x_NI, start)
    assert torch.equal(found.values_OI[:, 16:40], start.values_OI[:, 16:40])
    assert torch.equal(found.scale_OG[:, 1], start.scale_OG[:, 1])
    assert torch.isfinite(found.scale_OG).all()
