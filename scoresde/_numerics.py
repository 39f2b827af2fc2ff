r"""Numerical building blocks used in several folders: Gauss–Legendre nodes and Lagrange bases, in float64."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

@cache
def legendre(n: int = 80) -> tuple[Tensor, Tensor]:
    """Gauss–Legendre nodes and weights on [0, 1], float64; exact for polynomials of degree 2n − 1."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(n))
    return (nodes + 1) / 2, weights / 2


LEGENDRE_NODES, LEGENDRE_WEIGHTS = legendre()


def lagrange(u: Tensor, nodes: Tensor, batched: bool) -> Tensor:
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
