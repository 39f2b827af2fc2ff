r"""Solvers with fresh noise: each step solves past its end time, then returns to it by the exact forward transition.

Both parts of such a step preserve the marginals, so any amount of noise leaves the accuracy unchanged. With one
evaluation the two parts are one row; with h = λ_t − λ_s

.. math:: x_t = \sigma_t\sqrt{\ell}\,\frac{x_s}{\sigma_s} + \alpha_t\left(1 - e^{-h}\sqrt{\ell}\right) d_s
          + \eta\,\sigma_t\sqrt{1 - e^{-2h}}\,z, \qquad \ell = 1 - \eta^2\left(1 - e^{-2h}\right).

This is DDIM(η); with η = 1 it is the posterior of DDPM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde import grids
from scoresde._doors import checked
from scoresde.grids.grid import times_of_lam
from scoresde.noise.brownian import Span
from scoresde.plan.rows import Weight
from scoresde.plan.table import Plan
from scoresde.processes.sde import SDE
from scoresde.solvers.multistep import Multistep
from scoresde.solvers.naming import show
from scoresde.solvers.quadrature import Point, noisy
from scoresde.solvers.rule import Eta, Solver, check_eta, eta_at, varies
from scoresde.solvers.tape import Leg, Tape


def posterior_step(s: Point, t: Point, eta: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of x_s, d_s and z in the equation above; a negative ℓ is set to 0, a step down to data."""
    h = t.lam - s.lam
    fresh = eta**2 * -torch.expm1(-2 * h)
    log_left = torch.log1p(-fresh.clamp(max=1.0))
    of_x = t.sigma / s.sigma * (log_left / 2).exp()
    of_d = -t.alpha * torch.expm1(log_left / 2 - h)
    return of_x, of_d, t.sigma * fresh.clamp(max=1.0).sqrt()


@checked
@dataclass(frozen=True, repr=False)
class Posterior(Solver):
    r"""DDIM(η), and DDPM with a choice of variance: one evaluation and one Gaussian increment per step.

    The mean is that of the equation above. ``"large"`` uses the variance of the forward step, :math:`\sigma_s^2(1 -
    e^{-2h})`. ``"optimal"`` adds the mean variance of x₀ given x_s times the squared weight of d_s:

    .. math:: \alpha_t^2\left(1 - e^{-h}\sqrt\ell\right)^2 \frac{\sigma_s^2}{\alpha_s^2}
              \left(1 - \sigma_s^2\,\tfrac1D E|\nabla\log p_s|^2\right).

    Arguments:
        eta: Standard deviation of the noise in units of the posterior's: a number or a function of time.
        variance: Variance of the noise: ``"small"`` (given by η), ``"large"`` or ``"optimal"``.
        score_square: E|∇log p|²/D for ``"optimal"``: a function of time, or one number per step.
        s_noise: Factor on the noise.

    References:
        | Denoising Diffusion Probabilistic Models (Ho et al., 2020), arXiv:2006.11239
        | Denoising Diffusion Implicit Models (Song et al., 2021), arXiv:2010.02502
    """

    eta: Eta = 1.0
    variance: str = "small"
    score_square: Callable[[Tensor], float | Tensor] | tuple[float, ...] | None = None
    s_noise: float = 1.0

    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_eta("eta", self.eta)
        check.number("s_noise", self.s_noise, at_least=0)
        check.choice("variance", self.variance, ("small", "large", "optimal"))
        if self.variance == "large" and self.eta != 1:
            raise ValueError(f"`variance`='large' requires `eta` = 1, got {show(self.eta)}; change one of the two.")
        if (self.variance == "optimal") != (self.score_square is not None):
            raise ValueError("`score_square`, E|score|²/D, must be given for `variance`='optimal', and only for it.")

    @property
    def memoryless(self) -> bool:
        return not varies(self.eta) and self.score_square is None

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        eta, evaluates, node = eta_at(self.eta, leg.t, tape.sde), leg.evaluates, leg.node
        if tape.no_noise(leg.t) or (self.variance == "small" and not noisy(eta)):
            new = tape.move(leg.row, leg.t, leg.history[:1], evaluates=evaluates, node=node)
            return new, [new]
        s, t = tape.ends(leg)
        of_x, of_d, std = posterior_step(s, t, eta)
        if self.variance == "large":
            std = s.sigma * (-torch.expm1(2 * (s.lam - t.lam))).sqrt()
        if self.score_square is not None:
            variance = (s.sigma / s.alpha) ** 2 * (1 - s.sigma**2 * self._score_square_at(s.t, node))
            std = (std**2 + of_d**2 * variance.clamp(min=0.0)).sqrt()
        z = [(tape.draw(_span(tape, tape.time(leg.row), leg.t, self.eta)), self.s_noise * std)]
        d = [(leg.history[0], of_d)]
        new = tape.append(leg.t, x=[(leg.row, of_x)], d=d, z=z, evaluates=evaluates, node=node)
        return new, [new]

    def _score_square_at(self, s: Tensor, node: int | None) -> float | Tensor:
        """E|∇log p|²/D at the start of the step to a node."""
        given = self.score_square
        if callable(given):
            return given(s)
        assert given is not None and node is not None
        if node > len(given):
            raise ValueError(f"`score_square` must have one number per step, got {len(given)} for step {node}.")
        return given[node - 1]


