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

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.predictions import PREDICTIONS, Form, conversion, form_of
from scoresde.plan.matrices import UnitNormals, Unrolled, unroll
from scoresde.plan.rows import Weight, as_number, derivatives
from scoresde.plan.run import steps
from scoresde.plan.table import Plan
from scoresde.processes.sde import SDE

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


@checked
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
        >>> plan = ss.DDIM().plan(ss.VP(), ss.grids.karras(ss.VP(), 8))
        >>> bool((response(plan, ss.VP(), [0.01, 1.0]).gain < 1).all())
        True
    """
    check.choice("start", start, ("marginal", "prior"))
    c, m = as_directions(spectrum, mean)
    t = as_number(plan.rows[-1].t)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    if any(isinstance(w, Tensor) and w.ndim for row in plan.rows for _, w in (*row.x, *row.d, *row.z)):
        moments = exact_moments(plan, sde, mean=m, spectrum=c, start=start)  # one weight for each entry of a state
        average, variance = moments.mean, moments.variance
    else:
        average, variance = _end(plan, sde, c, m, start)
    return Response(c, average, variance, alpha * m, alpha**2 * c + sigma**2)


def _end(plan: Plan, sde: SDE, c: Tensor, m: Tensor, start: str) -> tuple[Tensor, Tensor]:
    """Mean and variance of the last state, (K,), from the last row to the first, at a cost linear in rows and draws."""
    gains: dict[int, Weight] = {}
    constants = {}
    for r, row in enumerate(plan.rows):
        if row.evaluates:
            time = as_number(row.t)
            alpha, sigma = sde.alpha(time), sde.sigma(time)
            gains[r] = gain = torch.where(c > 0, alpha * c / (alpha**2 * c + sigma**2), 0.0)
            constants[r] = m - gain * alpha * m
    of_x, of_d, of_draws = derivatives(plan.rows, gains)
    first = as_number(plan.rows[0].t)
    alpha, sigma = sde.alpha(first), sde.sigma(first)
    marginal = start == "marginal"
    mean = of_x[0] * (alpha * m if marginal else 0.0) + sum(of_d[r] * v for r, v in constants.items())
    mean = mean + sum(w * row.one for w, row in zip(of_x[1:], plan.rows[1:], strict=True))
    variance = of_x[0] * of_x[0] * (alpha**2 * c + sigma**2 if marginal else sigma**2)
    variance = variance + sum(w * w for w in of_draws.values())
    return mean + torch.zeros_like(c), variance + torch.zeros_like(c)


@checked
def gaussian_stds(plan: Plan, sde: SDE, stds: Sequence[float]) -> list[tuple[float, float]]:
    """Standard deviation of a plan's result and its exact value, for Gaussian data of each given standard deviation.

    The start is the marginal of the data. The numbers are those of :func:`response`, without tensors, in much less time
    than one run: about 0.1 ms for 20 steps. Of a plan with a grid for each sample, the sample with the largest error
    counts.

    Arguments:
        plan: Plan, deterministic or stochastic.
        sde: Process of the plan.
        stds: Standard deviations of the data.

    Example:
        >>> import scoresde as ss
        >>> plan = ss.DDPM().plan(ss.VP(), ss.grids.quadratic_vp(ss.VP(), 10))
        >>> [(found, exact)] = gaussian_stds(plan, ss.VP(), [0.5])
        >>> round(found, 3), round(exact, 3)
        (0.366, 0.5)
    """
    evaluated = [r for r, row in enumerate(plan.rows) if row.evaluates]
    (a_0, s_0), *levels, (a_n, s_n) = _levels(sde, [plan.rows[r].t for r in (0, *evaluated, -1)])
    results = []
    for std in stds:
        c = std**2
        gains = {r: a * c / (a**2 * c + s**2) if std else 0.0 * a for r, (a, s) in zip(evaluated, levels, strict=True)}
        of_x, _, of_draws = derivatives(plan.rows, gains)
        variance = of_x[0] * of_x[0] * (a_0**2 * c + s_0**2) + sum(w * w for w in of_draws.values())
        results.append(_worst(variance, a_n**2 * c + s_n**2))
    return results


def _worst(variance: Weight, exact: Weight) -> tuple[float, float]:
    """Standard deviations of two variances; of numbers for each sample, those of the sample with the largest error."""
    if not isinstance(variance, Tensor) and not isinstance(exact, Tensor):
        return math.sqrt(variance), math.sqrt(exact)
    squares = (torch.as_tensor(v, dtype=torch.float64).detach() for v in (variance, exact))
    found, truth = (v.sqrt().reshape(-1) for v in torch.broadcast_tensors(*squares))
    worst = int((found - truth).abs().argmax())
    return float(found[worst]), float(truth[worst])


def _levels(sde: SDE, times: list[Weight]) -> list[tuple[Weight, Weight]]:
    """α and σ at times that are numbers, or tensors."""
    if any(isinstance(t, Tensor) for t in times):
        return [(sde.alpha(t), sde.sigma(t)) for t in times]
    t = torch.tensor(times, dtype=torch.float64)
    return list(zip(sde.alpha(t).tolist(), sde.sigma(t).tolist(), strict=True))


@checked
def weak_error(plan: Plan, sde: SDE, spectrum: Numbers, mean: Numbers = 0.0, start: str = "marginal") -> float:
    r"""Root-mean-square 2-Wasserstein distance over the directions, exact for stochastic plans too.

    .. math:: W_2^2 = \tfrac1K \sum_c (\mu_c - \mu_c^*)^2 + (s_c - s_c^*)^2

    Arguments:
        plan: Plan, deterministic or stochastic.
        sde: Process of the plan.
        spectrum: Variances of the data in K directions.
        mean: Means of the data in these directions.
        start: Law of the start, as in :func:`response`.
    """
    return float(response(plan, sde, spectrum, mean, start).distance.square().mean().sqrt())


@checked
def flow_error(plan: Plan, sde: SDE, spectrum: Numbers) -> float:
    r"""Root-mean-square distance of a deterministic plan from the probability flow, over the directions.

    Arguments:
        plan: Plan to analyse.
        sde: Process of the plan.
        spectrum: Variances of the data in K directions.
    """
    if plan.stochastic:
        raise ValueError("`plan` draws noise and the flow does not; compare their laws with `weak_error`.")
    return float(flow_gaps(unroll(plan), sde, as_directions(spectrum)[0]).square().mean().sqrt())


@dataclass(frozen=True)
class Stability:
    """Amplification of errors on Gaussian data, in K directions.

    Arguments:
        amplification: Derivative ∂x_n/∂x_0 divided by that of the exact flow, (K,).
        sensitivity: Derivatives ∂x_n/∂d_k for errors of evaluation k, through all later evaluations, (K, n).
        largest: Largest absolute value of ∂x_r/∂x_0 over the rows, relative to the exact flow, (K,).
    """

    amplification: Tensor
    sensitivity: Tensor
    largest: Tensor

    @property
    def noise(self) -> Tensor:
        """Root of the summed squares of the sensitivities, (K,): effect of independent unit errors of the network."""
        return self.sensitivity.square().sum(1).sqrt()


@checked
def stability(plan: Plan, sde: SDE, spectrum: Numbers) -> Stability:
    """Amplification of errors of the start and of the network by a plan.

    Arguments:
        plan: Plan to analyse.
        sde: Process of the plan.
        spectrum: Variances of the data in K directions.
    """
    u, (c, _) = unroll(plan), as_directions(spectrum)
    gain, sensitivity, _, states = solve_directions(u, sde, c)
    times = torch.tensor([float(t) for t in u.t], dtype=torch.float64)
    exact = flow_gain(sde, torch.as_tensor(u.start, dtype=torch.float64), times, c)  # (K, n + 1)
    whole = torch.cat([states, gain[:, None]], dim=1)
    return Stability(gain / exact[:, -1], sensitivity, (whole / exact).abs().amax(1))


@checked
def amplification(plan: Plan, sde: SDE, predicts: str = "x0", sigma_data: float = 1.0) -> Tensor:
    r"""Largest factor by which each state multiplies errors of the network, (n + 1,); the last is of the result.

    If each output of the network is off by at most δ, for any reason, then state r is off by at most

    .. math:: \delta \sum_{k<r} |B_{rk}|\,|c_k|, \qquad c = \frac{\partial x_0}{\partial\,\mathrm{output}},

    where B is the matrix of :func:`unroll` and c = 1 for a network that predicts x₀, −σ/α for ε. A state
    with an error that is large beside its standard deviation, hypot(α, σ), is one that the network was not trained on.

    Arguments:
        plan: Plan with n evaluations.
        sde: Process of the plan.
        predicts: Prediction of the network, such as ``"x0"``, ``"eps"``, ``"v"`` or ``"velocity"``.
        sigma_data: Standard deviation of the data, for ``"F"`` only.

    Example:
        >>> import scoresde as ss
        >>> sde = ss.Discrete(ss.processes.betas("cosine", 1000))
        >>> plan = ss.VelocityAB(3).plan(sde, ss.grids.quadratic_vp(sde, 8))
        >>> factors = amplification(plan, sde)
        >>> round(float(factors[-1]), 2), round(float(factors.max()), 1)  # the result, and the worst state
        (1.3, 34.6)
    """
    check.choice("predicts", predicts, PREDICTIONS)
    check.number("sigma_data", sigma_data, above=0)
    u = unroll(plan)
    units = []
    for t in u.t[:-1]:
        time = as_number(t)
        alpha, sigma = sde.alpha(time), sde.sigma(time)
        source = form_of(predicts, sde, time, alpha, sigma, sigma_data)
        determined = predicts == "x0" or alpha * source.b - sigma * source.a != 0  # ε does not determine x0 if α = 0
        units.append(abs(conversion(source, Form(1.0, 0.0), alpha, sigma)[1]) if determined else math.inf)
    c = torch.tensor(units, dtype=torch.float64)
    return torch.where(u.d != 0, u.d.abs() * c, 0.0).sum(1).detach()


def as_directions(spectrum: Numbers, mean: Numbers = 0.0) -> tuple[Tensor, Tensor]:
    """Variances and means of Gaussian data in K directions, float64.

    Arguments:
        spectrum: Variances, K finite numbers of at least 0, or one number.
        mean: Means, K numbers or one.
    """
    c, m = (torch.as_tensor(v, dtype=torch.float64).reshape(-1) for v in (spectrum, mean))
    wrong = c[~((c >= 0) & c.isfinite())]
    if len(c) == 0 or len(wrong):
        raise ValueError(
            f"`spectrum` must hold finite variances of at least 0, got {f'{wrong[0]:g}' if len(c) else 'none'}."
        )
    c, m = torch.broadcast_tensors(c, m)
    return c, m


def solve_directions(u: Unrolled, sde: SDE, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Derivatives of the states of a plan on Gaussian data, for errors at each evaluation; differentiable.

    Arguments:
        u: Unrolled plan with n evaluations.
        sde: Process of the plan.
        c: Variances of the data, (K,).

    Returns:
        ∂x_n/∂x_0 (K,), ∂x_n/∂d (K, n), ∂x_n/∂z (K, draws) and ∂x_r/∂x_0 (K, n).
    """
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


