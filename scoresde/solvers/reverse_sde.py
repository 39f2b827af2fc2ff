r"""Solvers that discretise the reverse SDE directly, without exponential weights, and ER-SDE.

.. math:: dx = \left[f x - \tfrac{1+\eta^2}{2}\,g^2\,\nabla\log p_t(x)\right]dt + \eta\,g\,d\bar w, \qquad
          \nabla\log p_t(x) = \frac{\alpha\,d - x}{\sigma^2}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._numerics import legendre
from scoresde.noise.brownian import Span
from scoresde.plan.rows import Weight
from scoresde.processes.sde import SDE
from scoresde.solvers.rule import Eta, Solver, check_eta, ends_clean, eta_at, on_leg, said, starts_silent
from scoresde.solvers.tape import Tape


@dataclass(frozen=True, repr=False)
class ReverseSDE(Solver):
    """Euler–Maruyama, or Heun with the same noise in both stages, on the reverse SDE in t or in λ.

    A step into σ = 0 returns the denoised state without noise. A step from α = 0 is an exponential step.

    Arguments:
        eta: Stochasticity: 1 for the reverse SDE, any other number, or a function of the time at the end of a step.
        clock: Time variable: ``"t"`` or ``"lam"``.
        heun: Whether to use Heun's second stage.
    """

    eta: Eta = 1.0
    clock: str = "t"
    heun: bool = False

    def __post_init__(self) -> None:
        check_eta("eta", self.eta)
        check.choice("clock", self.clock, ("t", "lam"))

    def __repr__(self) -> str:
        name = "StochasticHeun" if self.heun else "EulerMaruyama"
        return f"{name}(eta={said(self.eta)}, clock={self.clock!r})"

    @property
    def declared_order(self) -> int:
        return 2 if self.heun else 1

    @property
    def stages(self) -> int:
        return 2 if self.heun else 1

    @property
    def _forgets(self) -> bool:
        return not callable(self.eta)

    def _leg(self, tape: Tape, now: int, history: list[int], t: Weight, asks: bool, node: int) -> tuple[int, list[int]]:
        s, eta, sde = tape.time(now), eta_at(self.eta, t), tape.sde
        if ends_clean(sde, t) or starts_silent(sde, s):
            new = tape.move(now, t, history[:1], eta=eta, evaluates=asks, node=node, note="one stage")
            return new, [new]
        p, q, pp, qq, std = on_leg(s, t, lambda a, b: self._slopes(sde, a, b, eta))
        start, end = (s, t) if self.clock == "t" else on_leg(s, t, lambda a, b: (sde.lam(a), sde.lam(b)))
        path = Span(start, end, self.clock)
        z = [(tape.draw(path), std)] if isinstance(eta, Tensor) or eta > 0 else []
        first = history[0]
        if not self.heun:
            new = tape.append(t, x=[(now, 1 + p)], d=[(first, q)], z=z, evaluates=asks, node=node)
            return new, [new]
        stage = tape.append(t, x=[(now, 1 + p)], d=[(first, q)], z=z, note="stage")
        x, d = [(now, 1 + p / 2), (stage, pp / 2)], [(first, q / 2), (stage, qq / 2)]
        new = tape.append(t, x=x, d=d, z=z, evaluates=asks, node=node)
        return new, [new]

    def _slopes(self, sde: SDE, s: Tensor, t: Tensor, eta: Weight) -> tuple[Tensor, ...]:
        """Return the step size times the drift's weights of x and d at both ends, and the standard deviation."""
        h = t - s if self.clock == "t" else sde.lam(t) - sde.lam(s)
        out, rates = [], []
        for at in (s, t) if self.heun else (s, s):
            fall = sde.g2(at) / (2 * sde.sigma(at) ** 2)  # −dλ/dt
            rate = torch.ones_like(fall) if self.clock == "t" else -1 / fall
            pull = (1 + eta**2) * fall
            out += [h * rate * (sde.f(at) + pull), -h * rate * pull * sde.alpha(at)]
            rates.append(-h * rate * sde.g2(at))
        return (*out, eta * ((rates[0] + rates[1]) / 2).sqrt())