@checked
@dataclass(frozen=True, repr=False)
class Ancestral(Solver):
    """Ancestral version of any solver: each step solves past its end and adds noise; see :func:`zigzags.ancestral`.

    Arguments:
        solver: Solver of the downward part.
        eta: Stochasticity, a number or a function of time: 0 for no fresh noise, 1 for as much as in DDPM.
        s_noise: Factor on the noise.
    """

    solver: Solver = Multistep(1)  # noqa: RUF009
    eta: Eta = 1.0
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        check_eta("eta", self.eta)
        check.number("s_noise", self.s_noise, at_least=0)

    @property
    def order(self) -> int:
        """Order of the inner solver."""
        return self.solver.order

    @property
    def weak_order(self) -> int:
        """Order of the solver; at most 1 if the solver uses evaluations from before the noise."""
        return min(self.order, 1) if _uses_history(self.solver) else self.order

    @property
    def stages(self) -> int:
        return self.solver.stages

    @property
    def memoryless(self) -> bool:
        return not varies(self.eta) and self.solver.memoryless

    @checked
    def for_nfe(self, nfe: int, *, clean: bool = True) -> tuple[Solver, int]:
        solver, steps = self.solver.for_nfe(nfe, clean=clean)
        return replace(self, solver=solver), steps

    @checked
    def plan(self, sde: SDE, times: Tensor | Sequence[float], *, up: str = "diffuse") -> Plan:
        if self.eta == 0:
            return replace(self.solver.plan(sde, times, up=up), name=self.name)
        return super().plan(sde, times, up=up)

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        eta = eta_at(self.eta, leg.t, tape.sde)
        if tape.no_noise(leg.t) or not noisy(eta):
            return self.solver.leg(tape, leg)
        s, t = tape.ends(leg)
        fresh = eta**2 * -torch.expm1(2 * (s.lam - t.lam))
        lam = t.lam - torch.log1p(-fresh.clamp(max=1.0)) / 2
        down = tape.number(torch.minimum(times_of_lam(tape.sde, lam), t.t))
        below, history = self.solver.leg(tape, replace(leg, t=down, evaluates=False))
        span = _span(tape, tape.time(leg.row), leg.t, self.eta)
        new = tape.diffuse(below, leg.t, evaluates=leg.evaluates, node=leg.node, factor=self.s_noise, span=span)
        return new, self.solver.after_noise(tape, new, history) if leg.evaluates else history


