r"""Statistics of DPM-Solver-v3, which interpolates the nonlinear part g of the network's prediction.

.. math:: f = \frac{\sigma\varepsilon - l\,x}{\alpha}, \qquad g = e^{-\int s}\,f - \int e^{-\int s}\,b

Up to a constant factor, g is the noise for l = 0, s = −1 and the data for l = 1, s = 0. The statistics minimise the
variation of g along trajectories: l is the mean slope of σε in x; s, b are the regression of df/dλ on f.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from scoresde._doors import checked
from scoresde.solvers.interpolants import Bound, Prediction
from scoresde.solvers.naming import constructor


@checked
@dataclass(frozen=True)
class Statistics:
    """Tables of l, s and b over λ: piecewise linear, and constant outside the table.

    Arguments:
        lam: Increasing values of λ.
        l: Values of l(λ).
        s: Values of s(λ).
        b: Values of b(λ), 0 by default.

    References:
        | DPM-Solver-v3 (Zheng et al., 2023), arXiv:2310.13268, eqs. 5 to 11
    """

    lam: tuple[float, ...]
    l: tuple[float, ...]  # noqa: E741
    s: tuple[float, ...]
    b: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("lam", "l", "s", "b"):
            object.__setattr__(self, name, tuple(float(v) for v in getattr(self, name)))
        if not self.b:
            object.__setattr__(self, "b", (0.0,) * len(self.lam))
        sizes = {name: len(getattr(self, name)) for name in ("lam", "l", "s", "b")}
        if len(set(sizes.values())) > 1 or len(self.lam) < 2:
            raise ValueError(f"`lam`, `l`, `s` and `b` must have the same length, at least 2, got {sizes}.")
        if not all(a < b for a, b in zip(self.lam, self.lam[1:], strict=False)):
            raise ValueError("`lam` must increase strictly; sort the values and remove repeated ones.")

    def __repr__(self) -> str:
        return constructor(self)

    def prediction(self) -> Prediction:
        """Return g as a prediction for ``Multistep(order, prediction)``."""
        tables = _Tables(self)
        return Prediction(
            f"{self!r}.prediction()",
            scale=Bound(_Tables.scale, tables),
            p=Bound(_Tables.p, tables),
            q=Bound(_Tables.q, tables),
            clock=_same,
            lam_of_clock=_same,
            slope=torch.ones_like,
            needs_signal=True,
            offset=Bound(_Tables.offset, tables) if any(self.b) else None,
        )


@dataclass(frozen=True)
class _Tables:
    """The functions of g; two of them are equal if their statistics are.

    Arguments:
        of: Statistics.
    """

    of: Statistics

    @cached_property
    def lam(self) -> Tensor:
        return torch.tensor(self.of.lam, dtype=torch.float64)

    @cached_property
    def slope(self) -> Tensor:
        return torch.tensor(self.of.l, dtype=torch.float64)

    @cached_property
    def integral_l(self) -> _Primitive:
        return _Primitive(self.lam, self.slope)

    @cached_property
    def integral_s(self) -> _Primitive:
        return _Primitive(self.lam, torch.tensor(self.of.s, dtype=torch.float64))

    @cached_property
    def integral_b(self) -> _Primitive:
        # ∫ e^{−S} b on a finer table: its integrand is not piecewise linear.
        lam, b = self.lam, torch.tensor(self.of.b, dtype=torch.float64)
        fine = torch.linspace(float(lam[0]), float(lam[-1]), 64 * len(lam) + 1, dtype=torch.float64)
        return _Primitive(fine, (-self.integral_s(fine)).exp() * interpolate(lam, b, fine))

    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * (-self.integral_l(_lam_of(alpha, sigma))).exp()

    def p(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        at = _lam_of(alpha, sigma)
        return (-self.integral_s(at)).exp() * (1 - interpolate(self.lam, self.slope, at)) / alpha

    def q(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return -(-self.integral_s(_lam_of(alpha, sigma))).exp()

    def offset(self, lam: Tensor) -> Tensor:
        return self.integral_b(lam)


def _same(c: Tensor) -> Tensor:
    return c


def _lam_of(alpha: Tensor, sigma: Tensor) -> Tensor:
    return alpha.log() - sigma.log()


def interpolate(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Evaluate the piecewise linear function with values y at knots x; it is constant outside the knots."""
    i = (torch.searchsorted(x, at.detach().contiguous()) - 1).clamp(0, len(x) - 2)
    w = ((at - x[i]) / (x[i + 1] - x[i])).clamp(0, 1)
    return y[i] + w * (y[i + 1] - y[i])


class _Primitive:
    """The exact integral of a piecewise linear function from its first knot."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        self.sums = torch.cat([y.new_zeros(1), ((y[1:] + y[:-1]) / 2 * x.diff()).cumsum(0)])

    def __call__(self, at: Tensor) -> Tensor:
        i = (torch.searchsorted(self.x, at.detach().contiguous()) - 1).clamp(0, len(self.x) - 2)
        inside = at.clamp(float(self.x[0]), float(self.x[-1]))
        d = inside - self.x[i]
        slope = (self.y[i + 1] - self.y[i]) / (self.x[i + 1] - self.x[i])
        whole = self.sums[i] + d * (self.y[i] + slope * d / 2)
        return whole + (at - inside) * torch.where(at < self.x[0], self.y[0], self.y[-1])
