"""AWQ (Lin et al. 2023, arXiv 2306.00978, section 3.2): input channels scaled before rounding, by a search over alpha.

The columns of W are multiplied by s and its inputs divided by it, so that channels with large inputs lose less to
rounding. s = a^alpha, where a is a channel's magnitude: here its root mean square, which the second moment holds, where
the paper takes the mean of |x|. What produces the inputs takes over the division, where its output goes nowhere else:

- input_layernorm: q_a_proj (or q_proj) and kv_a_proj_with_mqa; q_a_layernorm: q_b_proj; kv_a_layernorm: kv_b_proj;
- the value rows of kv_b_proj: o_proj (every head has values of its own);
- the rows of up_proj: down_proj, of each expert by itself, since silu(gate) * up is linear in up;
- post_attention_layernorm: gate_proj and up_proj. In a mixture of experts the router, the shared expert and all routed
  experts read the same inputs: one s serves them all, and the router's weight takes it up unquantized.

Nothing else can be folded: silu is not linear, so the rows of gate_proj can't take part of a division, and the output
of attention, of the experts and the residual are read by more than one layer.

Shapes: O output channel, I input channel, A candidate alpha, F intermediate width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.calibration.int4_weight import nearest
from model.calibration.second_moment import output_error
from model.layers import RMSNorm

# Values of alpha, of the published code: 0 to 1 in twentieths.
_POINTS = 20
# A channel that was (nearly) never seen counts as this part of the mean magnitude: else its factor would be without
# bound, and so the error when it is seen after all.
_LEAST_MAGNITUDE = 0.01


class ScalingSearch:
    """Search of the scaling of inputs that several weights share; weights come one at a time.

    Args:
        moment_II: second moment of the shared inputs, whose diagonal gives the magnitudes.
    """

    def __init__(self, moment_II: Tensor, group: int, scale_dtype: torch.dtype) -> None:
        self._group, self._scale_dtype = group, scale_dtype
        self._scaling_AI = _candidates(moment_II.diagonal())
        self._error_A = torch.zeros(self._scaling_AI.shape[0], dtype=torch.float64, device=moment_II.device)

    @torch.no_grad()
    def add(self, weight_OI: Tensor, moment_II: Tensor) -> None:
        """Add the output error of a weight under each candidate; the moment is a sum over the weight's own inputs."""
        weight_OI = weight_OI.float()
        for place, scaling_I in enumerate(self._scaling_AI):
            rounded_OI = nearest(weight_OI * scaling_I, self._group, self._scale_dtype).dequantized() / scaling_I
            self._error_A[place] += output_error(rounded_OI - weight_OI, moment_II).sum()

    def best(self) -> Tensor:
        """Scaling [I], fp32, with the least error; all ones (alpha 0) where none is better."""
        return self._scaling_AI[self._error_A.argmin()]


def _candidates(square_I: Tensor) -> Tensor:
    """Scalings [A, I], normalised to sqrt(max * min) = 1 as in the published code."""
    magnitude_I = square_I.float().sqrt()
    mean = magnitude_I.mean()
    magnitude_I = magnitude_I.clamp_min(_LEAST_MAGNITUDE * mean) if mean > 0 else torch.ones_like(magnitude_I)
    alpha_A1 = torch.arange(_POINTS, device=square_I.device)[:, None] / _POINTS
    scaling_AI = magnitude_I**alpha_A1
    ends_A1 = scaling_AI.amax(1, keepdim=True) * scaling_AI.amin(1, keepdim=True)
    return scaling_AI / ends_A1.sqrt()


@torch.no_grad()
def fold_norm(norm: RMSNorm, consumers: list[nn.Linear], scaling_I: Tensor) -> None:
    """Divide a norm's output by `scaling_I` and multiply the columns of all layers that read it, in place."""
    norm.weight.div_(scaling_I)
    for linear in consumers:
        linear.weight.mul_(scaling_I)


@torch.no_grad()
def fold_values(attention: Attention, scaling_I: Tensor) -> None:
    """Divide attention's values by `scaling_I` in kv_b_proj's rows and multiply o_proj's columns, in place."""
    rows_HXC = attention.kv_b_proj.weight.view(attention.heads, -1, attention.latent_width)
    rows_HXC[:, attention.nope_width :].div_(scaling_I.view(attention.heads, attention.value_width, 1))
    attention.o_proj.weight.mul_(scaling_I)


@torch.no_grad()
def fold_up(gate_up_XD: Tensor, down_DF: Tensor, scaling_F: Tensor) -> None:
    """Divide the rows of up, the second half of a fused weight, and multiply the columns of down, in place."""
    gate_up_XD[scaling_F.shape[0] :].div_(scaling_F[:, None])
    down_DF.mul_(scaling_F)
