"""The router's precision on a GPU."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and finds none"),
]


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
