from dataclasses import replace

import pytest
import torch

from model.calibration.int4_weight import nearest
from model.calibration.method import Method
from model.calibration.second_moment import SecondMoment, output_error
from tests.model.calibration.inputs import correlated_rows, weight

PLAIN = Method(group=32, gptq=False, search=False)


def moment_of(x_NI):
    moment = SecondMoment(x_NI.shape[1])
    moment.add(x_NI)
    return moment


def error(rounded, weight_OI, x_NI):
    return output_error(rounded.dequantized() - weight_OI, moment_of(x_NI).mean()).sum().item()


def test_each_part_of_the_method_lowers_the_error():
    x_NI, weight_OI = correlated_rows(4000, 96), weight(32, 96)
    methods = [
        PLAIN,
        replace(PLAIN, search=True),
        replace(PLAIN, gptq=True, sweeps=0),
        Method(group=32, sweeps=0),
        Method(group=32),
    ]
    errors = [error(method.round(weight_OI, moment_of(x_NI)), weight_OI, x_NI) for method in methods]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3 * errors[0]


@pytest.mark.parametrize("rows", [4, 24, 96])
def test_with_few_inputs_unseen_ones_still_come_out_better_than_by_rounding(rows):
    x_NI, weight_OI = correlated_rows(4000, 96), weight(32, 96)
    seen, unseen = moment_of(x_NI[:rows]), x_NI[1000:]
    plain = error(nearest(weight_OI, 32, torch.bfloat16), weight_OI, unseen)
    assert error(Method(group=32).round(weight_OI, seen), weight_OI, unseen) < plain


@pytest.mark.parametrize("seen", [None, SecondMoment(64)])
def test_without_inputs_the_weight_s_own_error_is_minimised(seen):
    weight_OI = weight(16, 64)
    plain, searched, best = (
        (method.round(weight_OI, seen).dequantized() - weight_OI).square().sum()
        for method in (PLAIN, replace(PLAIN, search=True), Method(group=32))
    )
    assert searched < plain
    assert best == searched


def test_which_methods_look_at_inputs():
    assert not PLAIN.needs_inputs
    for part in ("gptq", "search", "awq"):
        assert replace(PLAIN, **{part: True}).needs_inputs
    assert Method().corrects
    assert not replace(Method(), gptq=False).corrects