@checked
@dataclass(frozen=True, repr=False)
class Churn(Solver):
    r"""Any solver with churn: noise multiplies ρ = σ/α of each state but the first by 1 + γ before its evaluation.

    .. math:: \gamma = \min(s_{churn}/N, \sqrt2 - 1) \quad\text{where}\quad s_{tmin} \le \varrho \le s_{tmax}

    The nodes of the plan are the raised times, which are at most T.

    Arguments:
        solver: Solver of the steps.
        s_churn: Amount of fresh noise over the whole grid of N steps.
        s_tmin: Lowest ρ at which noise is added.
        s_tmax: Highest ρ at which noise is added.
        s_noise: Factor on the noise.
        steps: Number of steps N, by default that of the grid.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv:2206.00364,
          algorithm 2
    """

    solver: Solver
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0
    steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("s_churn", "s_tmin", "s_noise"):
            check.number(name, getattr(self, name), at_least=0)
        if self.steps is not None:
            check.integer("steps", self.steps, at_least=1)
        if not self.s_tmax >= self.s_tmin:
            raise ValueError(f"`s_tmax` must be at least `s_tmin` = {self.s_tmin:g}, got {self.s_tmax}.")

    @property
    def order(self) -> int:
        """Order of the inner solver."""
        return self.solver.order

    @property
    def weak_order(self) -> int:
        """Order of the solver; at most 1 if the solver uses evaluations from before the noise."""
        return min(self.order, 1) if _uses_history(self.solver) and self.s_churn else self.order

    @property
    def stages(self) -> int:
        return self.solver.stages

    @checked
    def for_nfe(self, nfe: int, *, clean: bool = True) -> tuple[Solver, int]:
        solver, steps = self.solver.for_nfe(nfe, clean=clean)
        return replace(self, solver=solver), steps

    @checked
    def plan(self, sde: SDE, times: Tensor | Sequence[float], *, up: str = "diffuse") -> Plan:
        if self.s_churn == 0:
            return replace(self.solver.plan(sde, times, up=up), name=self.name)
        steps = len(times) - 1 if self.steps is None else self.steps
        plan = super(Churn, replace(self, steps=steps)).plan(sde, times, up=up)
        return replace(plan, name=self.name)

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        gamma = min(self.s_churn / (self.steps or 1), math.sqrt(2) - 1)
        raised = self._raised(tape, leg.t, gamma) if leg.evaluates and gamma > 0 else leg.t
        if raised is leg.t or (tape.plain and raised == leg.t):
            return self.solver.leg(tape, leg)
        below, history = self.solver.leg(tape, replace(leg, evaluates=False))
        new = tape.diffuse(below, raised, node=leg.node, factor=self.s_noise)
        return new, self.solver.after_noise(tape, new, history)

    def _raised(self, tape: Tape, t: Weight, gamma: float) -> Weight:
        """Time at which ρ is 1 + γ times that at t, or t where no noise is added."""
        at = tape.at(t)
        rho = (-at.lam).exp()
        higher = torch.maximum(times_of_lam(tape.sde, at.lam - math.log1p(gamma)), at.t)
        return tape.number(torch.where((rho >= self.s_tmin) & (rho <= self.s_tmax), higher, at.t))


@checked
@dataclass(frozen=True, repr=False)
class Restart(Solver):
    """Any solver with restarts: noise from time `low` up to `high`, then down again; see :func:`restart`.

    Arguments:
        solver: Solver of the downward steps.
        low: Time at which noise is added.
        high: Time to which the noise leads.
        repeats: Number of restarts.

    References:
        | Restart Sampling for Improving Generative Processes (Xu et al., 2023), arXiv:2306.14878, algorithm 1
    """

    solver: Solver
    low: float
    high: float
    repeats: int = 1

    def __post_init__(self) -> None:
        check.number("low", self.low, at_least=0)
        check.number("high", self.high, above=self.low)
        check.integer("repeats", self.repeats)

    @property
    def order(self) -> int:
        """Order of the inner solver."""
        return self.solver.order

    @property
    def stages(self) -> int:
        return self.solver.stages

    def for_nfe(self, nfe: int, *, clean: bool = True) -> tuple[Solver, int]:
        """Raise an error: the number of repeated steps depends on the grid."""
        raise ValueError(f"`nfe` = {nfe} cannot be used with {self!r}, which repeats steps of its grid; give `steps`.")

    @checked
    def plan(self, sde: SDE, times: Tensor | Sequence[float], *, up: str = "diffuse") -> Plan:
        """Build the plan for a decreasing grid; the steps between `high` and `low` are repeated."""
        plan = self.solver.plan(sde, grids.restart(sde, times, self.low, self.high, self.repeats), up=up)
        return replace(plan, name=self.name)


