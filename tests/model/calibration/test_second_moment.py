import pytest
import torch

from model.calibration.second_moment import SecondMoment, output_error
from tests.model.calibration.inputs import correlated_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_that_of_the_outputs_themselves(dtype):
    generator = torch.Generator().manual_seed(0)
    x_BTI = torch.randn(3, 20, 12, generator=generator).to(dtype)
    error_OI = torch.randn(5, 12, generator=generator)
    moment = SecondMoment(12)
    for x_TI in x_BTI:
        moment.add(x_TI)
    assert moment.rows == 60
    outputs = x_BTI.double().flatten(0, 1) @ error_OI.double().T
    torch.testing.assert_close(output_error(error_OI, moment.sum_II), outputs.square().sum(0).float())
    torch.testing.assert_close(output_error(error_OI, moment.mean()), outputs.square().mean(0).float())


def test_nothing_seen_is_no_error():
    assert output_error(torch.ones(2, 4), SecondMoment(4).mean()).tolist() == [0.0, 0.0]


def moment_of(x_NI):
    moment = SecondMoment(x_NI.shape[1])
    moment.add(x_NI)
    return moment


@pytest.mark.parametrize("rows", [8, 40, 200])
def test_a_shrunk_moment_is_nearer_to_that_of_all_rows(rows):
    x_NI = correlated_rows(20_000, 64)
    true_II = moment_of(x_NI).mean()
    few = moment_of(x_NI[:rows])
    assert (few.shrunk() - true_II).norm() < (few.mean() - true_II).norm()
    torch.testing.assert_close(few.shrunk().trace(), few.mean().trace())


def test_the_shrinkage_falls_from_one_to_nearly_zero_as_rows_come():
    x_NI = correlated_rows(20_000, 64)
    shares = [SecondMoment(64).shrinkage(), *(moment_of(x_NI[:rows]).shrinkage() for rows in (1, 16, 256, 20_000))]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1.0
    assert shares[-1] < 0.01


def test_inputs_without_any_structure_shrink_wholly():
    x_NI = torch.randn(100, 64, generator=torch.Generator().manual_seed(1))
    assert moment_of(x_NI).shrinkage() > 0.9
    assert moment_of(torch.ones(5, 1)).shrinkage() == 1.0
