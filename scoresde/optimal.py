r"""Grids that are computed: for a covariance, or from one set of fine trajectories of a model.

:func:`gaussian_grid` needs no network: on Gaussian data the result of a rule is a known function of its times. The
others look at a model once and choose a part of a fine grid, by dynamic programming over the cost of every leg or by
sharing the error out equally. What is between two states at a time, in x/α, is carried to the data by the factor
:math:`\sqrt{c/(c + \varrho^2)}` of data with variance c.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.analysis import Numbers, _directions, _flow_gain, _flow_gaps, _solve
from scoresde.denoiser import AbstractDenoiser, _check_denoiser
from scoresde.fitting import _Levels
from scoresde.grids import check_grid, karras, quadratic_vp, uniform_lam
from scoresde.noise import Noise
from scoresde.plan import Step, run
from scoresde.sampling import default_solver
from scoresde.sde import SDE
from scoresde.solvers.base import Solver
from scoresde.unrolled import Unrolled, unroll

_STREAM = 0x6F7074


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
    r"""The times at which a rule errs least on Gaussian data with a given covariance spectrum.

    .. math:: \min_{t_1 > \dots > t_{N-1}} \sum_c w_c\, E\,|x^{rule}_c - x^{flow}_c|^2

    of deterministic rules, and of the deviations' differences of stochastic ones. No network is asked: the sum is
    computed from the table and minimised by L-BFGS, from the best of three common grids.

    Arguments:
        sde: The process.
        steps: How many steps; the grid has one more time.
        spectrum: Variances of the data in K directions, as :attr:`scoresde.gaussian.Gaussian.spectrum`.
        solver: The rule, by default the one that ``ss.sample`` takes.
        weights: Of the directions, (K,) or one number.
        t_start: First time, by default T.
        t_end: Last time.

    Example:
        >>> import scoresde as ss
        >>> grid = gaussian_grid(ss.VP(), 6, [0.01, 0.1, 1.0])
        >>> len(grid), float(grid[-1])
        (7, 0.0)
    """
    check.integer("steps", steps, least=2)
    c, w = _directions(spectrum, weights)
    rule = default_solver(steps) if solver is None else solver
    makers = (quadratic_vp, karras, uniform_lam)
    grids = [maker(sde, steps, t_start=t_start, t_end=t_end) for maker in makers]

    def loss(times: Tensor) -> Tensor:
        u = unroll(rule.plan(sde, times))
        gaps = _law_gaps(u, sde, c) if u.z.shape[1] else _flow_gaps(u, sde, c)
        return (w * gaps.square()).sum().log()

    best = min(grids, key=lambda times: float(loss(times)))
    levels = _Levels(sde, best.tolist(), True, False, sde.lam(sde.t_min))
    for knob in levels.knobs:
        knob.requires_grad_(True)
    optimiser = torch.optim.LBFGS(levels.knobs, max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimiser.zero_grad()
        value = loss(levels())
        value.backward()
        return float(value.detach())

    optimiser.step(closure)
    found = levels().detach()
    better = bool((found.diff() < 0).all()) and float(loss(found)) < float(loss(best))
    return check_grid(sde, found if better else best)


def _law_gaps(u: Unrolled, sde: SDE, c: Tensor) -> Tensor:
    """Difference of the standard deviations, (K,); differentiable."""
    s, t = (torch.as_tensor(v, dtype=torch.float64) for v in (u.start, u.t[-1]))
    gain, _, noise, _ = _solve(u, sde, c)
    start = (sde.alpha(s) ** 2 * c + sde.sigma(s) ** 2).sqrt()
    deviation = ((gain * start).square() + noise.square().sum(1)).sqrt()
    return deviation - start * _flow_gain(sde, s, t[None], c)[:, 0]


def gits(
    model: AbstractDenoiser,
    shape_or_x: Sequence[int] | Tensor,
    steps: int,
    *,
    fine: int = 64,
    seed: int = 0,
    **cond: Any,
) -> Tensor:
    """The grid on which single steps of DDIM from the states of fine trajectories miss least, summed over the steps.

    Arguments:
        model: A denoiser.
        shape_or_x: Shape (B, *event) of the trajectories, or their starts at T.
        steps: How many steps; the grid has one more time.
        fine: Steps of the fine grid, even in λ, that times are chosen from.
        seed: Of the starts.
        **cond: Conditions, handed to the network.

    References:
        | On the Trajectory Regularity of ODE-based Diffusion Sampling (Chen et al., 2024), arXiv:2405.11326
    """
    check.conditions(cond, gits)
    times, misses = _pilot(model, shape_or_x, fine, seed, cond)
    cost = torch.full((len(times), len(times)), math.inf, dtype=torch.float64)
    for i in range(len(times) - 1):
        for j in range(i + 1, len(times)):
            cost[i, j] = misses(i, j)
    return times[_cheapest(cost, steps)]


def equal_error(
    model: AbstractDenoiser,
    shape_or_x: Sequence[int] | Tensor,
    steps: int,
    *,
    fine: int = 64,
    seed: int = 0,
    **cond: Any,
) -> Tensor:
    r"""The grid whose legs all err alike, by the error density of a fine pilot run.

    A leg of size h errs by about a(λ) h², with a measured on fine legs; equal shares of :math:`\int\sqrt a\,d\lambda`
    make the errors equal. The last step goes from ``sde.t_min`` to 0. The arguments of :func:`gits`.
    """
    check.conditions(cond, equal_error)
    check.integer("steps", steps, least=2)
    times, misses = _pilot(model, shape_or_x, fine, seed, cond)
    density = torch.tensor([misses(i, i + 1) for i in range(len(times) - 2)], dtype=torch.float64).sqrt()
    share = torch.cat([density.new_zeros(1), density.cumsum(0)])
    lam = model.sde.lam(times[:-1])
    lam = torch.where(lam.isfinite(), lam, lam[1] - (lam[2] - lam[1]))
    wanted = torch.linspace(0, 1, steps, dtype=torch.float64)[1:-1] * share[-1]
    k = torch.searchsorted(share, wanted).clamp(1, len(share) - 1)
    part = (wanted - share[k - 1]) / (share[k] - share[k - 1])
    inner = model.sde._t_of_lam(lam[k - 1] + part * (lam[k] - lam[k - 1]))
    return check_grid(model.sde, torch.cat([times[:1], inner, times[-2:]]))


def align_your_steps(
    model: AbstractDenoiser, data: Tensor, steps: int, *, fine: int = 64, seed: int = 0, **cond: Any
) -> Tensor:
    r"""Align Your Steps: least upper bound of the KL divergence that steps with a frozen denoiser make.

    .. math:: \sum_i \int_{\lambda_i}^{\lambda_{i+1}} e^{2\lambda}\,
              E\,|D(x_\lambda, \lambda) - D(x_{\lambda_i}, \lambda_i)|^2\, d\lambda

    over forward paths of the data; the least sum on a fine grid is found exactly. The last step goes from
    ``sde.t_min`` to 0.

    Arguments:
        model: A denoiser.
        data: Data or samples, (B, *event).
        steps: How many steps; the grid has one more time.
        fine: Steps of the fine grid, even in λ, that times are chosen from.
        seed: Of the forward paths.
        **cond: Conditions, handed to the network.

    References:
        | Align Your Steps (Sabour et al., 2024), arXiv:2404.14507
    """
    check.conditions(cond, align_your_steps)
    _check_denoiser(model)
    check.integer("steps", steps, least=2)
    sde, noise = model.sde, Noise(seed).fork(_STREAM)
    check.state("data", data)
    times = uniform_lam(sde, check.integer("fine", fine, least=steps))
    lam = sde.lam(times[:-1])
    lam = torch.where(lam.isfinite(), lam, lam[1] - (lam[2] - lam[1]))
    rho = (-lam).exp()
    said: list[Tensor] = []
    u = data
    with torch.no_grad():
        for k in range(len(lam) - 1, -1, -1):  # from data to noise: one path a sample
            fresh = rho[k] ** 2 - (rho[k + 1] ** 2 if k + 1 < len(lam) else 0.0)
            u = u + float(fresh.sqrt()) * noise.like(data, k)
            t = float(times[k])
            x = sde.alpha(t) * u if sde.alpha(t) > 0 else sde.sigma(t) / float(rho[k]) * u
            said.append(model.x0(x, t, **cond).flatten(1))
    said.reverse()
    weight = (2 * lam).exp() * lam.diff().mean()
    cost = torch.full((len(lam), len(lam)), math.inf, dtype=torch.float64)
    for i in range(len(lam) - 1):
        gaps = [float((said[k] - said[i]).square().sum(1).mean()) for k in range(i, len(lam))]
        # by the trapezoidal rule from i to j
        terms = weight[i:] * torch.tensor(gaps, dtype=torch.float64)
        cost[i, i + 1 :] = ((terms[1:] + terms[:-1]) / 2).cumsum(0)
    return torch.cat([times[_cheapest(cost, steps - 1)], times[-1:]])


def _pilot(
    model: AbstractDenoiser, shape_or_x: Any, fine: int, seed: int, cond: dict[str, Any]
) -> tuple[Tensor, Callable[[int, int], float]]:
    """Fine trajectories: their times, and by how much DDIM from time i misses them at time j, carried to the data."""
    _check_denoiser(model)
    sde = model.sde
    times = uniform_lam(sde, check.integer("fine", fine, least=2))
    if isinstance(shape_or_x, Tensor):
        x = check.state("x", shape_or_x)
    else:
        x = sde.prior().sample(tuple(shape_or_x), Noise(seed).fork(_STREAM))
    seen: list[Step] = []
    plan = default_solver(fine, model).plan(sde, times)
    with torch.no_grad():
        run(plan, lambda y, t: model.x0(y, t, **cond), x, callback=seen.append)
    variance = float(seen[-1].x.var(0).mean()) if len(x) > 1 else 1.0
    alpha, sigma = sde.alpha(times), sde.sigma(times)

    def miss(i: int, j: int) -> float:
        a, s = seen[i], float(sigma[j] / sigma[i])
        assert a.x0 is not None
        gap = s * a.x + (float(alpha[j]) - float(alpha[i]) * s) * a.x0 - seen[j].x
        carried = math.sqrt(variance / (variance * float(alpha[j]) ** 2 + float(sigma[j]) ** 2))
        return carried * float(gap.square().mean().sqrt())

    return times, miss


def _cheapest(cost: Tensor, steps: int) -> Tensor:
    """Indices of the cheapest path from the first to the last in exactly `steps` legs."""
    N = len(cost)
    if not 1 <= steps <= N - 1:
        raise ValueError(f"`steps` must lie between 1 and the {N - 1} of the fine grid, got {steps}; take a finer one.")
    best = torch.full((N,), math.inf, dtype=torch.float64)
    best[0] = 0.0
    came: list[Tensor] = []
    for _ in range(steps):
        best, before = (best[:, None] + cost).min(0)
        came.append(before)
    path = [N - 1]
    for before in reversed(came):
        path.append(int(before[path[-1]]))
    return torch.tensor(path[::-1])


__all__ = ["align_your_steps", "equal_error", "gaussian_grid", "gits"]