def flow_gain(sde: SDE, s: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """Derivative ∂x_t/∂x_s of the probability flow on Gaussian data, (K, M).

    Arguments:
        sde: Process.
        s: Start time, ().
        t: End times, (M,).
        c: Variances of the data, (K,).
    """
    (a, b), (e, f) = ((sde.alpha(v), sde.sigma(v)) for v in (s, t))
    return ((e**2 * c[:, None] + f**2) / (a**2 * c[:, None] + b**2)).sqrt()


def flow_gaps(u: Unrolled, sde: SDE, c: Tensor) -> Tensor:
    """Root-mean-square distance of a deterministic plan from the flow in each direction, (K,); differentiable.

    Arguments:
        u: Unrolled plan.
        sde: Process of the plan.
        c: Variances of the data, (K,).
    """
    s, t = (torch.as_tensor(v, dtype=torch.float64) for v in (u.start, u.t[-1]))
    start = (sde.alpha(s) ** 2 * c + sde.sigma(s) ** 2).sqrt()
    return (solve_directions(u, sde, c)[0] - flow_gain(sde, s, t[None], c)[:, 0]) * start


@checked
def point_mass_defect(plan: Plan, sde: SDE, *, x0: float = 0.7) -> float:
    r"""Error of a plan on data that is one point, so that D is constant.

    The state of an exponential method is then :math:`\alpha_t x_0 + \sigma_t\varepsilon` at every node; with noise, its
    mean and variance are those of the marginal. The error is computed from the coefficients: no samples are drawn.

    Arguments:
        plan: Plan to check.
        sde: Process of the plan.
        x0: Data point.

    Returns:
        Largest error of the mean from α x₀ and of the standard deviation from σ, relative to hypot(α x₀, σ), over the
        rows that are nodes.
    """
    with torch.no_grad():
        path = exact_moments(plan, sde, mean=x0, spectrum=0.0).path
    start = int(plan.rows[0].node is not None)
    worst = 0.0
    for node, t, mean, variance in path[start:]:
        if node >= 0:
            alpha, sigma = sde.alpha(t), sde.sigma(t)
            gap = max(abs(float(mean) - alpha * x0), abs(float(variance.sqrt()) - sigma))
            worst = max(worst, gap / math.hypot(alpha * x0, sigma))
    return worst


@dataclass(frozen=True)
class ExactMoments:
    """Mean and variance of a plan's result on Gaussian data, in K directions.

    Arguments:
        mean: Mean of the result, (K,).
        variance: Variance of the result, (K,).
        of_start: Covariance of the result with the standard normal of the start, (K,).
        t: Time of the result.
        path: Tuples (node, t, mean, variance), one for each node; the node is −1 for a last row that is not a node.
    """

    mean: Tensor
    variance: Tensor
    of_start: Tensor
    t: float
    path: tuple[tuple[int, float, Tensor, Tensor], ...]


@checked
def exact_moments(
    plan: Plan, sde: SDE, *, mean: Numbers = 0.0, spectrum: Numbers = 1.0, start: str = "marginal"
) -> ExactMoments:
    r"""Mean and variance of a plan's result on Gaussian data, without samples.

    In the direction of an eigenvector of the covariance, with eigenvalue c and mean m, the denoiser is linear,

    .. math:: D(x, t) = m + \frac{\alpha c}{\alpha^2 c + \sigma^2}\,(x - \alpha m),

    so that each state is a linear combination of 1, the normal of the start, and the normals of the plan. The plan runs
    on the coefficients of this combination.

    Arguments:
        plan: Plan to analyse.
        sde: Process of the plan.
        mean: Means m of the data in K directions, or one number.
        spectrum: Variances c of the data in K directions, or one number.
        start: Law of the start: ``"marginal"`` of the data, or ``"prior"`` for N(0, σ²).

    Example:
        >>> import scoresde as ss
        >>> plan = ss.DDIM().plan(ss.VP(), ss.grids.uniform_lam(ss.VP(), 100))
        >>> bool((exact_moments(plan, ss.VP(), spectrum=0.25).variance - 0.25).abs() < 0.03)
        True
    """
    check.choice("start", start, ("marginal", "prior"))
    c, m = as_directions(spectrum, mean)
    one = torch.eye(1, 2 + plan.draws, dtype=torch.float64, device=c.device)  # then the start and the normals

    def denoise(x: Tensor, t: Weight) -> Tensor:
        time = as_number(t)
        alpha, sigma = sde.alpha(time), sde.sigma(time)
        gain = torch.where(c > 0, alpha * c / (alpha**2 * c + sigma**2), 0.0)
        return gain[:, None] * x + (m - gain * alpha * m)[:, None] * one

    first = as_number(plan.rows[0].t)
    alpha, sigma = sde.alpha(first), sde.sigma(first)
    state = torch.zeros(len(c), one.shape[1], dtype=torch.float64, device=c.device)
    state[:, 0] = alpha * m if start == "marginal" else 0.0
    state[:, 1] = (alpha**2 * c + sigma**2).sqrt() if start == "marginal" else sigma
    path = []
    for step in steps(plan, denoise, state, UnitNormals(2), ones=one):
        state = step.x
        path.append((step.node, as_number(step.t), state[:, 0].clone(), state[:, 1:].square().sum(1)))
    _, t, average, variance = path[-1]
    return ExactMoments(average, variance, state[:, 1].clone(), t, tuple(path))
