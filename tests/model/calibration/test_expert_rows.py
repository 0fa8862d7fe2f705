import torch

from model.calibration.expert_rows import routed, rows_of
from model.experts import permutation_by_expert
from tests.model.conftest import random_model, small_config


def test_an_expert_s_rows_and_weights_are_those_that_the_layer_gives_it():
    moe = random_model(small_config()).layers[1].mlp
    x_ND = torch.randn(50, 48, generator=torch.Generator().manual_seed(0))
    given = {}

    def watch(module, arguments):
        _, weight_NK, experts_NK, counts_E = arguments
        permutation = permutation_by_expert(experts_NK, counts_E)
        weights = weight_NK.flatten()[permutation.order_R].split(permutation.counts_E.tolist())
        tokens = permutation.token_R.split(permutation.counts_E.tolist())
        given.update(enumerate(zip(tokens, weights, strict=True)))

    moe.experts.register_forward_pre_hook(watch)
    with torch.no_grad():
        moe(x_ND[None])
    routing = routed(moe, x_ND)
    for expert in range(8):
        rows = rows_of(expert, routing.experts_NK, routing.weight_NK, 0)
        assert rows.own is rows.all
        assert torch.equal(rows.own.token_R, given[expert][0])
        torch.testing.assert_close(rows.own.weight_R, given[expert][1])


def test_few_tokens_are_topped_up_with_others_the_same_each_time():
    experts_NK = torch.tensor([[0, 1], [1, 2], [2, 1], [1, 2], [2, 1], [1, 2]])
    weight_NK = torch.full((6, 2), 0.25)
    weight_NK[0, 0] = 0.75
    for expert, own in ((0, 1), (3, 0)):
        rows, again = (rows_of(expert, experts_NK, weight_NK, 4) for _ in range(2))
        assert torch.equal(rows.all.token_R, again.all.token_R)
        assert len(rows.own.token_R) == own
        assert len(set(rows.all.token_R.tolist())) == 4
        assert torch.equal(rows.all.token_R[:own], rows.own.token_R)
        expected = 0.75 if own else weight_NK.mean().item()
        assert rows.all.weight_R[own:].tolist() == [expected] * (4 - own)
    assert len(rows_of(3, experts_NK, weight_NK, 100).all.token_R) == 6
    counts_E = torch.bincount(experts_NK.flatten(), minlength=4)
    assert permutation_by_expert(experts_NK, counts_E).counts_E.tolist() == [
        len(rows_of(expert, experts_NK, weight_NK, 0).own.token_R) for expert in range(4)
    ]
