r"""Error analysis of a plan from its coefficients: exact on Gaussian data, without samples and without a network.

In a direction in which the data has variance c the denoiser is linear, :math:`D - m = g\,(x - \alpha m)` with
:math:`g = \alpha c/(\alpha^2 c + \sigma^2)`, so that an unrolled plan x = A x_0 + B d + C z is solved by one triangular
system for each direction,

.. math:: x = (I - B\,\mathrm{diag}\,g)^{-1}(A\,x_0 + B\,\delta + C\,z),

where δ is the error of the network. This gives the mean and variance of the result, its distance from the probability
flow, and its sensitivity to an error of each evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.plan import Plan
from scoresde.sde import SDE
from scoresde.unrolled import Unrolled, unroll
from scoresde.verify import exact_moments

Numbers = float | Sequence[float] | Tensor


@dataclass(frozen=True)
class Response:
    """Mean and variance of a plan's result on Gaussian data, and their exact values, in K directions.

    Arguments:
        spectrum: Variances of the data, (K,).
        mean: Mean of the result, (K,).
        variance: Variance of the result, (K,).
        true_mean: Mean of the marginal, (K,).
        true_variance: Variance of the marginal, (K,).
    """

    spectrum: Tensor
    mean: Tensor
    variance: Tensor
    true_mean: Tensor
    true_variance: Tensor

    @property
    def distance(self) -> Tensor:
        """2-Wasserstein distance in each direction, (K,)."""
        return torch.hypot(self.mean - self.true_mean, self.variance.sqrt() - self.true_variance.sqrt())

    @property
    def gain(self) -> Tensor:
        """Standard deviation divided by that of the marginal, (K,): the plan blurs below 1 and sharpens above 1."""
        return (self.variance / self.true_variance).sqrt()


def response(plan: Plan, sde: SDE, spectrum: Numbers, mean: Numbers = 0.0, start: str = "marginal") -> Response:
    """Exact mean and variance of a plan's result on Gaussian data.

    Arguments:
        plan: Plan, deterministic or stochastic.
        sde: Process of the plan.
        spectrum: Variances of the data in K directions.
        mean: Means of the data in these directions.
        start: Law of the start: ``"marginal"`` of the data, or ``"prior"`` for N(0, σ²).

    Example:
        >>> import scoresde as ss
        >>> plan = ss.DDIM().plan(ss.VP(), ss.karras(ss.VP(), 8))
        >>> bool((response(plan, ss.VP(), [0.01, 1.0]).gain < 1).all())
        True
    """
    c, m = _directions(spectrum, mean)
    moments = exact_moments(plan, sde, mean=m, spectrum=c, start=start)
    alpha, sigma = sde.alpha(moments.t), sde.sigma(moments.t)
    return Response(c, moments.mean, moments.variance, alpha * m, alpha**2 * c + sigma**2)


def weak_error(plan: Plan, sde: SDE, spectrum: Numbers, mean: Numbers = 0.0, start: str = "marginal") -> float:
    r"""Root-mean-square 2-Wasserstein distance over the directions, exact for stochastic plans too.

    .. math:: W_2^2 = \tfrac1K \sum_c (\mu_c - \mu_c^*)^2 + (s_c - s_c^*)^2

    It takes the arguments of :func:`response`.
    """
    return float(response(plan, sde, spectrum, mean, start).distance.square().mean().sqrt())


def flow_error(plan: Plan, sde: SDE, spectrum: Numbers) -> float:
    r"""Root-mean-square distance of a deterministic plan from the probability flow, over the directions.

    Arguments:
        plan: Plan to analyse.
        sde: Process of the plan.
        spectrum: Variances of the data in K directions.
    """
    if plan.stochastic:
        raise ValueError("`plan` draws noise and the flow does not; compare their laws with `weak_error`.")
    return float(_flow_gaps(unroll(plan), sde, _directions(spectrum)[0]).square().mean().sqrt())


@dataclass(frozen=True)
class Stability:
    """Amplification of errors on Gaussian data, in K directions.

    Arguments:
        amplification: Derivative ∂x_n/∂x_0 divided by that of the exact flow, (K,).
        sensitivity: Derivatives ∂x_n/∂d_k for errors of evaluation k, through all later evaluations, (K, n).
        largest: Largest |∂x_r/∂x_0| over the rows, relative to the exact flow, (K,).
    """

    amplification: Tensor
    sensitivity: Tensor
    largest: Tensor

    @property
    def noise(self) -> Tensor:
        """Root of the summed squares of the sensitivities, (K,): effect of independent unit errors of the network."""
        return self.sensitivity.square().sum(1).sqrt()


def stability(plan: Plan, sde: SDE, spectrum: Numbers) -> Stability:
    """Amplification of errors of the start and of the network by a plan.

    Arguments:
        plan: Plan to analyse.
        sde: Process of the plan.
        spectrum: Variances of the data in K directions.
    """
    u, (c, _) = unroll(plan), _directions(spectrum)
    gain, sensitivity, _, states = _solve(u, sde, c)
    times = torch.tensor([float(t) for t in u.t], dtype=torch.float64)
    exact = _flow_gain(sde, torch.as_tensor(u.start, dtype=torch.float64), times, c)  # (K, n + 1)
    whole = torch.cat([states, gain[:, None]], dim=1)
    return Stability(gain / exact[:, -1], sensitivity, (whole / exact).abs().amax(1))


def _directions(spectrum: Numbers, mean: Numbers = 0.0) -> tuple[Tensor, Tensor]:
    c, m = (torch.as_tensor(v, dtype=torch.float64).reshape(-1) for v in (spectrum, mean))
    if len(c) == 0 or not bool((c >= 0).all()) or not bool(c.isfinite().all()):
        raise ValueError(f"`spectrum` must hold finite variances of at least 0, got {c.tolist()}.")
    c, m = torch.broadcast_tensors(c, m)
    return c, m


def _solve(u: Unrolled, sde: SDE, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """∂x_n/∂x_0 (K,), ∂x_n/∂d (K, n), ∂x_n/∂z (K, draws) and ∂x_r/∂x_0 (K, n); differentiable."""
    n = u.nfe
    t = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in u.t[:n]])
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    g = alpha * c[:, None] / (alpha**2 * c[:, None] + sigma**2)
    A, B, C = u.x, u.d, u.z
    system = torch.eye(n, dtype=torch.float64) - B[:n] * g[:, None]
    forced = torch.cat([A[:n, None], B[:n], C[:n]], dim=1).expand(len(c), -1, -1)
    inner = torch.linalg.solve_triangular(system, forced, upper=False, unitriangular=True)
    last = torch.cat([A[n:], B[n], C[n]]) + ((B[n] * g)[:, None] @ inner)[:, 0]
    return last[:, 0], last[:, 1 : 1 + n], last[:, 1 + n :], inner[:, :, 0]


def _flow_gain(sde: SDE, s: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """Exact ∂x_t/∂x_s, (K, ·)."""
    (a, b), (e, f) = ((sde.alpha(v), sde.sigma(v)) for v in (s, t))
    return ((e**2 * c[:, None] + f**2) / (a**2 * c[:, None] + b**2)).sqrt()


def _flow_gaps(u: Unrolled, sde: SDE, c: Tensor) -> Tensor:
    """Root-mean-square distance from the flow in each direction, (K,); differentiable."""
    s, t = (torch.as_tensor(v, dtype=torch.float64) for v in (u.start, u.t[-1]))
    start = (sde.alpha(s) ** 2 * c + sde.sigma(s) ** 2).sqrt()
    return (_solve(u, sde, c)[0] - _flow_gain(sde, s, t[None], c)[:, 0]) * start


# Figures.


def plot_response(plans: Sequence[Plan], sde: SDE, spectrum: Numbers | None = None, ax: Any = None) -> Any:
    """Plot the gain against the standard deviation of the data, a curve for each plan; return the axes.

    Arguments:
        plans: Plans to plot.
        sde: Process of the plans.
        spectrum: Variances of the data, by default from 10⁻⁴ to 10².
        ax: Axes to draw into, by default new ones.
    """
    c = torch.logspace(-4, 2, 61, dtype=torch.float64) if spectrum is None else _directions(spectrum)[0]
    ax = _axes(ax)
    for plan in plans:
        ax.plot(c.sqrt().tolist(), response(plan, sde, c).gain.tolist(), label=f"{plan.name}, {plan.nfe}")
    ax.axhline(1.0, color="0.7", lw=0.8, zorder=0)
    ax.set(xscale="log", xlabel="standard deviation of the data", ylabel="deviation / exact deviation")
    ax.legend(fontsize=8)
    return ax


def plot_stability(plans: Sequence[Plan], sde: SDE, variance: float = 1.0, ax: Any = None) -> Any:
    """Plot the sensitivity of the result to each evaluation, a curve for each plan; return the axes.

    Arguments:
        plans: Plans to plot.
        sde: Process of the plans.
        variance: Variance of the data in the direction of the plot.
        ax: Axes to draw into, by default new ones.
    """
    check.number("variance", variance, least=0)
    ax = _axes(ax)
    for plan in plans:
        t = [float(row.t) for row in plan.rows if row.evaluates]
        lam = [sde.lam(v) for v in t]
        points = [(x, y) for x, y in zip(lam, stability(plan, sde, variance).sensitivity[0].tolist(), strict=True)
                  if math.isfinite(x)]  # fmt: skip
        ax.plot(*zip(*points, strict=True), marker=".", label=f"{plan.name}, {plan.nfe}")
    ax.axhline(0.0, color="0.7", lw=0.8, zorder=0)
    ax.set(xlabel="λ of the evaluation", ylabel="∂ result / ∂ evaluation")
    ax.legend(fontsize=8)
    return ax


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots()[1]


__all__ = [
    "Response",
    "Stability",
    "flow_error",
    "plot_response",
    "plot_stability",
    "response",
    "stability",
    "weak_error",
]
