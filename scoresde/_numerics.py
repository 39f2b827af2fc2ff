r"""Numerical building blocks: Gauss–Legendre nodes, Lagrange bases, cubic splines, quantiles, in float64."""

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


class Spline:
    """Cubic spline with two continuous derivatives (not-a-knot ends); it is constant outside its knots.

    Two knots give a line and three a parabola. The functions are differentiable in their argument.

    Arguments:
        x: Increasing knots, (K,) in float64.
        y: Values at the knots, (K, *event).
        limit: Limit at infinity, which the function approaches as e^{−2 (x − last knot)}; by default the last value.
    """

    def __init__(self, x: Tensor, y: Tensor, limit: Tensor | None = None) -> None:
        self.limit = y[-1] if limit is None else limit
        flat = y.reshape(len(x), -1)
        h, bend = x.diff()[:, None], _second_derivatives(x, flat)
        line = flat.diff(dim=0) / h - h * (2 * bend[:-1] + bend[1:]) / 6
        self.x, self.last = x, y[-1]
        pieces = (flat[:-1], line, bend[:-1] / 2, bend.diff(dim=0) / h / 6)
        self._pieces = tuple(v.reshape(-1, *y.shape[1:]) for v in pieces)
        areas = self._area(self._pieces, self._rows(x.diff()))
        self._sums = torch.cat([torch.zeros_like(y[:1]), areas.cumsum(0)])

    def __call__(self, at: Tensor) -> Tensor:
        """Values at `at`, (*shape) to (*shape, *event)."""
        i, d = self._locate(at)
        a, b, c, e = (v[i] for v in self._pieces)
        decayed = -torch.expm1(-2 * self._rows((at - self.x[-1]).clamp_min(0)))
        return a + d * (b + d * (c + d * e)) + decayed * (self.limit - self.last)

    def integral(self, at: Tensor) -> Tensor:
        """Integrals from the first knot to `at`, (*shape) to (*shape, *event)."""
        i, d = self._locate(at)
        below, above = (self._rows(v) for v in ((at - self.x[0]).clamp_max(0), (at - self.x[-1]).clamp_min(0)))
        outside = below * self._pieces[0][0] - torch.expm1(-2 * above) / 2 * (self.last - self.limit)
        outside = outside + torch.where(self.limit == 0, 0.0, above * self.limit)  # above may be infinite
        return self._sums[i] + self._area(tuple(v[i] for v in self._pieces), d) + outside

    def _locate(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """The piece of each point, and its distance from the start of the piece."""
        i = (torch.searchsorted(self.x, at.detach().contiguous()) - 1).clamp(0, len(self.x) - 2)
        return i, self._rows(at.clamp(self.x[0], self.x[-1]) - self.x[i])

    def _rows(self, v: Tensor) -> Tensor:
        """Numbers that broadcast to values."""
        return v.reshape((*v.shape, *[1] * self.last.ndim))

    @staticmethod
    def _area(piece: tuple[Tensor, ...], d: Tensor) -> Tensor:
        a, b, c, e = piece
        return d * (a + d * (b / 2 + d * (c / 3 + d * e / 4)))


def _second_derivatives(x: Tensor, y: Tensor) -> Tensor:
    """Second derivatives of the spline at its knots, (K, n)."""
    h = x.diff()
    slope = y.diff(dim=0) / h[:, None]
    if len(x) < 4:
        change = slope.diff(dim=0) * 2 / (x[-1] - x[0])
        return change.sum(0).expand_as(y)
    n = torch.arange(1, len(x) - 1)
    matrix = torch.zeros(len(x), len(x), dtype=x.dtype)
    matrix[n, n - 1], matrix[n, n], matrix[n, n + 1] = h[:-1], 2 * (h[:-1] + h[1:]), h[1:]
    matrix[0, :3] = torch.stack([h[1], -h[0] - h[1], h[0]])
    matrix[-1, -3:] = torch.stack([h[-1], -h[-2] - h[-1], h[-2]])
    right = torch.zeros_like(y)
    right[1:-1] = 6 * slope.diff(dim=0)
    bend: Tensor = torch.linalg.solve(matrix, right)
    return bend


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
