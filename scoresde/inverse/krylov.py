"""Krylov methods that solve a linear system for each row of a batch, without a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradients(
    matvec: Callable[[Tensor], Tensor], y: Tensor, iterations: int | None = None, tolerance: float | None = None
) -> Tensor:
    """Solve S u = y for each row by conjugate gradients, S symmetric positive definite; solved rows do not change.

    Arguments:
        matvec: Function u ↦ S u, (B, *out) to (B, *out).
        y: Right-hand side, (B, *out).
        iterations: Number of iterations; by default at most four times the size of a row, and at most 1000.
        tolerance: Norm of the residual relative to that of `y`; by default ε^0.8 with ε of the dtype.
    """
    rows = (len(y), *[1] * (y.ndim - 1))
    norm = y.flatten(1).norm(dim=1).reshape(rows)
    small = (torch.finfo(y.dtype).eps ** 0.8 if tolerance is None else tolerance) * norm
    u, r = torch.zeros_like(y), y
    p, rr = r, r.flatten(1).square().sum(1).reshape(rows)
    for _ in range(min(1000, 4 * math.prod(y.shape[1:])) if iterations is None else iterations):
        live = rr.sqrt() > small
        if iterations is None and not bool(live.any()):
            break
        q = matvec(p)
        pq = (p * q).flatten(1).sum(1).reshape(rows)
        live = live & (pq > 0)
        step = torch.where(live, rr / torch.where(live, pq, 1.0), 0.0)
        u, r = u + step * p, r - step * q
        new = r.flatten(1).square().sum(1).reshape(rows)
        p = r + torch.where(live, new / torch.where(live, rr, 1.0), 0.0) * p
        rr = torch.where(live, new, rr)
    return u


def minimal_residual(matvec: Callable[[Tensor], Tensor], y: Tensor, iterations: int) -> Tensor:
    """Minimise ‖y − S u‖ over the Krylov space of each row, for any matrix S (Orthodir).

    The residual never grows, so ‖S u‖ ≤ 2‖y‖ also if S is not symmetric or not positive definite.

    Arguments:
        matvec: Function u ↦ S u, (B, *out) to (B, *out).
        y: Right-hand side, (B, *out).
        iterations: Number of iterations; each calls `matvec` once.

    References:
        | Generalized Conjugate-Gradient Acceleration of Nonsymmetrizable Iterative Methods (Young and Jea, 1980),
          https://doi.org/10.1016/0024-3795(80)90165-2
    """
    rows = (len(y), *[1] * (y.ndim - 1))
    small = torch.finfo(y.dtype).eps ** 1.6

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1).reshape(rows)

    u, r, p = torch.zeros_like(y), y, y
    directions: list[tuple[Tensor, Tensor]] = []  # pairs (p, S p), with orthonormal S p
    for _ in range(iterations):
        q = matvec(p)
        floor = small * dot(q, q)
        for p_j, q_j in directions:
            c = dot(q, q_j)
            p, q = p - c * p_j, q - c * q_j
        left = dot(q, q)
        live = left > floor  # avoids rsqrt(0), whose derivative is infinite
        gain = torch.where(live, torch.where(live, left, 1.0).rsqrt(), 0.0)
        p, q = gain * p, gain * q
        c = dot(q, r)
        u, r = u + c * p, r - c * q
        directions.append((p, q))
        p = q
    return u
