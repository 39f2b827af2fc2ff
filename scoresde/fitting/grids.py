r"""Grids that are optimised for a covariance of the data, or for a model.

:func:`gaussian_grid` needs no network: on Gaussian data the result of a solver is a known function of its times. The
other functions evaluate the model on a fine grid and select times by dynamic programming over the cost of every step,
or by equal shares of the error. The factor :math:`\sqrt{c/(c + \varrho^2)}`, ϱ = σ/α, of Gaussian data with variance c
propagates a difference of two states, in x/α, from its time to the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._numerics import legendre
from scoresde.analysis.moments import Numbers, as_directions, flow_gain, flow_gaps, solve_directions
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.modes import check_ready
from scoresde.denoisers.start import Start
from scoresde.fitting.table import Levels
from scoresde.grids.grid import check_grid
from scoresde.grids.spacings import karras, quadratic_vp, uniform_lam
from scoresde.noise.keyed import Noise
from scoresde.noise.streams import Stream
from scoresde.plan.matrices import Unrolled, unroll
from scoresde.plan.run import Step, run
from scoresde.processes.sde import SDE
from scoresde.sampling.defaults import default_solver
from scoresde.solvers.deterministic import VelocityAB
from scoresde.solvers.multistep import Multistep
from scoresde.solvers.rule import Solver


@checked
def gaussian_grid(
    sde: SDE,
    steps: int,
    spectrum: Numbers,
    *,
    solver: Solver | None = None,
    weights: Numbers = 1.0,
    t_start: float | None = None,
    t_end: float = 0.0,
) -> Tensor:
    r"""Grid that minimises the error of a solver on Gaussian data with a given covariance spectrum.

    .. math:: \min_{t_1 > \dots > t_{N-1}} \sum_c w_c\, E\,|x^{solver}_c - x^{flow}_c|^2

    for deterministic solvers; for stochastic solvers, the squared difference of the standard deviations. The sum is
    computed without a network and minimised by L-BFGS, from the best of three common grids.

    Arguments:
        sde: Process.
        steps: Number of steps; the grid has one more time.
        spectrum: Variances of the data in K directions, as :attr:`scoresde.denoisers.gaussian.Gaussian.spectrum`.
        solver: Solver, by default that of ``ss.sample``.
        weights: Weights of the directions, (K,) or one number.
        t_start: First time, by default T.
        t_end: Last time.

    Example:
        >>> import scoresde as ss
        >>> grid = gaussian_grid(ss.VP(), 6, [0.01, 0.1, 1.0])
        >>> len(grid), float(grid[-1])
        (7, 0.0)
    """
    check.integer("steps", steps, at_least=2)
    c, w = as_directions(spectrum, weights)
    rule = default_solver(steps) if solver is None else solver
    makers = (quadratic_vp, karras, uniform_lam)
    grids = [maker(sde, steps, t_start=t_start, t_end=t_end) for maker in makers]

    def loss(times: Tensor) -> Tensor:
        u = unroll(rule.plan(sde, times))
        gaps = _law_gaps(u, sde, c) if u.z.shape[1] else flow_gaps(u, sde, c)
        return (w * gaps.square()).sum().log()

    best = min(grids, key=lambda times: float(loss(times)))
    levels = Levels(sde, best.tolist(), True, False, sde.lam(sde.t_min))
    for parameter in levels.parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.LBFGS(levels.parameters, max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimiser.zero_grad()
        value = loss(levels())
        value.backward()
        return float(value.detach())

    optimiser.step(closure)
    result = levels().detach()
    better = bool((result.diff() < 0).all()) and float(loss(result)) < float(loss(best))
    return check_grid(sde, result if better else best)


def _law_gaps(u: Unrolled, sde: SDE, c: Tensor) -> Tensor:
    """Difference of the standard deviations, (K,); differentiable."""
    s, t = (torch.as_tensor(v, dtype=torch.float64) for v in (u.start, u.t[-1]))
    gain, _, noise, _ = solve_directions(u, sde, c)
    start = (sde.alpha(s) ** 2 * c + sde.sigma(s) ** 2).sqrt()
    deviation = ((gain * start).square() + noise.square().sum(1)).sqrt()
    return deviation - start * flow_gain(sde, s, t[None], c)[:, 0]


@checked
def gits(
    model: AbstractDenoiser,
    shape_or_x: Sequence[int] | Tensor,
    steps: int,
    *,
    fine: int = 64,
    seed: int = 0,
) -> Tensor:
    """Grid that minimises the sum of the errors of single DDIM steps, each from a state of fine trajectories.

    Arguments:
        model: Denoiser.
        shape_or_x: Shape (B, *event) of the trajectories, or their initial states at T.
        steps: Number of steps; the grid has one more time.
        fine: Number of steps of the fine grid, uniform in λ, from which times are selected.
        seed: Seed of the initial states.

    References:
        | On the Trajectory Regularity of ODE-based Diffusion Sampling (Chen et al., 2024), arXiv:2405.11326
    """
    times, error = _pilot(model, shape_or_x, fine, seed)
    cost = torch.full((len(times), len(times)), math.inf, dtype=torch.float64)
    for i in range(len(times) - 1):
        for j in range(i + 1, len(times)):
            cost[i, j] = error(i, j)
    return times[_cheapest(cost, steps)]


@checked
def equal_error(
    model: AbstractDenoiser,
    shape_or_x: Sequence[int] | Tensor,
    steps: int,
    *,
    fine: int = 64,
    seed: int = 0,
) -> Tensor:
    r"""Grid whose steps have equal errors, from the error density of fine trajectories.

    The error of a step of size h is about a(λ) h². Fine steps measure a, and each step gets an equal share of the
    integral of √a over λ. The last step goes from ``sde.t_min`` to 0.

    Arguments:
        model: Denoiser.
        shape_or_x: Shape (B, *event) of the trajectories, or their initial states at T.
        steps: Number of steps; the grid has one more time.
        fine: Number of steps of the fine grid, uniform in λ, that measures the errors.
        seed: Seed of the initial states.
    """
    check.integer("steps", steps, at_least=2)
    times, error = _pilot(model, shape_or_x, fine, seed)
    density = torch.tensor([error(i, i + 1) for i in range(len(times) - 2)], dtype=torch.float64).sqrt()
    share = torch.cat([density.new_zeros(1), density.cumsum(0)])
    lam = model.sde.lam(times[:-1])
    lam = torch.where(lam.isfinite(), lam, lam[1] - (lam[2] - lam[1]))
    targets = torch.linspace(0, 1, steps, dtype=torch.float64)[1:-1] * share[-1]
    k = torch.searchsorted(share, targets).clamp(1, len(share) - 1)
    part = (targets - share[k - 1]) / (share[k] - share[k - 1])
    inner = model.sde.inverse_lam(lam[k - 1] + part * (lam[k] - lam[k - 1]))
    return check_grid(model.sde, torch.cat([times[:1], inner, times[-2:]]))


@checked
def align_your_steps(
    model: AbstractDenoiser, data: Tensor, steps: int, *, fine: int = 64, t_min: float | None = None, seed: int = 0
) -> Tensor:
    r"""Align Your Steps: the grid with the smallest bound on the KL divergence of stochastic solvers.

    .. math:: \sum_i \int_{\lambda_i}^{\lambda_{i+1}} e^{2\lambda}\,
              E\,|D(x_\lambda, \lambda) - D(x_{\lambda_i}, \lambda_i)|^2\, d\lambda

    over forward paths of the data, from T to t_min; the last step goes from t_min to 0. It bounds the divergence of
    the exact reverse SDE from the SDE that a solver of order 1 with η = 1 integrates. The weight is largest near t_min,
    so the grid is dense near data. It suits stochastic solvers such as ``ss.SDEDPMSolverPP(2)``. For deterministic
    solvers :func:`gits` and :func:`equal_error` are better, because a bound on paths says little about them.

    The paper lowers the bound by moving one time after another and stops early. This function finds the smallest sum on
    a fine grid by dynamic programming. The integrals use the paper's importance weights, those of Gaussian data with
    the variance of `data`, for which they are exact. A larger `t_min` has the effect of stopping early: it leaves out
    the noise levels that a sample does not show. ``ss.grids.published`` has the grids that the authors found for large
    models.

    Arguments:
        model: Denoiser.
        data: Data or samples, (B, *event).
        steps: Number of steps; the grid has one more time.
        fine: Number of steps of the fine grid, uniform in λ, from which times are selected.
        t_min: Last positive time, by default ``sde.t_min``.
        seed: Seed of the forward paths.

    References:
        | Align Your Steps: Optimizing Sampling Schedules in Diffusion Models (Sabour et al., 2024), arXiv:2404.14507,
          eqs. 10 to 15
    """
    check_ready(model)
    check.integer("steps", steps, at_least=2)
    sde, noise = model.sde, Noise(seed).fork(Stream.GRIDS)
    check.state("data", data)
    times = uniform_lam(sde, check.integer("fine", fine, at_least=steps), t_min=t_min)
    lam = sde.lam(times[:-1])
    lam = torch.where(lam.isfinite(), lam, lam[1] - (lam[2] - lam[1]))
    rho = (-lam).exp()
    denoised: list[Tensor] = []
    u, finite = data, check.Finite("the predictions")
    with torch.no_grad():
        for k in range(len(lam) - 1, -1, -1):  # from data to noise, one path for each sample
            fresh = rho[k] ** 2 - (rho[k + 1] ** 2 if k + 1 < len(lam) else 0.0)
            u = u + float(fresh.sqrt()) * noise.like(data, k)
            t = float(times[k])
            x = sde.alpha(t) * u if sde.alpha(t) > 0 else sde.sigma(t) / float(rho[k]) * u
            denoised.append(model.x0(x, t).flatten(1))
            finite.add(denoised[-1], t)
    finite.require()
    denoised.reverse()
    variance = float(data.double().var()) or 1.0
    cost = torch.full((len(lam), len(lam)), math.inf, dtype=torch.float64)
    for i in range(len(lam) - 1):
        gaps = [float((d - denoised[i]).square().sum(1).mean()) for d in denoised[i + 1 :]]
        cost[i, i + 1 :] = _bounds(lam[i:], torch.tensor(gaps, dtype=torch.float64), variance)
    return torch.cat([times[_cheapest(cost, steps - 1)], times[-1:]])


def _bounds(lam: Tensor, gaps: Tensor, c: float) -> Tensor:
    """Integrals of e^{2λ} E|D − D_0|² from λ_0 to each later λ, from the squared differences `gaps` there.

    Gaussian data of variance c has a difference proportional to 1/(ϱ² + c) − 1/(ϱ_0² + c). The ratio to this one is
    smooth, and linear in each interval to the accuracy of the fine grid.
    """
    nodes, weights = legendre(8)
    span = lam.diff()[:, None]

    def shape(at: Tensor) -> Tensor:
        v, first = (-2 * at).exp(), float((-2 * lam[0]).exp())
        return (first - v) / ((v + c) * (first + c))

    ratio = gaps / shape(lam[1:])
    ratio = torch.cat([ratio[:1], ratio])
    at = lam[:-1, None] + span * nodes
    levels = ratio[:-1, None] + (ratio[1:] - ratio[:-1])[:, None] * nodes
    return (span * weights * (2 * at).exp() * shape(at) * levels).sum(1).cumsum(0)


def _pilot(
    model: AbstractDenoiser, shape_or_x: Any, fine: int, seed: int
) -> tuple[Tensor, Callable[[int, int], float]]:
    """Times of fine trajectories, and the error of a DDIM step from time i to time j, propagated to the data."""
    check_ready(model)
    sde = model.sde
    times = uniform_lam(sde, check.integer("fine", fine, at_least=2))
    x = Start().draw(model, shape_or_x, sde.T, Noise(seed).fork(Stream.GRIDS))
    visited: list[Step] = []
    rule = default_solver(fine, model)
    if rule.own_times:
        rule = VelocityAB(2)
    elif isinstance(rule, Multistep):
        rule = replace(rule, corrector=0)  # the states of the nodes are then those that the model is evaluated at
    plan = rule.plan(sde, times)
    with torch.no_grad():
        run(plan, model.x0, x, callback=visited.append)
    finite = check.Finite("the trajectories")
    for step in visited:
        finite.add(step.x if step.x0 is None else step.x0, float(step.t))
    finite.require()
    variance = float(visited[-1].x.var(0).mean()) if len(x) > 1 else 1.0
    alpha, sigma = sde.alpha(times), sde.sigma(times)

    def error(i: int, j: int) -> float:
        a, s = visited[i], float(sigma[j] / sigma[i])
        assert a.x0 is not None
        gap = s * a.x + (float(alpha[j]) - float(alpha[i]) * s) * a.x0 - visited[j].x
        factor = math.sqrt(variance / (variance * float(alpha[j]) ** 2 + float(sigma[j]) ** 2))
        return factor * float(gap.square().mean().sqrt())

    return times, error


def _cheapest(cost: Tensor, steps: int) -> Tensor:
    """Indices of the cheapest path from the first to the last time in exactly `steps` steps."""
    N = len(cost)
    if not 1 <= steps <= N - 1:
        raise ValueError(
            f"`steps` must lie between 1 and {N - 1}, the number of fine steps, got {steps}; raise `fine`."
        )
    best = torch.full((N,), math.inf, dtype=torch.float64)
    best[0] = 0.0
    predecessors: list[Tensor] = []
    for _ in range(steps):
        best, predecessor = (best[:, None] + cost).min(0)
        predecessors.append(predecessor)
    path = [N - 1]
    for predecessor in reversed(predecessors):
        path.append(int(predecessor[path[-1]]))
    return torch.tensor(path[::-1])
