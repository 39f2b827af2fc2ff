r"""Is a solver what it says? Measured orders, exactness on one point, and error against evaluations.

All of it runs on denoisers whose probability flow is known, and works on a user's own rule and denoiser alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.denoiser import AbstractDenoiser
from scoresde.grids import karras
from scoresde.mixture import GaussianMixture
from scoresde.noise import Noise
from scoresde.plan import Plan, run
from scoresde.quadrature import VELOCITY, legendre
from scoresde.sde import SDE
from scoresde.solvers.base import Solver
from scoresde.solvers.singlestep import RK4, RungeKutta

Reference = Callable[[Tensor, float, float], Tensor]


@dataclass(frozen=True)
class Order:
    """A measured order of convergence.

    Arguments:
        slope: Minus the slope of log error over log steps.
        declared: What the rule claims.
        legs: Numbers of legs.
        errors: Median error over the start points at each.
    """

    slope: float
    declared: int
    legs: tuple[int, ...]
    errors: tuple[float, ...]

    def __str__(self) -> str:
        errors = ", ".join(f"{n}: {e:.2e}" for n, e in zip(self.legs, self.errors, strict=True))
        return f"order {self.slope:.2f} (declared {self.declared}); error by legs {errors}"


def convergence_order(
    solver: Solver,
    model: AbstractDenoiser,
    *,
    legs: Sequence[int] = (40, 80, 160),
    t_start: float | None = None,
    t_end: float | None = None,
    reference: Reference | None = None,
    grid: Callable[..., Tensor] | None = None,
    x: Tensor | None = None,
    n: int = 32,
    seed: int = 0,
) -> Order:
    """Measure the order of a deterministic rule on a model whose flow is known.

    Arguments:
        solver: The rule.
        model: A denoiser; with one Gaussian the flow is closed, otherwise it is solved finely.
        legs: Numbers of legs, at least two.
        t_start: Where to start, by default T, or where λ = −4 if α(T) = 0; there must be signal.
        t_end: Where to end, by default where λ = 2; there must be noise.
        reference: ``(x, s, t) -> x_t``, the exact flow, if the model is another.
        grid: A grid maker, by default a mildly uneven one.
        x: Start points, (B, *event) in float64, for a model that does not know its `event`; by default pure noise.
        n: How many.
        seed: Of the start points.
    """
    sde = model.sde
    if len(set(legs)) < 2:
        raise ValueError(f"`legs` must hold at least two numbers for a slope, got {tuple(legs)}.")
    first = t_start if t_start is not None else sde.T if sde.alpha(sde.T) > 0 else sde.t_of_lam(-4.0)
    last = sde.t_of_lam(2.0) if t_end is None else t_end
    for name, t in (("t_start", first), ("t_end", last)):
        if not math.isfinite(sde.lam(t)):
            raise ValueError(f"`{name}` must be a time with signal and noise, got {t:g}, where λ is infinite.")
    if x is None:
        shape = (n, *getattr(model, "event", (1,)))
        x = sde.sigma(first) * Noise(seed).normal(shape, 0, dtype=torch.float64)
    truth = (reference or exact_flow(model))(x, first, last)
    maker = grid or _uneven
    errors = []
    with torch.no_grad():
        for N in legs:
            plan = solver.plan(sde, maker(sde, N, t_start=first, t_end=last))
            gap = (run(plan, model.x0, x) - truth).flatten(1).norm(dim=1)
            errors.append(float(gap.median()))
    if 0.0 in errors:
        raise ValueError("the rule has no error on this model, which so shows no order; take another model.")
    return Order(_slope(legs, errors), solver.declared_order, tuple(legs), tuple(errors))


def _slope(legs: Sequence[int], errors: Sequence[float]) -> float:
    """Minus the slope of log error over log legs."""
    a = torch.tensor([math.log(N) for N in legs], dtype=torch.float64)
    b = torch.tensor([math.log(e) for e in errors], dtype=torch.float64)
    return -float(((a - a.mean()) * (b - b.mean())).sum() / ((a - a.mean()) ** 2).sum())


def _uneven(sde: SDE, steps: int, *, t_start: float, t_end: float) -> Tensor:
    """Steps in λ whose sizes vary smoothly by a factor of 3: no rule gains from equal steps."""
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    u = u + 0.5 / (2 * math.pi) * (2 * math.pi * u).sin()
    a, b = sde.lam(t_start), sde.lam(t_end)
    times = sde.t_of_lam((a + (b - a) * u).clamp(min(a, b), max(a, b)))
    times[0], times[-1] = t_start, t_end
    return times


def exact_flow(model: AbstractDenoiser, legs: int = 800) -> Reference:
    """The probability flow of a model: closed for one Gaussian, else the classical method in flow time, finely.

    Arguments:
        model: A denoiser.
        legs: How many, where there is no closed form.

    Returns:
        ``(x, s, t) -> x_t``, from time s to time t, up or down, where σ > 0.
    """
    if isinstance(model, GaussianMixture) and len(model.means) == 1:
        return model.flow

    def flow(x: Tensor, s: float, t: float) -> Tensor:
        if model.sde.sigma(t) == 0 or model.sde.sigma(s) == 0:
            raise ValueError(f"the flow has no speed where σ = 0, got s = {s:g} and t = {t:g}; end at `sde.t_min`.")
        near = _with_signal(model.sde, s, t), _with_signal(model.sde, t, s)
        grid = _uneven(model.sde, legs, t_start=near[0], t_end=near[1])
        ends = [grid.new_tensor([v]) for v in (s, t)]
        grid = torch.cat([*ends[: near[0] != s], grid, *ends[1 : 1 + (near[1] != t)]])
        plan = RungeKutta(RK4, VELOCITY).plan(model.sde, grid, up="solve")
        with torch.no_grad():
            return run(plan, model.x0, x)

    return flow


def _with_signal(sde: SDE, t: float, other: float) -> float:
    """The time t, or one just before it where α(t) = 0: flow time is finite there, λ is not."""
    return t if math.isfinite(sde.lam(t)) else max(t * (1 - 1e-3), (t + other) / 2)


def point_mass_defect(plan: Plan, sde: SDE, *, x0: float = 0.7) -> float:
    r"""How far a plan is from exact when the data is one point, so that D is constant.

    The state of an exponential method is then :math:`\alpha_t x_0 + \sigma_t\varepsilon` at every node, and with noise
    its mean and variance are those of the marginal. The plan is run on its coefficients: no samples are drawn.

    Arguments:
        plan: The table.
        sde: The process it was written for.
        x0: The point.

    Returns:
        The largest distance of the mean from α x₀ and of the deviation from σ, relative to hypot(α x₀, σ), over
        the rows that settle a node.
    """
    first = float(plan.rows[0].t)
    # Each state is m + k ε + Σ c z; carry the mean and the coefficients of ε and of every normal.
    width = 1 + plan.draws
    means: list[float] = [sde.alpha(first) * x0]
    noises: list[Tensor] = [torch.zeros(width, dtype=torch.float64)]
    noises[0][0] = sde.sigma(first)
    worst = 0.0
    for row in plan.rows[1:]:
        mean = sum(float(w) * means[k] for k, w in row.x) + sum(float(w) * x0 for _, w in row.d) + float(row.one)
        noise = torch.zeros(width, dtype=torch.float64)
        for k, w in row.x:
            noise = noise + float(w) * noises[k]
        for k, w in row.z:
            noise[1 + k] += float(w)
        means.append(mean)
        noises.append(noise)
        if row.node is not None:
            t = float(row.t)
            alpha, sigma = sde.alpha(t), sde.sigma(t)
            size = math.hypot(alpha * x0, sigma)
            gap = max(abs(mean - alpha * x0), abs(float(noise.norm()) - sigma))
            worst = max(worst, gap / size)
    return worst


@dataclass(frozen=True)
class ExactMoments:
    """Mean and variance of what a plan returns, in each direction of Gaussian data.

    Arguments:
        mean: (K,).
        variance: (K,).
        of_start: Covariance with the start's standardized normal, (K,): where the mean goes from a given start.
        t: Time of the result.
        path: At each node: (node, t, mean, variance).
    """

    mean: Tensor
    variance: Tensor
    of_start: Tensor
    t: float
    path: tuple[tuple[int, float, Tensor, Tensor], ...]


def exact_moments(
    plan: Plan,
    sde: SDE,
    *,
    mean: float | Sequence[float] | Tensor = 0.0,
    spectrum: float | Sequence[float] | Tensor = 1.0,
    start: str = "marginal",
) -> ExactMoments:
    r"""Mean and variance of a plan's result on Gaussian data, without drawing a sample.

    In the direction of an eigenvector of the covariance, with eigenvalue c and mean m, the denoiser is linear,

    .. math:: D(x, t) = m + \frac{\alpha c}{\alpha^2 c + \sigma^2}\,(x - \alpha m),

    so that each state is a known combination of 1, the start, and the normals of the plan.

    Arguments:
        plan: The table.
        sde: The process it was written for.
        mean: Means m of the data in K directions, or one number.
        spectrum: Variances c of the data in K directions, or one number.
        start: ``"marginal"``, or ``"prior"`` for N(0, σ²), which knows nothing of the data.

    Example:
        >>> import scoresde as ss
        >>> plan = ss.DDIM().plan(ss.VP(), ss.uniform_lam(ss.VP(), 100))
        >>> bool((exact_moments(plan, ss.VP(), spectrum=0.25).variance - 0.25).abs() < 0.03)
        True
    """
    check.choice("start", start, ("marginal", "prior"))
    m, c = torch.broadcast_tensors(*(torch.as_tensor(v, dtype=torch.float64).reshape(-1) for v in (mean, spectrum)))
    if bool((c < 0).any()):
        raise ValueError(f"`spectrum` must hold variances of at least 0, got {float(c.min()):g}.")
    states: list[Tensor | None] = [None] * len(plan.rows)
    said: list[Tensor | None] = [None] * len(plan.rows)
    width = 2 + plan.draws  # the constant, the start's normal, and those of the plan
    last_x, last_d = plan._last_use
    dead: list[list[tuple[list[Tensor | None], int]]] = [[] for _ in range(len(plan.rows) + 1)]
    for k in range(len(plan.rows)):
        dead[last_x[k]].append((states, k))
        dead[last_d[k]].append((said, k))
    path = []
    state = m.new_zeros(len(m), width)
    for r, row in enumerate(plan.rows):
        if isinstance(row.t, Tensor) and row.t.ndim:
            raise ValueError("`plan` has a number for each sample; make one of each sample's own grid for this.")
        t = float(row.t)
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        if r == 0:
            state[:, 0] = alpha * m if start == "marginal" else 0.0
            state[:, 1] = (alpha**2 * c + sigma**2).sqrt() if start == "marginal" else sigma
        else:
            state = m.new_zeros(len(m), width)
            for store, terms in ((states, row.x), (said, row.d)):
                for k, w in terms:
                    earlier = store[k]
                    assert earlier is not None
                    state = state + w * earlier
            if row.z:
                at = torch.tensor([2 + k for k, _ in row.z])
                by = torch.stack([torch.as_tensor(w, dtype=torch.float64) for _, w in row.z])
                state = state.index_add(1, at, by.expand(len(m), -1))
            if isinstance(row.one, Tensor) or row.one:
                state = state + row.one * torch.eye(1, width, dtype=torch.float64)
        states[r] = state
        if row.evaluates:
            gain = alpha * c / (alpha**2 * c + sigma**2)
            said[r] = gain[:, None] * state
            said[r][:, 0] += m - gain * alpha * m  # type: ignore[index]
        if row.node is not None or r == len(plan.rows) - 1:
            path.append((-1 if row.node is None else row.node, t, state[:, 0], state[:, 1:].square().sum(1)))
        for store, k in dead[r]:
            store[k] = None
    _, t, average, variance = path[-1]
    return ExactMoments(average, variance, state[:, 1], t, tuple(path))


def weak_order(
    solver: Solver,
    sde: SDE,
    *,
    mean: Sequence[float] = (0.4, -0.7, 0.2, 1.0, -0.3),
    spectrum: Sequence[float] = (0.09, 0.36, 1.0, 2.89, 9.0),
    legs: Sequence[int] = (80, 160),
    t_start: float | None = None,
    t_end: float | None = None,
    grid: Callable[..., Tensor] | None = None,
    of: str = "law",
    eta: float = 1.0,
) -> Order:
    r"""Measure the weak order of a rule on Gaussian data, from exact moments: no samples, milliseconds.

    The error in a direction is the 2-Wasserstein distance of two Gaussians,

    .. math:: W_2^2 = (\mu - \mu^*)^2 + (s - s^*)^2.

    Arguments:
        solver: The rule.
        sde: The process.
        mean: Means of the data.
        spectrum: Its variances.
        legs: Numbers of legs.
        t_start: Where to start, from the exact marginal; by default where λ = −2.5.
        t_end: Where to end, by default where λ = 2.
        grid: A grid maker, by default a mildly uneven one.
        of: ``"law"``, or ``"drift"``: the mean of the result given its start, whose order is the declared one.
        eta: Of the rule, for its drift.
    """
    check.choice("of", of, ("law", "drift"))
    first = sde.t_of_lam(-2.5) if t_start is None else t_start
    last = sde.t_of_lam(2.0) if t_end is None else t_end
    m, c = (torch.tensor(v, dtype=torch.float64) for v in (mean, spectrum))
    alpha = sde.alpha(last)
    before, after = (sde.alpha(t) ** 2 * c + sde.sigma(t) ** 2 for t in (first, last))
    # the reverse SDE shrinks deviations as the flow does, and η² times by the part of it that is not f
    kept = before.sqrt() * (after / before) ** ((1 + eta**2) / 2) * (sde.alpha(first) / alpha) ** (eta**2)
    errors = []
    for N in legs:
        plan = solver.plan(sde, (grid or _uneven)(sde, N, t_start=first, t_end=last))
        found = exact_moments(plan, sde, mean=m, spectrum=c)
        if of == "drift":
            gap = (found.of_start - kept).square()
        else:
            gap = (found.mean - alpha * m).square() + (found.variance.sqrt() - after.sqrt()).square()
        errors.append(float(gap.mean().sqrt()))
    declared = solver.declared_order if of == "drift" else solver.weak_order
    return Order(_slope(legs, errors), declared, tuple(legs), tuple(errors))


def order_residuals(plan: Plan, sde: SDE, degree: int = 3) -> Tensor:
    r"""Residuals of the order conditions: what each leg leaves of D = (λ − λ_s)ⁿ/n!, for n = 0 … degree.

    A leg that starts from exact states is run on a data prediction that is a polynomial of λ; its error is divided by
    :math:`\alpha_t h^{n+1}`. A rule of order p has residuals for n < p that are 0, if it interpolates data in λ, or
    vanish with h.

    Arguments:
        plan: A deterministic table whose legs are solved.
        sde: The process it was written for.
        degree: Largest n.

    Returns:
        (legs, degree + 1), NaN where σ vanishes at an end.
    """
    if plan.stochastic:
        raise ValueError("`plan` draws noise; order conditions are for deterministic plans.")
    node, weight = legendre()
    times = torch.tensor([float(row.t) for row in plan.rows], dtype=torch.float64)
    lam = sde.lam(times)
    out: list[list[float]] = []
    nodes = [r for r, row in enumerate(plan.rows) if row.node is not None]
    for s, t in pairwise(nodes):
        h = lam[t] - lam[s]
        residuals = []
        for n in range(degree + 1):

            def d(at: Tensor, n: int = n, origin: Tensor = lam[s]) -> Tensor:
                return (at - origin) ** n / math.factorial(n)

            def exact(r: int, d: Callable[[Tensor], Tensor] = d, s: int = s) -> float:
                # x_s = 0: x_r = α_r ∫ e^{−(λ_r − λ)} d(λ) dλ from λ_s
                gap = lam[r] - lam[s]
                inner = (-(1 - node) * gap).exp() * d(lam[s] + node * gap)
                return float(sde.alpha(float(times[r])) * gap * (inner @ weight))

            states = {r: exact(r) for r in nodes if r <= s}
            for r in range(1, t + 1):
                if r not in states:
                    row = plan.rows[r]
                    terms = [float(w) * states[k] for k, w in row.x]
                    terms += [float(w) * float(d(lam[k])) for k, w in row.d]
                    states[r] = sum(terms) + float(row.one)
            size = sde.alpha(float(times[t])) * float(h) ** (n + 1)
            residuals.append((states[t] - exact(t)) / size if math.isfinite(size) and size else math.nan)
        out.append(residuals)
    return torch.tensor(out, dtype=torch.float64)


@dataclass(frozen=True)
class Work:
    """Error of one rule on one grid at one budget.

    Arguments:
        solver: Name of the rule.
        grid: Name of the grid maker.
        nfe: Evaluations spent.
        median: Median error over the start points.
        rmse: Root of the mean squared error.
    """

    solver: str
    grid: str
    nfe: int
    median: float
    rmse: float


def work_precision(
    solvers: Sequence[Solver],
    model: AbstractDenoiser,
    grids: Sequence[Callable[..., Tensor]] = (karras,),
    nfes: Sequence[int] = (5, 6, 8, 10, 12, 15, 20, 30, 50),
    *,
    x: Tensor | None = None,
    truth: Tensor | None = None,
    n: int = 256,
    seed: int = 0,
    **window: Any,
) -> list[Work]:
    """Error against evaluations, for rules × grids × budgets, on a model whose flow is known.

    Arguments:
        solvers: The rules.
        model: A denoiser.
        grids: Grid makers.
        nfes: Budgets.
        x: Start points at ``t_start``, by default `n` from the prior.
        truth: Where they end, by default by :func:`exact_flow`.
        n: Start points.
        seed: Of the start points.
        **window: ``t_start``, ``t_end`` and ``t_min`` of the grids.
    """
    sde = model.sde
    check.integer("n", n, least=1)
    start = window.get("t_start") or sde.T
    if x is None:
        x = sde.prior(start).sample((n, *getattr(model, "event", (1,))), Noise(seed), dtype=torch.float64)
    if truth is None:
        last = window.get("t_end", 0.0)
        near = last if sde.sigma(last) > 0 else sde.t_of_lam(min(sde.lam(sde.t_min) + 3.0, sde.lam(1e-6 * sde.T)))
        truth = exact_flow(model)(x, start, near)
        if last != near:
            truth = model.x0(truth, near)
    rows = []
    for solver in solvers:
        for maker in grids:
            for nfe in nfes:
                rule, legs = solver.for_nfe(nfe, clean=sde.sigma(window.get("t_end", 0.0)) == 0)
                plan = rule.plan(sde, maker(sde, legs, **window))
                if plan.nfe > nfe:
                    continue
                with torch.no_grad():
                    gap = (run(plan, model.x0, x) - truth).flatten(1).norm(dim=1)
                rmse = float(gap.square().mean().sqrt())
                rows.append(
                    Work(repr(solver), getattr(maker, "__name__", repr(maker)), plan.nfe, float(gap.median()), rmse)
                )
    return rows
