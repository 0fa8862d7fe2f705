"""Common layers against their formulas, and buffers that stay fp32 when a module is cast."""

import pytest
import torch
from torch import nn

from model.layers import Fp32Buffers, RMSNorm, SwiGLU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_divides_by_the_root_mean_square_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(48, 1e-6)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    # In bf16 the squares of these rows overflow or vanish beside each other.
    x_ND = (torch.randn(5, 48) * torch.logspace(-4, 4, 5)[:, None]).to(dtype)
    wide = x_ND.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.to(dtype).double()
    out = norm(x_ND)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=1e-6)


def test_the_fused_weight_holds_gate_then_up() -> None:
    torch.manual_seed(0)
    layer = SwiGLU(16, 24)
    x_ND = torch.randn(2, 3, 16)
    gate, up = layer.gate_up_proj.weight[:24], layer.gate_up_proj.weight[24:]
    hidden = x_ND @ gate.T
    expected = (hidden * hidden.sigmoid() * (x_ND @ up.T)) @ layer.down_proj.weight.T
    torch.testing.assert_close(layer(x_ND), expected)


class Counter(Fp32Buffers):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("bias", torch.tensor([1.0, 1.001]))
        self.register_buffer("counts", torch.tensor([3, 4]))
        self.register_buffer("missing", None)


def test_fp32_buffers_keep_their_bits_under_a_cast_and_everything_else_is_cast() -> None:
    module = nn.Sequential(Counter()).to(torch.bfloat16)[0]
    assert module.weight.dtype == torch.bfloat16
    assert (module.bias.dtype, module.counts.dtype, module.missing) == (torch.float32, torch.int64, None)
    assert torch.equal(module.bias, torch.tensor([1.0, 1.001]))
    assert module.to("meta").bias.device.type == "meta", "a move to another device still moves them"
