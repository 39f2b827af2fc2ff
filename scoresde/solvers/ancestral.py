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
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde import grids
from scoresde.grids.grid import times_of_lam
from scoresde.noise.brownian import Span
from scoresde.plan.rows import Weight
from scoresde.plan.table import Plan
from scoresde.processes.sde import SDE
from scoresde.solvers.multistep import Multistep
from scoresde.solvers.rule import Eta, Solver, between, check_eta, ends_clean, eta_at, on_leg, said
from scoresde.solvers.single_step import finite_leg
from scoresde.solvers.tape import Tape


def posterior_step(sde: SDE, s: Tensor, t: Tensor, eta: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of x_s, d_s and z in the equation above; a negative ℓ is set to 0, a step down to data."""
    h = sde.lam(t) - sde.lam(s)
    fresh = eta**2 * -torch.expm1(-2 * h)
    log_left = torch.log1p(-fresh.clamp(max=1.0))
    keep = sde.sigma(t) / sde.sigma(s) * (log_left / 2).exp()
    gain = -sde.alpha(t) * torch.expm1(log_left / 2 - h)
    return keep, gain, sde.sigma(t) * fresh.clamp(max=1.0).sqrt()


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
        label: Name of the solver in its plans.
    """

    eta: Eta = 1.0
    variance: str = "small"
    score_square: Callable[[Any], Any] | tuple[float, ...] | None = None
    s_noise: float = 1.0
    label: str = ""

    def __post_init__(self) -> None:
        check_eta("eta", self.eta)
        check.number("s_noise", self.s_noise, at_least=0)
        check.choice("variance", self.variance, ("small", "large", "optimal"))
        if self.variance == "large" and self.eta != 1:
            raise ValueError(f"`variance`='large' requires `eta` = 1, got {said(self.eta)}; change one of the two.")
        if (self.variance == "optimal") != (self.score_square is not None):
            raise ValueError("`score_square`, E|score|²/D, must be given for `variance`='optimal', and only for it.")

    def __repr__(self) -> str:
        return _format(self, "Posterior", eta=0.0 if self.label == "DDIM" else 1.0, variance="small", s_noise=1.0)

    @property
    def declared_order(self) -> int:
        return 1

    @property
    def _forgets(self) -> bool:
        return not callable(self.eta) and self.score_square is None

    def _leg(self, tape: Tape, now: int, history: list[int], t: Weight, asks: bool, node: int) -> tuple[int, list[int]]:
        s, eta = tape.time(now), eta_at(self.eta, t)
        if ends_clean(tape.sde, t) or (self.variance == "small" and not isinstance(eta, Tensor) and eta == 0):
            new = tape.move(now, t, history[:1], evaluates=asks, node=node)
            return new, [new]
        keep, gain, std = on_leg(s, t, lambda a, b: self._weights(tape.sde, a, b, eta, node))
        z = [(tape.draw(_noise_span(tape, s, t, self.eta)), self.s_noise * std)]
        new = tape.append(t, x=[(now, keep)], d=[(history[0], gain)], z=z, evaluates=asks, node=node)
        return new, [new]

    def _weights(self, sde: SDE, s: Tensor, t: Tensor, eta: Weight, node: int) -> tuple[Tensor, Tensor, Tensor]:
        keep, gain, std = posterior_step(sde, s, t, eta)
        if self.variance == "large":
            std = sde.sigma(s) * (-torch.expm1(2 * (sde.lam(s) - sde.lam(t)))).sqrt()
        if self.score_square is not None:
            given = self.score_square
            if not callable(given) and node > len(given):
                raise ValueError(f"`score_square` must have one number per step, got {len(given)} for step {node}.")
            square = given(s) if callable(given) else given[node - 1]
            rest = (sde.sigma(s) / sde.alpha(s)) ** 2 * (1 - sde.sigma(s) ** 2 * square)
            std = (std**2 + gain**2 * rest.clamp(min=0.0)).sqrt()
        return keep, gain, std


@dataclass(frozen=True, repr=False)
class Ancestral(Solver):
    """Ancestral version of any solver: each step solves past its end and adds noise; see :func:`zigzags.ancestral`.

    Arguments:
        rule: Solver of the downward part.
        eta: Stochasticity, a number or a function of time: 0 for no fresh noise, 1 for as much as in DDPM.
        s_noise: Factor on the noise.
        label: Name of the solver in its plans.
    """

    rule: Solver = Multistep(1)  # noqa: RUF009
    eta: Eta = 1.0
    s_noise: float = 1.0
    label: str = ""

    def __post_init__(self) -> None:
        check_eta("eta", self.eta)
        check.number("s_noise", self.s_noise, at_least=0)

    def __repr__(self) -> str:
        return _format(self, "Ancestral", eta=1.0, s_noise=1.0)

    @property
    def declared_order(self) -> int:
        return self.rule.declared_order

    @property
    def weak_order(self) -> int:
        """Order of the solver; at most 1 if the solver uses evaluations from before the noise."""
        return min(self.declared_order, 1) if _uses_history(self.rule) else self.declared_order

    @property
    def stages(self) -> int:
        return self.rule.stages

    def for_nfe(self, nfe: int, *, clean: bool = True) -> tuple[Solver, int]:
        rule, legs = self.rule.for_nfe(nfe, clean=clean)
        return replace(self, rule=rule), legs

    def plan(self, sde: SDE, times: Tensor | Sequence[float], *, up: str = "diffuse") -> Plan:
        if self.eta == 0:
            return replace(self.rule.plan(sde, times, up=up), name=self.name)
        return super().plan(sde, times, up=up)

    @property
    def _forgets(self) -> bool:
        return not callable(self.eta) and self.rule._forgets

    def _leg(self, tape: Tape, now: int, history: list[int], t: Weight, asks: bool, node: int) -> tuple[int, list[int]]:
        eta, sde = eta_at(self.eta, t), tape.sde
        if ends_clean(sde, t) or (not isinstance(eta, Tensor) and eta == 0):
            return self.rule._leg(tape, now, history, t, asks, node)

        def lowest_time(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            fresh = eta**2 * -torch.expm1(2 * (sde.lam(a) - sde.lam(b)))
            down = sde.lam(b) - torch.log1p(-fresh.clamp(max=1.0)) / 2
            return (torch.minimum(times_of_lam(sde, down), b),)

        (down,) = on_leg(tape.time(now), t, lowest_time)
        below, history = self.rule._leg(tape, now, history, down, False, node)
        span = _noise_span(tape, tape.time(now), t, self.eta)
        new = tape.diffuse(below, t, evaluates=asks, node=node, factor=self.s_noise, span=span)
        return new, self.rule._after_noise(tape, new, history) if asks else history


@dataclass(frozen=True, repr=False)
class Churn(Solver):
    r"""Any solver with churn: noise multiplies ρ = σ/α of each state but the first by 1 + γ before its evaluation.

    .. math:: \gamma = \min(s_{churn}/N, \sqrt2 - 1) \quad\text{where}\quad s_{tmin} \le \varrho \le s_{tmax}

    The nodes of the plan are the raised times, which are at most T.

    Arguments:
        rule: Solver of the steps.
        s_churn: Amount of fresh noise over the whole grid of N steps.
        s_tmin: Lowest ρ at which noise is added.
        s_tmax: Highest ρ at which noise is added.
        s_noise: Factor on the noise.
        legs: Number of steps N, by default that of the grid.
        label: Name of the solver in its plans.
    """

    rule: Solver
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0
    legs: int | None = None
    label: str = ""

    def __post_init__(self) -> None:
        for name in ("s_churn", "s_tmin", "s_noise"):
            check.number(name, getattr(self, name), at_least=0)
        if not self.s_tmax >= self.s_tmin:
            raise ValueError(f"`s_tmax` must be at least `s_tmin` = {self.s_tmin:g}, got {self.s_tmax}.")

    def __repr__(self) -> str:
        return _format(self, "Churn", s_churn=None, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0)

    @property
    def declared_order(self) -> int:
        return self.rule.declared_order

    @property
    def weak_order(self) -> int:
        """Order of the solver; at most 1 if the solver uses evaluations from before the noise."""
        return min(self.declared_order, 1) if _uses_history(self.rule) and self.s_churn else self.declared_order

    @property
    def stages(self) -> int:
        return self.rule.stages

    def for_nfe(self, nfe: int, *, clean: bool = True) -> tuple[Solver, int]:
        rule, legs = self.rule.for_nfe(nfe, clean=clean)
        return replace(self, rule=rule), legs

    def plan(self, sde: SDE, times: Tensor | Sequence[float], *, up: str = "diffuse") -> Plan:
        if self.s_churn == 0:
            return replace(self.rule.plan(sde, times, up=up), name=self.name)
        legs = len(times) - 1 if self.legs is None else self.legs
        return super(Churn, replace(self, legs=legs)).plan(sde, times, up=up)

    def _leg(self, tape: Tape, now: int, history: list[int], t: Weight, asks: bool, node: int) -> tuple[int, list[int]]:
        sde, legs = tape.sde, self.legs or 1
        gamma = min(self.s_churn / legs, math.sqrt(2) - 1)

        def raised_time(_: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            lam = sde.lam(b)
            inside = ((-lam).exp() >= self.s_tmin) & ((-lam).exp() <= self.s_tmax)
            return (torch.where(inside, torch.maximum(times_of_lam(sde, lam - math.log1p(gamma)), b), b),)

        (raised,) = on_leg(tape.time(now), t, raised_time) if asks and gamma > 0 else (t,)
        if raised is t or (not isinstance(t, Tensor) and raised == t):
            return self.rule._leg(tape, now, history, t, asks, node)
        below, history = self.rule._leg(tape, now, history, t, False, node)
        new = tape.diffuse(below, raised, node=node, factor=self.s_noise)
        return new, self.rule._after_noise(tape, new, history)


@dataclass(frozen=True, repr=False)
class Restart(Solver):
    """Any solver with restarts: noise from time `low` up to `high`, then down again; see :func:`restart`.

    Arguments:
        rule: Solver of the downward steps.
        low: Time at which noise is added.
        high: Time to which the noise leads.
        repeats: Number of restarts.

    References:
        | Restart Sampling for Improving Generative Processes (Xu et al., 2023), arXiv:2306.14878, algorithm 1
    """

    rule: Solver
    low: float
    high: float
    repeats: int = 1

    def __repr__(self) -> str:
        return f"Restart({self.rule!r}, low={self.low:g}, high={self.high:g}, repeats={self.repeats})"

    @property
    def declared_order(self) -> int:
        return self.rule.declared_order

    @property
    def stages(self) -> int:
        return self.rule.stages

    def for_nfe(self, nfe: int, *, clean: bool = True) -> tuple[Solver, int]:
        """Raise an error: the number of repeated steps depends on the grid."""
        raise ValueError(f"`nfe` = {nfe} cannot be used with {self!r}, which repeats steps of its grid; give `steps`.")

    def plan(self, sde: SDE, times: Tensor | Sequence[float], *, up: str = "diffuse") -> Plan:
        """Build the plan for a decreasing grid; the steps between `high` and `low` are repeated."""
        plan = self.rule.plan(sde, grids.restart(sde, times, self.low, self.high, self.repeats), up=up)
        return replace(plan, name=self.name)


@dataclass(frozen=True, repr=False)
class Consistency(Solver):
    """Multistep consistency sampling: each step predicts the data and adds noise, x_t = α_t d_s + σ_t z."""

    def __repr__(self) -> str:
        return "ConsistencySampling()"

    @property
    def declared_order(self) -> int:
        """0, because the solver has no order with a denoiser; it is exact with a consistency model."""
        return 0

    @property
    def _forgets(self) -> bool:
        return True

    def _leg(self, tape: Tape, now: int, history: list[int], t: Weight, asks: bool, node: int) -> tuple[int, list[int]]:
        alpha, sigma = on_leg(t, t, lambda _, b: (tape.sde.alpha(b), tape.sde.sigma(b)))
        z = [] if ends_clean(tape.sde, t) else [(tape.draw(), sigma)]
        new = tape.append(t, d=[(history[0], alpha)], z=z, evaluates=asks, node=node)
        return new, [new]


@dataclass(frozen=True, repr=False)
class TwoStage(Solver):
    """DPM-Solver++ SDE: the stage and the end of each step get fresh noise from one Brownian path.

    Arguments:
        eta: Stochasticity, as in :class:`Posterior`.
        r: Fraction of the step in λ at which the stage is.
        s_noise: Factor on the noise.
        one_path: Whether both Gaussian increments are from one Brownian path in ρ = σ/α, as published; with
            independent ones the weak order is 1.
    """

    eta: Eta = 1.0
    r: float = 0.5
    s_noise: float = 1.0
    one_path: bool = True

    def __post_init__(self) -> None:
        check_eta("eta", self.eta)
        check.number("r", self.r, above=0, below=1)
        check.number("s_noise", self.s_noise, at_least=0)

    def __repr__(self) -> str:
        return _format(self, "DPMPPSDE", eta=1.0, r=0.5, s_noise=1.0, one_path=True)

    @property
    def declared_order(self) -> int:
        return 2

    @property
    def weak_order(self) -> int:
        """2 with one path or no noise; 1 with independent increments."""
        return 2 if self.one_path or self.eta == 0 else 1

    @property
    def stages(self) -> int:
        return 2

    @property
    def _forgets(self) -> bool:
        return not callable(self.eta)

    def _leg(self, tape: Tape, now: int, history: list[int], t: Weight, asks: bool, node: int) -> tuple[int, list[int]]:
        s, eta, sde = tape.time(now), eta_at(self.eta, t), tape.sde
        if not finite_leg(sde, s, t):
            return Posterior(self.eta, s_noise=self.s_noise)._leg(tape, now, history, t, asks, node)
        mid = between(sde, s, t, self.r)
        first, second = (on_leg(s, end, lambda a, b: posterior_step(sde, a, b, eta)) for end in (mid, t))
        share = on_leg(s, t, lambda a, b: (_share(sde, a, b, self.r),))[0] if self.one_path else 0.0
        ends = ((s, mid), (mid, t)) if isinstance(eta, Tensor) or eta > 0 else ()
        draws = [tape.draw(tape.along(*leg, -0.5) if self.one_path else None) for leg in ends]
        z = [(k, self.s_noise * first[2]) for k in draws[:1]]
        stage = tape.append(mid, x=[(now, first[0])], d=[(history[0], first[1])], z=z, note="stage")
        parts = zip(draws, (share**0.5, (1 - share) ** 0.5), strict=False)
        z = [(k, self.s_noise * second[2] * part) for k, part in parts if isinstance(part, Tensor) or part > 0]
        later = second[1] / (2 * self.r)
        d = [(history[0], second[1] - later), (stage, later)]
        new = tape.append(t, x=[(now, second[0])], d=d, z=z, evaluates=asks, node=node)
        return new, [new]


def _noise_span(tape: Tape, s: Weight, t: Weight, eta: Eta) -> Span:
    """Span of a step's noise on the Brownian path: that of the reverse SDE with this η; exact for η = 1."""
    return tape.along(s, t, 1.0 if callable(eta) else eta**2)


def _share(sde: SDE, s: Tensor, t: Tensor, r: float) -> Tensor:
    """Fraction of a step in ρ that lies before its stage: (ρ_s − ρ_m)/(ρ_s − ρ_t)."""
    h = sde.lam(t) - sde.lam(s)
    return torch.expm1(-r * h) / torch.expm1(-h)


def _uses_history(solver: Solver) -> bool:
    """Whether the order of a solver may depend on evaluations from earlier steps."""
    return isinstance(solver, Multistep) or solver.stages == 1


def _format(solver: Any, name: str, **defaults: Any) -> str:
    """Format a solver as a call, with the arguments that differ from their defaults."""
    values = {key: getattr(solver, key) for key in defaults}
    changed = [(key, v) for key, v in values.items() if callable(v) or v != defaults[key]]
    label = getattr(solver, "label", "")
    parts = [] if label or not hasattr(solver, "rule") else [repr(solver.rule)]
    parts += [f"{key}={said(v)}" for key, v in changed]
    return f"{label or name}({', '.join(parts)})"