@dataclass(frozen=True, repr=False)
class SongPredictor(Solver):
    """Song's reverse-diffusion predictor; a step into σ = 0 returns the denoised state."""

    def __repr__(self) -> str:
        return "ReverseDiffusion()"

    @property
    def declared_order(self) -> int:
        return 1

    @property
    def _forgets(self) -> bool:
        return True

    def _leg(self, tape: Tape, now: int, history: list[int], t: Weight, asks: bool, node: int) -> tuple[int, list[int]]:
        s, sde = tape.time(now), tape.sde
        if ends_clean(sde, t) or starts_silent(sde, s):
            new = tape.move(now, t, history[:1], eta=1.0, evaluates=asks, node=node, note="one stage")
            return new, [new]

        def weights(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            fresh = -torch.expm1(2 * (sde.lam(a) - sde.lam(b)))  # G²/σ_s²
            keep = 2 - sde.alpha(a) / sde.alpha(b) - fresh
            return keep, fresh * sde.alpha(a), sde.sigma(a) * fresh.sqrt()

        keep, gain, std = on_leg(s, t, weights)
        z = [(tape.draw(tape.along(s, t, -1.0)), std)]
        new = tape.append(t, x=[(now, keep)], d=[(history[0], gain)], z=z, evaluates=asks, node=node)
        return new, [new]


@dataclass(frozen=True, repr=False)
class ExtendedReverse(Solver):
    r"""ER-SDE: a noise scale φ(ρ) with ρ = σ/α defines the transfer of x, and D is interpolated in ρ.

    .. math:: \frac{x_t}{\alpha_t} = \frac{\phi_t}{\phi_s}\frac{x_s}{\alpha_s}
              + \phi_t\int_{\varrho_s}^{\varrho_t} D\,d\!\left(\frac1\phi\right)
              + \sqrt{\varrho_t^2 - \left(\tfrac{\phi_t}{\phi_s}\varrho_s\right)^2}\;z

    φ = ρ is the flow and φ = ρ² the reverse SDE. η² of a step is the mean of :math:`d\log\phi/d\log\varrho - 1`.

    Arguments:
        order: Number of nodes, 1 to 3.
        phi: Function φ(ρ) of tensors; φ(ρ)/ρ must not decrease.
        published: Whether order 3 takes the slope half a step too early, as published; its order is then 2.
    """

    order: int
    phi: Callable[[Tensor], Tensor]
    published: bool = False

    def __post_init__(self) -> None:
        if check.integer("order", self.order, at_least=1) > 3:
            raise ValueError(f"`order` must be 1, 2 or 3, got {self.order}.")

    def __repr__(self) -> str:
        form = ", form='published'" if self.published else ""
        return f"ERSDE(order={self.order}, phi={said(self.phi)}{form})"

    @property
    def declared_order(self) -> int:
        return 2 if self.published and self.order == 3 else self.order

    @property
    def weak_order(self) -> int:
        """At most 2, because each step uses one Gaussian increment."""
        return min(self.order, 2)

    def _leg(self, tape: Tape, now: int, history: list[int], t: Weight, asks: bool, node: int) -> tuple[int, list[int]]:
        s, sde = tape.time(now), tape.sde
        nodes = tape._apart(history)[: self.order]
        nodes = [k for k in nodes if not starts_silent(sde, tape.time(k))]
        if ends_clean(sde, t) or starts_silent(sde, s):
            new = tape.move(now, t, history[:1], eta=1.0, evaluates=asks, node=node, note="one stage")
        else:
            times = [tape.time(k) for k in nodes]
            keep, std, *gains = on_leg(s, t, lambda a, b: self._weights(sde, a, b, times))
            z = [(tape.draw(self._span(sde, s, t)), std)] if isinstance(std, Tensor) or std > 0 else []
            d = list(zip(nodes, gains, strict=True))
            new = tape.append(t, x=[(now, keep)], d=d, z=z, evaluates=asks, node=node)
        return new, ([new, *history][: self.order] if asks else history)

    @property
    def _forgets(self) -> bool:
        return self.order == 1

    def _span(self, sde: SDE, s: Weight, t: Weight) -> Span:
        """Span of a step's noise on the Brownian path in the clock (ρ/φ)²."""

        def clock(*times: Tensor) -> tuple[Tensor, ...]:
            rho = [(-sde.lam(at)).exp() for at in times]
            return tuple((r / self.phi(r)) ** 2 for r in rho)

        start, end = on_leg(s, t, clock)
        return Span(start, end, f"(rho/{said(self.phi)})**2")

    def _weights(self, sde: SDE, s: Tensor, t: Tensor, times: list[Weight]) -> tuple[Tensor, ...]:
        hi, lo = (-sde.lam(s)).exp(), (-sde.lam(t)).exp()
        ratio = self.phi(lo) / self.phi(hi)
        slow = self.phi(lo) / lo / (self.phi(hi) / hi)  # exactly 1 for the flow
        std = lo * (1 - slow**2).clamp(min=0.0).sqrt()
        node, weight = legendre()
        u = lo[..., None] + (hi - lo)[..., None] * node
        whole = (self.phi(lo)[..., None] / self.phi(u)) @ weight * (hi - lo)
        early = ((self.phi(lo)[..., None] / self.phi(u)) * (u - hi[..., None])) @ weight * (hi - lo)
        # integrals of the kernel times 1, ρ − ρ_s and (ρ − ρ_s)²
        moments = [1 - ratio, lo - hi + whole, (lo - hi) ** 2 + 2 * early]
        rho = [(-sde.lam(torch.as_tensor(k, dtype=torch.float64))).exp() for k in times]
        gains = [moments[0], *(torch.zeros_like(ratio) for _ in rho[1:])]

        def add(differences: list[Any], moment: Tensor) -> None:
            for j, c in enumerate(differences):
                gains[j] = gains[j] + moment * c

        if len(rho) > 1:
            a = 1 / (rho[0] - rho[1])
            add([a, -a], moments[1])
        if len(rho) > 2:
            a, b, c = 1 / (rho[0] - rho[1]), 1 / (rho[1] - rho[2]), 1 / (rho[0] - rho[2])
            slope = 0.0 if self.published else rho[0] - rho[1]
            add([a * c, -(a + b) * c, b * c], moments[2] + slope * moments[1])
        return sde.alpha(t) / sde.alpha(s) * ratio, sde.alpha(t) * std, *(sde.alpha(t) * g for g in gains)
