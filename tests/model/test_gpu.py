"""The model on a CUDA GPU: transformers' logits, the grouped matmuls against the loop, and cuDNN's attention."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import model.experts as experts_module
from model.attention import scaled_dot_product
from model.model_config import ModelConfig
from model.quantize import quantize_folder
from model.transformer import DeepseekV3
from model.weights.pretrained import load_pretrained, save_pretrained, state_to_hf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and finds none"),
]

MakeConfig = Callable[..., ModelConfig]
MakeModel = Callable[..., DeepseekV3]
MakeTokens = Callable[..., Tensor]

YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
# Widths that the grouped matmul takes: multiples of 8 numbers of bf16.
WIDE = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 256}


def export(model: DeepseekV3, folder: Path) -> None:
    named = (pair for name, tensor in model.state_dict().items() for pair in state_to_hf(name, tensor, model.config))
    save_pretrained(named, str(folder), model.config, dtype=torch.float32)


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 33),
        ({"rope_scaling": YARN}, 150),
        ({"q_lora_rank": None, "n_group": 1}, 33),
        ({"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "routed_scaling_factor": 2.5}, 33),
        ({"rope_scaling": YARN}, 1),
    ],
)
def test_fp32_logits_equal_transformers(
    changes: dict[str, Any],
    length: int,
    tmp_path: Path,
    make_config: MakeConfig,
    make_model: MakeModel,
    make_tokens: MakeTokens,
) -> None:
    transformers = pytest.importorskip("transformers")
    config = make_config(num_nextn_predict_layers=0, **changes)
    export(make_model(config), tmp_path)
    ours = load_pretrained(str(tmp_path), dtype=torch.float32, device="cuda")
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).cuda().eval()
    tokens = make_tokens(config, 2, length).cuda()
    with torch.no_grad():
        difference = ours.logits(ours(tokens).hidden_BTD) - theirs(tokens, use_cache=False).logits
    assert difference.abs().max() < 1e-4


def test_a_bf16_training_step_equals_the_loop_and_repeats_itself(
    make_config: MakeConfig, make_model: MakeModel, make_tokens: MakeTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**WIDE)
    tokens = make_tokens(config, 4, 64).cuda()

    def step() -> tuple[Tensor, list[Tensor], list[Tensor]]:
        model = make_model(config).to("cuda", torch.bfloat16).train()
        out = model(tokens)
        assert out.mtp_hidden_BTD is not None
        logits = torch.cat([model.logits(out.hidden_BTD), model.logits(out.mtp_hidden_BTD)]).float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten().repeat(2)) + out.balance_loss
        grads = torch.autograd.grad(loss, list(model.parameters()))
        return loss, list(grads), [moe.tokens_per_expert_E for moe in model.moe_layers()]

    calls: list[int] = []
    plain = experts_module.grouped_experts

    def counted(*inputs: Tensor) -> Tensor:
        calls.append(1)
        return plain(*inputs)

    monkeypatch.setattr(experts_module, "grouped_experts", counted)
    loss, grads, counts = step()
    assert len(calls) == 3, "the grouped path runs by itself in every mixture layer"
    assert all(grad.isfinite().all() for grad in grads)
    monkeypatch.setattr(experts_module, "can_group", lambda *_: False)
    looped_loss, looped_grads, looped_counts = step()
    assert loss.item() == pytest.approx(looped_loss.item(), rel=1e-2)
    assert torch.equal(counts[0], looped_counts[0]), "before the first mixture layer nothing differs"
    for grad, looped in zip(grads, looped_grads, strict=True):
        # Small differences change a few tokens' experts further up.
        assert (grad.float() - looped.float()).norm() <= 0.3 * looped.float().norm() + 1e-4


def test_experts_gradients_are_the_same_bits_every_time(make_config: MakeConfig, make_model: MakeModel) -> None:
    config = make_config(**WIDE)
    moe = make_model(config).moe_layers()[0].to("cuda", torch.bfloat16)
    x = torch.randn(8, 128, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    runs = [
        torch.autograd.grad(moe(x).hidden_BTD.float().square().sum(), [x, *moe.experts.parameters()]) for _ in range(3)
    ]
    for first, *others in zip(*runs, strict=True):
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-4)])
@pytest.mark.parametrize("length", [1, 64, 200])
def test_attention_with_192_wide_keys_and_128_wide_values(dtype: torch.dtype, tolerance: float, length: int) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(2, 4, length, 192, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
    v = torch.randn(2, 4, length, 128, device="cuda", dtype=dtype, requires_grad=True)
    upstream = torch.randn(2, 4, length, 128, device="cuda")
    out = scaled_dot_product(q, k, v, 0.135, None)
    grads = torch.autograd.grad((out.float() * upstream).sum(), [q, k, v])
    scores = q.float() @ k.float().transpose(-2, -1) * 0.135
    hidden = torch.ones(length, length, device="cuda", dtype=torch.bool).triu(1)
    expected = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v.float()
    expected_grads = torch.autograd.grad((expected * upstream).sum(), [q, k, v])
    # At length 1 the gradients of q and k are zero, so the scale of what came in is the measure there.
    floor = 0.1 * upstream.norm()
    for got, want in zip([out, *grads], [expected, *expected_grads], strict=True):
        assert (got.float() - want.float()).norm() <= tolerance * torch.maximum(want.float().norm(), floor)


def test_the_int8_model_on_cuda_equals_the_cpu(
    tmp_path: Path, make_config: MakeConfig, make_model: MakeModel, make_tokens: MakeTokens
) -> None:
    config = make_config()
    export(make_model(config), tmp_path / "export")
    quantize_folder(str(tmp_path / "export"), str(tmp_path / "quantized"))
    models = [load_pretrained(str(tmp_path / "quantized"), dtype=torch.float32, device=d) for d in ("cpu", "cuda")]
    tokens = make_tokens(config, 2, 20)
    with torch.no_grad():
        cpu, cuda = (model.logits(model(tokens.to(model.lm_head.weight.device)).hidden_BTD).cpu() for model in models)
    torch.testing.assert_close(cpu, cuda, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("experts", [64, 256])
def test_a_router_of_bf16_numbers_loses_nothing_in_tensorfloat32(experts: int) -> None:
    """What training in bf16 relies on: as near to the exact logits as fp32 comes."""
    generator = torch.Generator("cuda").manual_seed(0)
    x_ND = torch.randn(512, 2048, device="cuda", generator=generator).bfloat16()
    gate_ED = (torch.randn(experts, 2048, device="cuda", generator=generator) / 45).bfloat16()
    exact_NE = x_ND.double() @ gate_ED.double().T
    before = torch.get_float32_matmul_precision()
    errors = {}
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            logits_NE = torch.nn.functional.linear(x_ND.float(), gate_ED.float())
            errors[precision] = (logits_NE - exact_NE).abs().max().item()
    finally:
        torch.set_float32_matmul_precision(before)
    assert errors["high"] < 2e-5 and errors["highest"] < 2e-5
