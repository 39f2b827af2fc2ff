r"""Numerical building blocks used in several folders: Gauss–Legendre nodes, Lagrange bases, quantiles, in float64."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from scoresde._doors import checked


@cache
@torch.inference_mode(False)  # cached tensors must be usable by autograd
def legendre(n: int = 80) -> tuple[Tensor, Tensor]:
    """Gauss–Legendre nodes and weights on [0, 1], float64; exact for polynomials of degree 2n − 1.

    Newton's method in the angle θ, x = cos θ, with differences of the recurrence: 1 − x keeps its digits at the ends,
    where numpy's weights are wrong by 1e-12 of themselves.
    """
    theta = math.pi * (4 * torch.arange(1, (n + 1) // 2 + 1, dtype=torch.float64, device="cpu") - 1) / (4 * n + 2)
    for _ in range(6):
        u = 2 * (theta / 2).sin() ** 2  # 1 - x
        step, p = -u, 1 - u
        for k in range(1, n):
            step = (k * step - (2 * k + 1) * u * p) / (k + 1)  # P_{k+1} - P_k
            p = p + step
        slope = -n * (p - step - theta.cos() * p) / theta.sin()  # dP/dθ
        theta = theta - p / slope
    near, weight = (theta / 2).sin() ** 2, 1 / slope**2
    far = slice(None, n // 2)  # the node of an odd n in the middle is its own mirror image
    return torch.cat([near, (1 - near[far]).flip(0)]), torch.cat([weight, weight[far].flip(0)])


LEGENDRE_NODES, LEGENDRE_WEIGHTS = legendre()


def lagrange(u: Tensor, nodes: Tensor) -> Tensor:
    """Lagrange basis ℓ_j(u), (R, k, [B,] Q), from u (R, [B,] Q) and nodes (R, k, [B])."""
    k = nodes.shape[1]
    basis = []
    for j in range(k):
        value = torch.ones_like(u)
        for m in range(k):
            if m != j:
                value = value * (u - nodes[:, m, ..., None]) / (nodes[:, j] - nodes[:, m])[..., None]
        basis.append(value)
    return torch.stack(basis, dim=1)


@checked
def student_quantile(probability: float, degrees: float) -> float:
    """Quantile of Student's t distribution; of the normal one for infinitely many degrees of freedom.

    Arguments:
        probability: Probability in (0, 1).
        degrees: Degrees of freedom; below 1 the quantile is NaN.
    """
    from scipy.special import ndtri, stdtrit  # here, because the import takes long

    if degrees < 1:
        return math.nan
    return float(ndtri(probability) if math.isinf(degrees) else stdtrit(degrees, probability))
