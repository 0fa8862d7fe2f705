"""Newton-Schulz iteration: the orthogonal factor of matrices by matrix products alone (Muon's direction).

Shapes: B matrices, M their rows, N their columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A quintic whose slope at zero is as steep as possible, so that five iterations bring small singular values near 1. It
# does not converge: they end between 0.7 and 1.2 (Keller Jordan, https://kellerjordan.github.io/posts/muon/, 2024).
_A, _B, _C = 3.4445, -4.7750, 2.0315
# Added to the norm before dividing, as in the same post's code: a matrix of zeros stays one.
_EPS = 1e-7


def orthogonalize(x_BMN: Tensor, iterations: int) -> Tensor:
    """U V^T of each matrix U S V^T [B, M, N], approximately, in the type of `x_BMN`.

    Each iteration uses the Gram matrix of the shorter side: 4 k^2 l + 2 k^3 FLOPs an iteration, k <= l the sides.
    """
    transposed = x_BMN.shape[1] > x_BMN.shape[2]
    x = x_BMN.transpose(1, 2) if transposed else x_BMN
    norm_B11 = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = x / (norm_B11 + _EPS).to(x_BMN.dtype)
    for _ in range(iterations):
        gram = torch.bmm(x, x.transpose(1, 2))
        polynomial = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        x = torch.baddbmm(x, polynomial, x, beta=_A)
    return x.transpose(1, 2) if transposed else x
