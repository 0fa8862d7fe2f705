"""fp8 linear layers and experts against bf16, on CPUs by the torch reference and on Hopper GPUs by kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from model.experts import Experts, identity_permutation, looped_experts, permutation_by_expert, run_permuted
from model.fp8.linear import Fp8Linear, fp8_experts, fp8_linear, pad_rows, use_fp8
from model.fp8.reference import BLOCK
from model.model_config import PRESETS, ModelConfig
from model.transformer import DeepseekV3

Chosen = Callable[..., Tensor]
Numbers = Callable[..., Tensor]
Relative = Callable[[Tensor, Tensor], float]
hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
needs_hopper = [pytest.mark.gpu, pytest.mark.skipif(not hopper, reason="needs a Hopper GPU and finds none")]
DEVICES = ["cpu", pytest.param("cuda", marks=needs_hopper)]
# A CPU needs no kernels of the compiler's to show what becomes of the layers in its hands.
COMPILERS = {"cpu": "aot_eager", "cuda": "inductor"}


def test_padded_rows_begin_each_expert_at_a_block_and_drop_no_slot(counts: list[int], chosen: Chosen) -> None:
    experts_NK = chosen(counts, 2)
    rows = pad_rows(permutation_by_expert(experts_NK, torch.tensor(counts)))
    blocks = [-(-count // BLOCK) for count in counts]
    assert rows.starts_E.tolist() == [sum(blocks[:expert]) for expert in range(len(counts) + 1)]
    owners = [expert for expert, count in enumerate(blocks) for _ in range(count)]
    assert rows.expert_T.tolist() == owners + [-1] * (len(rows.expert_T) - len(owners))
    assert rows.place_NK.unique().numel() == experts_NK.numel(), "no two slots share a row"
    token_NK = torch.arange(len(experts_NK))[:, None].expand_as(experts_NK)
    assert torch.equal(rows.token_P[rows.place_NK].long(), token_NK)
    assert torch.equal(rows.expert_T[rows.place_NK // BLOCK].long(), experts_NK)
    assert (rows.token_P >= 0).sum() == experts_NK.numel(), "all other rows are padding"


def test_padded_rows_leave_out_slots_routed_off_rank() -> None:
    experts_NK = torch.tensor([[0, 2], [2, 1], [2, 2], [1, 0]])  # 2 is off-rank
    rows = pad_rows(permutation_by_expert(experts_NK, torch.tensor([2, 2]), rows=4))
    size = len(rows.token_P)
    assert rows.place_NK.tolist() == [[0, size], [size, BLOCK], [size, size], [BLOCK + 1, 1]]
    assert rows.token_P[[0, 1, BLOCK, BLOCK + 1]].tolist() == [0, 3, 1, 3]
    later = pad_rows(permutation_by_expert(experts_NK, torch.tensor([2, 2]), elsewhere=True), lambda: 4)
    assert all(torch.equal(*pair) for pair in zip(rows, later, strict=True)), "a count that comes late changes nothing"


def test_the_identity_permutation_runs_rows_in_expert_order_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(10, 8, generator=generator), torch.rand(10, generator=generator)
    w13, w2 = torch.randn(3, 8, 8, generator=generator), torch.randn(3, 8, 4, generator=generator)
    counts = torch.tensor([6, 0, 4])

    def run(x: Tensor, scale: Tensor, counts_E: Tensor) -> Tensor:
        return looped_experts(x, scale, counts_E, w13, w2)

    out = run_permuted(run, rows, weight[:, None], identity_permutation(counts, 10))
    torch.testing.assert_close(out, run(rows, weight, counts))


def test_blocks_multiply_in_fp8_and_router_and_head_do_not() -> None:
    config = ModelConfig.model_validate({**PRESETS["16b"], "num_hidden_layers": 2})
    with torch.device("meta"):
        model = DeepseekV3(config)
    assert use_fp8(model) > 0
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kept = [name for name, kind in kinds.items() if kind is nn.Linear]
    assert [name.rpartition(".")[2] for name in kept] == ["gate", "lm_head"]
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    assert experts and all(module.fp8 is not None for module in experts)


def test_a_model_narrower_than_a_block_has_nothing_in_fp8() -> None:
    narrow = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_attention_heads": 2}
    with torch.device("meta"):
        model = DeepseekV3(ModelConfig.model_validate({**PRESETS["tiny"], **narrow}))
    assert use_fp8(model) == 0


@pytest.mark.filterwarnings("ignore")  # the compiler's own imports warn, once
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_projection_and_its_gradients_equal_bf16_within_rounding(
    compiled: bool, device: str, numbers: Numbers, relative: Relative
) -> None:
    layer = nn.Linear(512, 384, bias=False, device=device, dtype=torch.bfloat16)
    x, upstream = numbers(2, 100, 512, device=device).requires_grad_(), numbers(2, 100, 384, seed=1, device=device)
    expected = layer(x)
    wanted = torch.autograd.grad(expected, [x, layer.weight], upstream)
    layer.__class__ = Fp8Linear
    out = (torch.compile(layer, backend=COMPILERS[device]) if compiled else layer)(x)
    assert out.shape == expected.shape and 0.01 < relative(out, expected) < 0.06
    for got, gradient in zip(torch.autograd.grad(out, [x, layer.weight], upstream), wanted, strict=True):
        assert got.dtype == torch.bfloat16 and 0.01 < relative(got, gradient) < 0.06


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
def test_experts_and_their_gradients_equal_bf16_within_rounding(
    compiled: bool, counts: list[int], device: str, chosen: Chosen, numbers: Numbers, relative: Relative
) -> None:
    experts_NK = chosen(counts, 4, device)
    permutation = permutation_by_expert(experts_NK, torch.tensor(counts, device=device))
    x = numbers(len(experts_NK), 256, device=device).requires_grad_()
    weight = torch.rand(experts_NK.shape, generator=torch.Generator().manual_seed(4)).to(device).requires_grad_()
    w13 = (numbers(8, 256, 256, seed=1, device=device) / 16).requires_grad_()
    w2 = (numbers(8, 256, 128, seed=2, device=device) / 12).requires_grad_()
    upstream, leaves = numbers(len(experts_NK), 256, seed=3, device=device), [x, weight, w13, w2]

    def run(rows: Tensor, scale: Tensor, counts_E: Tensor) -> Tensor:
        return looped_experts(rows, scale, counts_E, w13, w2)

    expected = run_permuted(run, x, weight, permutation)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    through = torch.compile(fp8_experts, backend=COMPILERS[device]) if compiled else fp8_experts
    out = through(x, weight, permutation, w13, w2)
    assert 0.01 < relative(out, expected) < 0.1
    gradients = torch.autograd.grad(out, leaves, upstream)
    for got, gradient in zip(gradients, wanted, strict=True):
        assert got.shape == gradient.shape and got.dtype == gradient.dtype and got.isfinite().all()
        assert 0.01 < relative(got, gradient) < 0.12
    idle = [expert for expert, count in enumerate(counts) if not count]
    for gradient in gradients[2:]:
        assert gradient[idle].eq(0).all(), "an expert without tokens has no gradient"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
def test_weights_that_are_not_trained_get_no_gradient_and_change_no_other(
    compiled: bool, device: str, chosen: Chosen, numbers: Numbers
) -> None:
    """Adapters train beside them."""
    counts = [130, 0, 1, 128, 300, 0, 0, 81]
    experts_NK = chosen(counts, 4, device)
    permutation = permutation_by_expert(experts_NK, torch.tensor(counts, device=device))
    weights = [numbers(8, 256, 256, seed=1, device=device) / 16, numbers(8, 256, 128, seed=2, device=device) / 12]
    layer = numbers(256, 256, seed=5, device=device)

    def gradients(*, trained: bool) -> list[Tensor]:
        x = numbers(len(experts_NK), 256, device=device).requires_grad_()
        weight = torch.full(experts_NK.shape, 0.5, device=device).requires_grad_()
        w13, w2, linear = (tensor.clone().requires_grad_(trained) for tensor in (*weights, layer))

        def layers(x: Tensor, weight: Tensor) -> Tensor:
            return fp8_experts(fp8_linear(x, linear), weight, permutation, w13, w2)

        run = torch.compile(layers, backend=COMPILERS[device]) if compiled else layers
        run(x, weight).float().square().sum().backward()
        assert all((tensor.grad is not None) == trained for tensor in (w13, w2, linear))
        assert x.grad is not None and weight.grad is not None
        return [x.grad, weight.grad]

    for frozen, trained in zip(gradients(trained=False), gradients(trained=True), strict=True):
        assert torch.equal(frozen, trained)
