r"""Solvers that discretise the reverse SDE directly, without exponential weights, and ER-SDE.

.. math:: dx = \left[f x - \tfrac{1+\eta^2}{2}\,g^2\,\nabla\log p_t(x)\right]dt + \eta\,g\,d\bar w, \qquad
          \nabla\log p_t(x) = \frac{\alpha\,d - x}{\sigma^2}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._numerics import legendre
from scoresde.noise.brownian import Span
from scoresde.plan.rows import Weight
from scoresde.processes.sde import SDE
from scoresde.solvers.quadrature import Point, noisy
from scoresde.solvers.rule import Eta, Solver, check_eta, eta_at, varies
from scoresde.solvers.tape import Leg, Tape


@checked
@dataclass(frozen=True, repr=False)
class ReverseSDE(Solver):
    """Euler–Maruyama, or Heun with the same noise in both stages, on the reverse SDE in t or in λ.

    A step into σ = 0 returns the denoised state without noise. A step from α = 0 is an exponential step.

    Arguments:
        eta: Stochasticity: 1 for the reverse SDE, any other number, or a function of the time at the end of a step.
        clock: Time variable: ``"t"`` or ``"lam"``.
        heun: Whether to use Heun's second stage.

    References:
        | Numerical Solution of Stochastic Differential Equations (Kloeden and Platen, 1992)
    """

    eta: Eta = 1.0
    clock: str = "t"
    heun: bool = False

    def __post_init__(self) -> None:
        check_eta("eta", self.eta)
        check.choice("clock", self.clock, ("t", "lam"))

    @property
    def order(self) -> int:
        """2 with Heun's second stage, else 1."""
        return 2 if self.heun else 1

    @property
    def stages(self) -> int:
        return 2 if self.heun else 1

    @property
    def memoryless(self) -> bool:
        return not varies(self.eta)

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        eta, first, evaluates, node = eta_at(self.eta, leg.t, tape.sde), leg.history[0], leg.evaluates, leg.node
        if tape.no_noise(leg.t) or tape.no_signal(tape.time(leg.row)):
            new = tape.move(leg.row, leg.t, [first], eta=eta, evaluates=evaluates, node=node, note="one stage")
            return new, [new]
        s, t = tape.ends(leg)
        h = t.t - s.t if self.clock == "t" else t.lam - s.lam
        p, q, rate = self._slope(tape.sde, s, h, eta)
        pp, qq, last_rate = self._slope(tape.sde, t, h, eta) if self.heun else (p, q, rate)
        start, end = (tape.number((v.t if self.clock == "t" else v.lam).detach()) for v in (s, t))
        span = Span(start, end, self.clock)
        z = [(tape.draw(span), eta * ((rate + last_rate) / 2).sqrt())] if noisy(eta) else []
        if not self.heun:
            new = tape.append(leg.t, x=[(leg.row, 1 + p)], d=[(first, q)], z=z, evaluates=evaluates, node=node)
            return new, [new]
        stage = tape.append(leg.t, x=[(leg.row, 1 + p)], d=[(first, q)], z=z, note="stage")
        x, d = [(leg.row, 1 + p / 2), (stage, pp / 2)], [(first, q / 2), (stage, qq / 2)]
        new = tape.append(leg.t, x=x, d=d, z=z, evaluates=evaluates, node=node)
        return new, [new]

    def _slope(self, sde: SDE, at: Point, h: Tensor, eta: Weight) -> tuple[Tensor, Tensor, Tensor]:
        """Step size times the drift's weights of x and d at a time, and times the squared diffusion."""
        g2 = sde.g2(at.t)
        fall = g2 / (2 * at.sigma**2)  # −dλ/dt
        dt = h if self.clock == "t" else -h / fall
        pull = (1 + eta**2) * fall
        return dt * (sde.f(at.t) + pull), -dt * pull * at.alpha, -dt * g2


@checked
@dataclass(frozen=True, repr=False)
class SongPredictor(Solver):
    """Song's reverse-diffusion predictor; a step into σ = 0 returns the denoised state.

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          arXiv:2011.13456
    """

    order: ClassVar[int] = 1
    memoryless: ClassVar[bool] = True

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        first, evaluates, node = leg.history[0], leg.evaluates, leg.node
        if tape.no_noise(leg.t) or tape.no_signal(tape.time(leg.row)):
            new = tape.move(leg.row, leg.t, [first], eta=1.0, evaluates=evaluates, node=node, note="one stage")
            return new, [new]
        s, t = tape.ends(leg)
        fresh = -torch.expm1(2 * (s.lam - t.lam))  # G²/σ_s²
        x = [(leg.row, 2 - s.alpha / t.alpha - fresh)]
        z = [(tape.draw(tape.span(tape.time(leg.row), leg.t, -1.0)), s.sigma * fresh.sqrt())]
        new = tape.append(leg.t, x=x, d=[(first, fresh * s.alpha)], z=z, evaluates=evaluates, node=node)
        return new, [new]