@checked
@dataclass(frozen=True, repr=False)
class Consistency(Solver):
    """Multistep consistency sampling: each step predicts the data and adds noise, x_t = α_t d_s + σ_t z.

    It has no order with a denoiser, and is exact with a consistency model.

    References:
        | Consistency Models (Song et al., 2023), arXiv:2303.01469, algorithm 1
    """

    order: ClassVar[int] = 0
    memoryless: ClassVar[bool] = True

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        t = tape.at(leg.t)
        z = [] if tape.no_noise(leg.t) else [(tape.draw(), t.sigma)]
        d = [(leg.history[0], t.alpha)]
        new = tape.append(leg.t, d=d, z=z, evaluates=leg.evaluates, node=leg.node)
        return new, [new]


@checked
@dataclass(frozen=True, repr=False)
class TwoStage(Solver):
    """DPM-Solver++ SDE: the stage and the end of each step get fresh noise from one Brownian path.

    Arguments:
        eta: Stochasticity, as in :class:`Posterior`.
        r: Fraction of the step in λ at which the stage is.
        s_noise: Factor on the noise.
        one_path: Whether both Gaussian increments are from one Brownian path in ρ = σ/α, as published; with
            independent ones the weak order is 1.

    References:
        | DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Models (Lu et al., 2022), arXiv:2211.01095
    """

    eta: Eta = 1.0
    r: float = 0.5
    s_noise: float = 1.0
    one_path: bool = True

    order: ClassVar[int] = 2
    stages: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_eta("eta", self.eta)
        check.number("r", self.r, above=0, below=1)
        check.number("s_noise", self.s_noise, at_least=0)

    @property
    def weak_order(self) -> int:
        """2 with one path or no noise; 1 with independent increments."""
        return 2 if self.one_path or self.eta == 0 else 1

    @property
    def memoryless(self) -> bool:
        return not varies(self.eta)

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        start, eta = tape.time(leg.row), eta_at(self.eta, leg.t, tape.sde)
        if not tape.finite(start, leg.t):
            return Posterior(self.eta, s_noise=self.s_noise).leg(tape, leg)
        mid = tape.between(start, leg.t, self.r)
        s, t = tape.ends(leg)
        of_x, of_d, std = posterior_step(s, tape.at(mid), eta)
        ends = ((start, mid), (mid, leg.t)) if noisy(eta) else ()
        draws = [tape.draw(tape.span(*interval, -0.5) if self.one_path else None) for interval in ends]
        z = [(k, self.s_noise * std) for k in draws[:1]]
        stage = tape.append(mid, x=[(leg.row, of_x)], d=[(leg.history[0], of_d)], z=z, note="stage")
        of_x, of_d, std = posterior_step(s, t, eta)
        z = [(k, self.s_noise * std * part) for k, part in zip(draws, self._parts(s, t), strict=False)]
        z = z if self.one_path else z[1:]
        later = of_d / (2 * self.r)
        d = [(leg.history[0], of_d - later), (stage, later)]
        new = tape.append(leg.t, x=[(leg.row, of_x)], d=d, z=z, evaluates=leg.evaluates, node=leg.node)
        return new, [new]

    def _parts(self, s: Point, t: Point) -> tuple[float | Tensor, float | Tensor]:
        """Weights of the two normals in the noise of a step; their squares are the shares of ρ_s − ρ_t."""
        if not self.one_path:
            return 0.0, 1.0
        h = t.lam - s.lam
        share = torch.expm1(-self.r * h) / torch.expm1(-h)
        return share.sqrt(), (1 - share).sqrt()


def _span(tape: Tape, s: Weight, t: Weight, eta: Eta) -> Span:
    """Span of a step's noise on the Brownian path: that of the reverse SDE with this η; exact for η = 1."""
    return tape.span(s, t, eta**2 if isinstance(eta, int | float) else 1.0)


def _uses_history(solver: Solver) -> bool:
    """Whether the order of a solver may depend on evaluations from earlier steps."""
    return isinstance(solver, Multistep) or solver.stages == 1
