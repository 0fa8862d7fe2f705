import pytest
import torch

from model.calibration.int4_weight import nearest, with_scale
from model.calibration.scale_search import ratios, search_scale
from model.calibration.second_moment import output_error
from tests.model.calibration.inputs import correlated_rows, weight


def blocks_of(moment_II: torch.Tensor, group: int) -> torch.Tensor:
    """The moment without what lies between groups."""
    number_I = torch.arange(moment_II.shape[0]) // group
    return torch.where(number_I[:, None] == number_I, moment_II, 0.0)


def errors(rounded, weight_OI, metric):
    return output_error(rounded.dequantized() - weight_OI, metric)


@pytest.mark.parametrize("columns", [64, 80])
@pytest.mark.parametrize("kind", ["weights", "diagonal", "moment"])
def test_each_group_has_the_least_error_of_the_grid(columns, kind):
    group, weight_OI = 32, weight(6, columns)
    x_NI = correlated_rows(200, columns)
    moment_II = x_NI.T @ x_NI
    moment, metric = {
        "weights": (None, torch.eye(columns)),
        "diagonal": (moment_II.diagonal(), moment_II.diagonal().diag()),
        "moment": (moment_II, blocks_of(moment_II, group)),
    }[kind]
    scale_OG = search_scale(weight_OI, group, moment, torch.bfloat16)
    found_O = errors(with_scale(weight_OI, scale_OG, group), weight_OI, metric)
    for place in range(0, columns, group):
        part_OI = weight_OI[:, place : place + group]
        part_metric = metric[place : place + group, place : place + group]
        best_O = torch.full((6,), torch.inf)
        for ratio in ratios():
            base_O1 = part_OI.abs().amax(1, keepdim=True) / 7.5
            tried = with_scale(part_OI, (base_O1 * ratio).to(torch.bfloat16), group)
            best_O = torch.minimum(best_O, errors(tried, part_OI, part_metric))
        chosen = with_scale(part_OI, scale_OG[:, place // group, None], group)
        torch.testing.assert_close(errors(chosen, part_OI, part_metric), best_O, rtol=1e-4, atol=0)
    plain_O = errors(nearest(weight_OI, group, torch.bfloat16), weight_OI, metric)
    assert (found_O <= plain_O * 1.0001).all()
    assert found_O.sum() < 0.9 * plain_O.sum()


def test_a_group_of_zeros_keeps_scale_one():
    weight_OI = torch.zeros(2, 32)
    assert search_scale(weight_OI, 32, None, torch.float32).tolist() == [[1.0], [1.0]]


def test_an_outlier_of_an_input_that_is_never_seen_is_clipped():
    weight_OI = weight(4, 32)
    weight_OI[:, 5] = 3.0
    moment_II = torch.eye(32)
    moment_II[5, 5] = 0.0
    plain_O1 = weight_OI.abs().amax(1, keepdim=True) / 7.5
    assert (search_scale(weight_OI, 32, moment_II, torch.float32) < 0.6 * plain_O1).all()
