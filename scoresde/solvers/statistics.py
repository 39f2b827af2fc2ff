r"""Statistics of DPM-Solver-v3, which interpolates the nonlinear part g of the network's prediction.

.. math:: f = \frac{\sigma\varepsilon - l\,x}{\alpha}, \qquad g = e^{-\int s}\,f - \int e^{-\int s}\,b

Up to a constant factor, g is the noise for l = 0, s = −1 and the data for l = 1, s = 0. The statistics minimise the
variation of g along trajectories: l is the mean slope of σε in x; s, b are the regression of df/dλ on f.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.noise.keyed import Noise
from scoresde.processes.sde import SDE
from scoresde.solvers.interpolants import Prediction

_RIDGE = 1e-3  # relative to the variance of the data


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
            values: Any = getattr(self, name)
            object.__setattr__(self, name, tuple(float(v) for v in values))
        if not self.b:
            object.__setattr__(self, "b", (0.0,) * len(self.lam))
        sizes = {name: len(getattr(self, name)) for name in ("lam", "l", "s", "b")}
        if len(set(sizes.values())) > 1 or len(self.lam) < 2:
            raise ValueError(f"`lam`, `l`, `s` and `b` must have the same length, at least 2, got {sizes}.")
        if not all(a < b for a, b in zip(self.lam, self.lam[1:], strict=False)):
            raise ValueError("`lam` must increase strictly; sort the values and remove repeated ones.")

    def prediction(self) -> Prediction:
        """Return g as a prediction for ``Multistep(order, prediction)``."""
        lam, slope, s, b = (torch.tensor(v, dtype=torch.float64) for v in (self.lam, self.l, self.s, self.b))
        integral_l, integral_s = _Primitive(lam, slope), _Primitive(lam, s)
        # ∫ e^{−S} b on a finer table: its integrand is not piecewise linear.
        fine = torch.linspace(float(lam[0]), float(lam[-1]), 64 * len(lam) + 1, dtype=torch.float64)
        integral_b = _Primitive(fine, (-integral_s(fine)).exp() * _interpolate(lam, b, fine))

        def lam_of(alpha: Tensor, sigma: Tensor) -> Tensor:
            return alpha.log() - sigma.log()

        def p(alpha: Tensor, sigma: Tensor) -> Tensor:
            at = lam_of(alpha, sigma)
            return (-integral_s(at)).exp() * (1 - _interpolate(lam, slope, at)) / alpha

        return Prediction(
            "statistics",
            scale=lambda alpha, sigma: alpha * (-integral_l(lam_of(alpha, sigma))).exp(),
            p=p,
            q=lambda alpha, sigma: -(-integral_s(lam_of(alpha, sigma))).exp(),
            clock=lambda at: at,
            lam_of_clock=lambda c: c,
            slope=torch.ones_like,
            silent=True,
            offset=integral_b if any(self.b) else None,
        )

    @classmethod
    def estimate(
        cls,
        model: AbstractDenoiser,
        data: Tensor,
        *,
        n: int = 64,
        t_start: float | None = None,
        t_end: float | None = None,
        seed: int = 0,
    ) -> Statistics:
        r"""Estimate the statistics of a model: l from a trace estimate, s and b from a regression along the flow.

        .. math:: l = \tfrac1D E\,\mathrm{tr}(\sigma\nabla_x\varepsilon), \qquad
                  (s, b) = \arg\min E\left|\tfrac{df}{d\lambda} - s f - b\right|^2

        Arguments:
            model: Differentiable denoiser; conditions are fixed by ``model.given(label=y)``.
            data: Batch of real data, (B, *event); 256 samples are enough.
            n: Number of values of λ.
            t_start: First time of sampling, by default T, or 0.999 T if α(T) = 0.
            t_end: Last positive time of sampling, by default ``sde.t_min``.
            seed: Seed of the noise.
        """
        sde = model.sde
        check.integer("n", n, at_least=2)
        first = t_start if t_start is not None else sde.T if sde.alpha(sde.T) > 0 else 0.999 * sde.T
        lams = torch.linspace(sde.lam(first), sde.lam(sde.t_min if t_end is None else t_end), n, dtype=torch.float64)
        noise = Noise(seed)
        fits: list[tuple[float, float, float]] = []
        slopes: list[float] = []
        for i, lam in enumerate(lams.tolist()):
            t = sde.t_of_lam(lam)
            x = sde.perturb(data, t, noise.like(data, 2 * i)).requires_grad_()
            with torch.enable_grad():
                d = model.x0(x, t)
                probe = noise.like(data, 2 * i + 1).sign()
                (jd,) = torch.autograd.grad((d * probe).sum(), x)
            trace = float((jd * probe).mean())
            slopes.append(1 - sde.alpha(t) * trace)
        curve = torch.tensor(slopes, dtype=torch.float64)
        for i, lam in enumerate(lams.tolist()):
            fits.append(cls._regress(model, data, lams, curve, lam, noise.like(data, 2 * i)))
        s, b, _ = zip(*fits, strict=True)
        return cls(tuple(lams.tolist()), tuple(slopes), tuple(s), tuple(b))

    @staticmethod
    def _regress(
        model: AbstractDenoiser,
        data: Tensor,
        lams: Tensor,
        curve: Tensor,
        lam: float,
        eps: Tensor,
    ) -> tuple[float, float, float]:
        """Regress df/dλ on f by a central difference along the flow."""
        sde, step = model.sde, 1e-2
        lo, hi = max(lam - step, float(lams[0])), min(lam + step, float(lams[-1]))
        t, values = sde.t_of_lam(lam), []
        with torch.no_grad():
            x = sde.perturb(data, t, eps)
            for at in (lo, lam, hi):
                u = sde.t_of_lam(at)
                y = _flow_step(model, sde, x, t, u)
                l_at = float(_interpolate(lams, curve, torch.tensor([at], dtype=torch.float64)))
                alpha = sde.alpha(u)
                values.append(((1 - l_at) * y - alpha * model.x0(y, u)).double() / alpha)
        slope, f = ((values[2] - values[0]) / (hi - lo)).reshape(-1), values[1].reshape(-1)
        centred = f - f.mean()
        # If f is almost constant, the regression is ill-conditioned and s has little effect; the ridge bounds s.
        floor = _RIDGE * data.double().var()
        s = float((centred * slope).mean() / (centred.square().mean() + floor))
        return s, float(slope.mean()) - s * float(f.mean()), lam


def _flow_step(model: AbstractDenoiser, sde: SDE, x: Tensor, s: float, t: float) -> Tensor:
    """Second-order step along the flow: DDIM with the data prediction at the midpoint in λ."""
    if s == t:
        return x

    def ddim(y: Tensor, d: Tensor, a: float, b: float) -> Tensor:
        ratio = sde.sigma(b) / sde.sigma(a)
        return ratio * y + (sde.alpha(b) - ratio * sde.alpha(a)) * d

    mid = sde.t_of_lam((sde.lam(s) + sde.lam(t)) / 2)
    y = ddim(x, model.x0(x, s), s, mid)
    return ddim(x, model.x0(y, mid), s, t)


def _interpolate(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
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
