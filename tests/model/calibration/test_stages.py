import pytest
import torch

from model.calibration.method import Method
from model.calibration.second_moment import SecondMoment
from model.calibration.stages import Rounding, attention_stages, captured, round_stages
from model.rope import rotary_tables
from tests.model.conftest import random_model, small_config


def attention_of(**changes):
    config = small_config(**changes)
    attention = random_model(config).layers[0].self_attn
    x_BTD = torch.randn(3, 20, config.hidden_size, generator=torch.Generator().manual_seed(2))
    return attention, lambda: attention(x_BTD, rotary_tables(config, torch.arange(20)))


def test_captured_moments_are_those_of_what_the_layers_were_given():
    attention, run = attention_of()
    given = []
    hook = attention.o_proj.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0].detach()))
    moments = captured([attention.q_a_proj, attention.o_proj], run)
    hook.remove()
    expected = SecondMoment(attention.o_proj.in_features)
    expected.add(given[0])
    assert moments[1].rows == 60
    torch.testing.assert_close(moments[1].sum_II, expected.sum_II)
    with torch.no_grad():
        run()
    assert moments[1].rows == 60


@pytest.mark.parametrize("rank", [24, None])
def test_each_stage_runs_through_the_rounded_weights_of_those_before_it(rank):
    attention, run = attention_of(q_lora_rank=rank)
    stages = attention_stages(attention)
    linears = [linear for stage in stages for linears in stage for linear in linears]
    assert set(linears) == {module for module in attention.modules() if isinstance(module, torch.nn.Linear)}
    before = {linear: linear.weight.detach().clone() for linear in linears}
    changed = []

    def watched():
        changed.append([not torch.equal(linear.weight, before[linear]) for linear in linears])
        run()

    rounding = Rounding(Method(group=8), {linear.weight for linear in linears}, {}, {})
    round_stages(stages, watched, rounding)
    sizes = [sum(map(len, stage)) for stage in stages]
    expected = [[place < sum(sizes[:number]) for place in range(len(linears))] for number in range(len(stages))]
    assert changed == expected
    for linear in linears:
        assert torch.equal(rounding.rounded[linear.weight].dequantized(), linear.weight)


def test_a_stage_without_a_wanted_layer_is_not_run_and_plain_rounding_runs_none():
    attention, run = attention_of()
    runs = []
    wanted = {attention.o_proj.weight}
    rounding = Rounding(Method(group=8), wanted, {}, {})
    round_stages(attention_stages(attention), lambda: runs.append(run()), rounding)
    assert len(runs) == 1
    assert set(rounding.rounded) == wanted
    plain = Rounding(Method(group=8, gptq=False, search=False), {attention.kv_b_proj.weight}, {}, {})
    round_stages(attention_stages(attention), lambda: runs.append(run()), plain)
    assert len(runs) == 1