@checked
@dataclass(frozen=True, repr=False)
class ExtendedReverse(Solver):
    r"""ER-SDE: a noise scale φ(ρ) with ρ = σ/α defines the transfer of x, and D is interpolated in ρ.

    .. math:: \frac{x_t}{\alpha_t} = \frac{\phi_t}{\phi_s}\frac{x_s}{\alpha_s}
              + \phi_t\int_{\varrho_s}^{\varrho_t} D\,d\!\left(\frac1\phi\right)
              + \sqrt{\varrho_t^2 - \left(\tfrac{\phi_t}{\phi_s}\varrho_s\right)^2}\;z

    φ = ρ is the flow and φ = ρ² the reverse SDE. η² of a step is the mean of :math:`d\log\phi/d\log\varrho - 1`.

    Arguments:
        nodes: Number of nodes, 1 to 3.
        phi: Function φ(ρ) of tensors; φ(ρ)/ρ must not decrease.
        published: Whether order 3 takes the slope half a step too early, as published; its order is then 2.

    References:
        | ER-SDE-Solver (Cui et al., 2023), arXiv:2309.06169
    """

    nodes: int
    phi: Callable[[Tensor], Tensor]
    published: bool = False

    def __post_init__(self) -> None:
        if check.integer("nodes", self.nodes, at_least=1) > 3:
            raise ValueError(f"`nodes` must be 1, 2 or 3, got {self.nodes}.")

    @property
    def order(self) -> int:
        """Number of nodes, or 2 for the published form of order 3."""
        return 2 if self.published and self.nodes == 3 else self.nodes

    @property
    def weak_order(self) -> int:
        """With noise at most 2, because each step uses one Gaussian increment; φ/ρ is constant without noise."""
        rho = torch.logspace(-3, 3, 25, dtype=torch.float64)
        ratio = self.phi(rho) / rho
        return self.order if torch.allclose(ratio, ratio[0], rtol=1e-9, atol=0.0) else min(self.order, 2)

    @property
    def memoryless(self) -> bool:
        return self.nodes == 1

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        evaluates, node = leg.evaluates, leg.node
        if tape.no_noise(leg.t) or tape.no_signal(tape.time(leg.row)):
            new = tape.move(leg.row, leg.t, leg.history[:1], eta=1.0, evaluates=evaluates, node=node, note="one stage")
        else:
            s, t = tape.ends(leg)
            nodes = [k for k in tape.distinct(leg.history)[: self.nodes] if not tape.no_signal(tape.time(k))]
            of_x, std, *of_d = self._weights(s, t, [(-tape.at(tape.time(k)).lam).exp() for k in nodes])
            z = [(tape.draw(self._span(tape, s, t)), std)] if not tape.plain or bool(std > 0) else []
            d = list(zip(nodes, of_d, strict=True))
            new = tape.append(leg.t, x=[(leg.row, of_x)], d=d, z=z, evaluates=evaluates, node=node)
        return new, ([new, *leg.history][: self.nodes] if evaluates else leg.history)

    def _span(self, tape: Tape, s: Point, t: Point) -> Span:
        """Span of a step's noise on the Brownian path in the clock (ρ/φ)²."""
        rho = [(-at.lam).exp() for at in (s, t)]
        start, end = (tape.number(((r / self.phi(r)) ** 2).detach()) for r in rho)
        return Span(start, end, f"(rho/{getattr(self.phi, '__name__', type(self.phi).__name__)})**2")

    def _weights(self, s: Point, t: Point, rho: list[Tensor]) -> tuple[Tensor, ...]:
        """Return the weight of x, the standard deviation of the noise, and the weights of nodes at given ρ."""
        hi, lo = (-s.lam).exp(), (-t.lam).exp()
        ratio = self.phi(lo) / self.phi(hi)
        slow = self.phi(lo) / lo / (self.phi(hi) / hi)  # exactly 1 for the flow
        std = lo * (1 - slow**2).clamp(min=0.0).sqrt()
        node, weight = legendre()
        u = lo[..., None] + (hi - lo)[..., None] * node
        kernel = self.phi(lo)[..., None] / self.phi(u)
        whole = kernel @ weight * (hi - lo)
        early = (kernel * (u - hi[..., None])) @ weight * (hi - lo)
        # integrals of the kernel times 1, ρ − ρ_s and (ρ − ρ_s)²
        moments = [1 - ratio, lo - hi + whole, (lo - hi) ** 2 + 2 * early]
        of_d = [moments[0], *(torch.zeros_like(ratio) for _ in rho[1:])]
        if len(rho) > 1:
            a = 1 / (rho[0] - rho[1])
            of_d[0], of_d[1] = of_d[0] + moments[1] * a, of_d[1] - moments[1] * a
        if len(rho) > 2:
            b, c = 1 / (rho[1] - rho[2]), 1 / (rho[0] - rho[2])
            second = moments[2] if self.published else moments[2] + (rho[0] - rho[1]) * moments[1]
            for j, difference in enumerate((a * c, -(a + b) * c, b * c)):
                of_d[j] = of_d[j] + second * difference
        return t.alpha / s.alpha * ratio, t.alpha * std, *(t.alpha * w for w in of_d)
