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
from scoresde._numerics import Spline
from scoresde.solvers.interpolants import Bound, Prediction
from scoresde.solvers.naming import constructor


@checked
@dataclass(frozen=True)
class Statistics:
    """Tables of l, s and b over λ, interpolated by cubic splines; a table of l within (0, 1) as log(l/(1 − l)).

    Below the table they are constant. Above it l goes to 0, s goes to −2 if its last value is at most −1, both as
    e^{−2λ}, and e^{−S} b is constant: this is the behaviour of models of data with a density. A step to σ = 0
    interpolates g if s ends at −1 or less, and takes the data prediction otherwise.

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
            decays=self.s[-1] <= -1,
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
    def l(self) -> Spline:  # noqa: E743
        return slope_spline(self.lam, torch.tensor(self.of.l, dtype=torch.float64))

    @cached_property
    def s(self) -> Spline:
        return rate_spline(self.lam, torch.tensor(self.of.s, dtype=torch.float64))

    @cached_property
    def b(self) -> Spline:
        return damped(Spline(self.lam, torch.tensor(self.of.b, dtype=torch.float64)), self.s)

    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * (-self.l.integral(_lam_of(alpha, sigma))).exp()

    def p(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        at = _lam_of(alpha, sigma)
        return (-self.s.integral(at)).exp() * (1 - self.l(at)) / alpha

    def q(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return -(-self.s.integral(_lam_of(alpha, sigma))).exp()

    def offset(self, lam: Tensor) -> Tensor:
        return self.b.integral(lam)


def slope_spline(lam: Tensor, l: Tensor) -> Spline:  # noqa: E741
    """Spline of l, (K, *event), which goes to 0 as that of any data with a density.

    For Gaussian data of any variance log(l/(1 − l)) is a line, which a spline of l itself follows with an error in its
    derivative. Entries whose table lies in (0, 1) are interpolated in this logarithm; others, as an inaccurate network
    can have, as they are.
    """
    inside = ((l > 0) & (l < 1)).all(0)
    fine = _between(lam)
    curve = Spline(lam, torch.where(inside, l, 0.5).logit())(fine).sigmoid()
    values = torch.where(inside, curve, Spline(lam, l)(fine))
    return Spline(fine, values, limit=torch.zeros_like(l[-1]))


def rate_spline(lam: Tensor, s: Tensor) -> Spline:
    """Spline of s, (K, *event), which goes to −2 if it ends at −1 or less, as that of any data with a density."""
    return Spline(lam, s, limit=torch.where(s[-1] <= -1, -2.0, s[-1]))


def damped(b: Spline, s: Spline) -> Spline:
    """The function e^{−S} b as a spline with pieces between two knots.

    Arguments:
        b: Spline of b.
        s: Spline of s, whose integral is S.
    """
    fine = _between(b.x)
    return Spline(fine, (-s.integral(fine)).exp() * b(fine))


def _between(knots: Tensor) -> Tensor:
    """The knots, with at most fifteen points between two of them, so that pieces are about 1/64 wide."""
    parts = int((64 * knots.diff().max()).ceil().clamp(1, 16))
    at = torch.arange(parts, dtype=torch.float64) / parts
    return torch.cat([(knots[:-1, None] + knots.diff()[:, None] * at).flatten(), knots[-1:]])


def _same(c: Tensor) -> Tensor:
    return c


def _lam_of(alpha: Tensor, sigma: Tensor) -> Tensor:
    return alpha.log() - sigma.log()
