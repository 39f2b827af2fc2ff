r"""Numerical checks of solvers: order of convergence, exactness on one-point data, error against evaluations.

The checks use denoisers whose probability flow is known. They accept any solver and any denoiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._numerics import legendre
from scoresde.analysis.moments import exact_moments
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.mixture import GaussianMixture
from scoresde.denoisers.start import Start
from scoresde.noise.keyed import Noise
from scoresde.plan.rows import as_number
from scoresde.plan.run import run, updates
from scoresde.plan.table import Plan
from scoresde.processes.sde import SDE
from scoresde.solvers.interpolants import VELOCITY
from scoresde.solvers.rule import Solver
from scoresde.solvers.runge_kutta import RK4, RungeKutta

Reference = Callable[[Tensor, float, float], Tensor]


@dataclass(frozen=True)
class Order:
    """A measured order of convergence.

    Arguments:
        slope: Minus the slope of log error over log number of steps.
        declared: Order that the solver declares.
        steps: Numbers of steps.
        errors: Error for each number of steps.
    """

    slope: float
    declared: int
    steps: tuple[int, ...]
    errors: tuple[float, ...]

    def __str__(self) -> str:
        errors = ", ".join(f"{n}: {e:.2e}" for n, e in zip(self.steps, self.errors, strict=True))
        return f"order {self.slope:.2f} (declared {self.declared}); error by steps {errors}"


@checked
def convergence_order(
    solver: Solver,
    model: AbstractDenoiser,
    *,
    steps: Sequence[int] = (40, 80, 160),
    t_start: float | None = None,
    t_end: float | None = None,
    reference: Reference | None = None,
    grid: Callable[..., Tensor] | None = None,
    x: Tensor | None = None,
    n: int = 32,
    seed: int = 0,
) -> Order:
    """Measure the order of a deterministic solver from its median error over initial states.

    Arguments:
        solver: Solver to measure.
        model: Denoiser.
        steps: Numbers of steps, at least two.
        t_start: Initial time, by default T, or the time where λ = −4 if α(T) = 0; α must be positive.
        t_end: Final time, by default where λ = 2; σ must be positive.
        reference: Exact flow, ``(x, s, t) -> x_t``, by default :func:`exact_flow` of the model.
        grid: Function that makes a grid, by default a mildly non-uniform one.
        x: Initial states, (B, *event) in float64; by default `n` states of pure noise with the shape ``model.event``.
        n: Number of initial states.
        seed: Seed of the initial states.
    """
    sde = model.sde
    check.window(sde.T, t_start, t_end)
    check.integer("n", n, at_least=1)
    if len(set(steps)) < 2:
        raise ValueError(f"`steps` must hold at least two different numbers, to fit a slope, got {tuple(steps)}.")
    first = t_start if t_start is not None else sde.T if sde.alpha(sde.T) > 0 else sde.t_of_lam(-4.0)
    last = sde.t_of_lam(2.0) if t_end is None else t_end
    for name, t in (("t_start", first), ("t_end", last)):
        if not math.isfinite(sde.lam(t)):
            raise ValueError(f"`{name}` must be a time with α > 0 and σ > 0, got {t:g}, where λ is infinite.")
    if x is None:
        dtype, device = Start(dtype=torch.float64).placement(model)
        x = sde.prior(first, std=0.0).sample((n, *event_of(model)), Noise(seed), dtype=dtype, device=device)
    truth = (reference or exact_flow(model))(x, first, last)
    maker = grid or uneven_lam
    errors = []
    with torch.no_grad():
        for N in steps:
            plan = solver.plan(sde, maker(sde, N, t_start=first, t_end=last))
            gap = (run(plan, model.x0, x) - truth).flatten(1).norm(dim=1)
            finite = check.Finite(f"the errors of {N} steps")
            finite.add(gap)
            finite.require()
            errors.append(float(gap.median()))
    if 0.0 in errors:
        raise ValueError("`solver` has no error on this `model`, so its order cannot be measured; use another model.")
    return Order(_slope(steps, errors), solver.order, tuple(steps), tuple(errors))


def event_of(model: AbstractDenoiser) -> tuple[int, ...]:
    """Shape of one sample of a model: its attribute `event`, or (1,)."""
    event: tuple[int, ...] = getattr(model, "event", (1,))
    return event


def _slope(steps: Sequence[int], errors: Sequence[float]) -> float:
    """Minus the slope of log error over log number of steps."""
    a = torch.tensor([math.log(N) for N in steps], dtype=torch.float64)
    b = torch.tensor([math.log(e) for e in errors], dtype=torch.float64)
    return -float(((a - a.mean()) * (b - b.mean())).sum() / ((a - a.mean()) ** 2).sum())


def uneven_lam(sde: SDE, steps: int, *, t_start: float, t_end: float) -> Tensor:
    """Grid whose steps in λ vary smoothly by a factor of 3, so that no solver gains from equal steps.

    Arguments:
        sde: Process.
        steps: Number of steps.
        t_start: First time, where λ is finite.
        t_end: Last time, where λ is finite.
    """
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    u = u + 0.5 / (2 * math.pi) * (2 * math.pi * u).sin()
    a, b = sde.lam(t_start), sde.lam(t_end)
    times = sde.t_of_lam((a + (b - a) * u).clamp(min(a, b), max(a, b)))
    times[0], times[-1] = t_start, t_end
    return times


@checked
def exact_flow(model: AbstractDenoiser, steps: int = 800) -> Reference:
    """The probability flow of a model: in closed form for one Gaussian, otherwise by many steps of RK4.

    Arguments:
        model: Denoiser.
        steps: Number of steps, if there is no closed form.

    Returns:
        Function ``(x, s, t) -> x_t`` from time s to time t, in either direction, where σ > 0.
    """
    if isinstance(model, GaussianMixture) and len(model.means) == 1:
        return model.flow

    check.integer("steps", steps, at_least=1)

    def flow(x: Tensor, s: float, t: float) -> Tensor:
        if model.sde.sigma(t) == 0 or model.sde.sigma(s) == 0:
            raise ValueError(f"`s` and `t` must be times with σ > 0, got s = {s:g} and t = {t:g}; end at `sde.t_min`.")
        near = _with_signal(model.sde, s, t), _with_signal(model.sde, t, s)
        grid = uneven_lam(model.sde, steps, t_start=near[0], t_end=near[1])
        ends = [grid.new_tensor([v]) for v in (s, t)]
        grid = torch.cat([*ends[: near[0] != s], grid, *ends[1 : 1 + (near[1] != t)]])
        plan = RungeKutta(RK4, VELOCITY).plan(model.sde, grid, up="solve")
        with torch.no_grad():
            out = run(plan, model.x0, x)
        check.warn_unless_finite(out, "the states of the flow")
        return out

    return flow


def _with_signal(sde: SDE, t: float, other: float) -> float:
    """The time t; where λ(t) is infinite, a slightly earlier time."""
    return t if math.isfinite(sde.lam(t)) else max(t * (1 - 1e-3), (t + other) / 2)


@checked
def weak_order(
    solver: Solver,
    sde: SDE,
    *,
    mean: Sequence[float] = (0.4, -0.7, 0.2, 1.0, -0.3),
    spectrum: Sequence[float] = (0.09, 0.36, 1.0, 2.89, 9.0),
    steps: Sequence[int] = (80, 160),
    t_start: float | None = None,
    t_end: float | None = None,
    grid: Callable[..., Tensor] | None = None,
    of: str = "law",
    eta: float = 1.0,
) -> Order:
    r"""Measure the weak order of a solver on Gaussian data from exact moments, without samples.

    The error in a direction is the 2-Wasserstein distance of two Gaussians,

    .. math:: W_2^2 = (\mu - \mu^*)^2 + (s - s^*)^2.

    Arguments:
        solver: Solver to measure.
        sde: Process.
        mean: Means of the data.
        spectrum: Variances of the data.
        steps: Numbers of steps.
        t_start: Initial time, where the state has the exact marginal; by default where λ = −2.5.
        t_end: Final time, by default where λ = 2.
        grid: Function that makes a grid, by default a mildly non-uniform one.
        of: Quantity: ``"law"``, or ``"drift"``, the mean of the result given its start, which has the declared order.
        eta: Stochasticity η of the solver, for ``"drift"``.
    """
    check.choice("of", of, ("law", "drift"))
    check.window(sde.T, t_start, t_end)
    first = sde.t_of_lam(-2.5) if t_start is None else t_start
    last = sde.t_of_lam(2.0) if t_end is None else t_end
    m, c = (torch.tensor(v, dtype=torch.float64) for v in (mean, spectrum))
    alpha = sde.alpha(last)
    before, after = (sde.alpha(t) ** 2 * c + sde.sigma(t) ** 2 for t in (first, last))
    # covariance of the exact result with the normal of the start: the reverse SDE is linear
    drift = before.sqrt() * (after / before) ** ((1 + eta**2) / 2) * (sde.alpha(first) / alpha) ** (eta**2)
    errors = []
    for N in steps:
        plan = solver.plan(sde, (grid or uneven_lam)(sde, N, t_start=first, t_end=last))
        result = exact_moments(plan, sde, mean=m, spectrum=c)
        if of == "drift":
            gap = (result.of_start - drift).square()
        else:
            gap = (result.mean - alpha * m).square() + (result.variance.sqrt() - after.sqrt()).square()
        errors.append(float(gap.mean().sqrt()))
    declared = solver.order if of == "drift" else solver.weak_order
    return Order(_slope(steps, errors), declared, tuple(steps), tuple(errors))


@checked
def order_residuals(plan: Plan, sde: SDE, degree: int = 3) -> Tensor:
    r"""Residuals of the order conditions: the error of each step for D = (λ − λ_s)ⁿ/n!, n = 0 … degree.

    A step starts from exact states, and the data prediction is a polynomial of λ; the error is divided by
    :math:`\alpha_t h^{n+1}`. For a solver of order p the residuals with n < p are 0 if it interpolates the data
    prediction in λ; otherwise they vanish with h.

    Arguments:
        plan: Deterministic plan.
        sde: Process of the plan.
        degree: Largest n.

    Returns:
        Residuals, (steps, degree + 1); NaN where α or σ vanishes at an end of the step.
    """
    if plan.stochastic:
        raise ValueError("`plan` draws noise; order conditions are for deterministic plans, such as those of DDIM.")
    check.integer("degree", degree)
    lam = sde.lam(torch.tensor([as_number(row.t) for row in plan.rows], dtype=torch.float64))
    nodes = [r for r, row in enumerate(plan.rows) if row.node is not None]
    starts = torch.tensor(nodes[:-1])
    origin = lam[starts]
    n = torch.arange(degree + 1, dtype=torch.float64)
    factorial = (n + 1).lgamma().exp().round()
    node, weight = legendre()
    evaluated = iter([lam[r] for r, row in enumerate(plan.rows) if row.evaluates])

    def exact(r: int) -> Tensor:
        """α_r ∫ e^{−(λ_r − λ)} (λ − λ_s)ⁿ/n! dλ from λ_s to λ_r, for each step and each n."""
        gap = (lam[r] - origin)[:, None]
        powers = (node * gap)[..., None] ** n / factorial
        alpha = sde.alpha(as_number(plan.rows[r].t))
        return alpha * gap * torch.einsum("sq,sqn->sn", (-(1 - node) * gap).exp() * weight, powers)

    # One run for all steps and all n: the state is (steps, degree + 1), and a step has exact states up to its start.
    out = torch.full((len(starts), degree + 1), math.nan, dtype=torch.float64)
    with torch.no_grad():
        for update in updates(plan, lambda x, t: (next(evaluated) - origin)[:, None] ** n / factorial, exact(0)):
            if update.row in nodes:
                i, truth = nodes.index(update.row) - 1, exact(update.row)
                size = sde.alpha(as_number(update.t)) * (lam[update.row] - origin[i]) ** (n + 1)
                error = (update.x[i] - truth[i]) / size
                out[i] = torch.where(size.isfinite() & (size != 0), error, math.nan)
                update.x = torch.where((update.row <= starts)[:, None], truth, update.x)
    return out
