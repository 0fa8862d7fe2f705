import pytest
import torch

from model.calibration.second_moment import SecondMoment, output_error


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
