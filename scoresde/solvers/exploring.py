r"""Stochastic solvers made for reinforcement learning: Flow-SDE, any diffusion coefficient, CPS.

All have one evaluation and one Gaussian increment per step, so that every transition has a density. The reverse SDE has
the marginals of the probability flow for any diffusion coefficient s(t):

.. math:: dx = \left[v(x, t) - \tfrac12 s^2(t)\,\nabla\log p_t(x)\right]dt + s(t)\,d\bar w, \qquad
          v = \dot\alpha\,x_0 + \dot\sigma\,\varepsilon.

``DDIM(eta)`` and ``DDPM()`` are the two others that such work uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.noise.brownian import Span
from scoresde.solvers.naming import published
from scoresde.solvers.rule import Solver
from scoresde.solvers.tape import Leg, Tape


@checked
@dataclass(frozen=True, repr=False)
class GivenDiffusion(Solver):
    r"""Euler–Maruyama in t on the reverse SDE with a given diffusion coefficient, see :func:`FlowSDE`.

    .. math:: x_t = x_s + \left[v_s - \tfrac12 s_s^2\,\nabla\log p_s\right](t - s) + s_s\sqrt{s - t}\;z

    Arguments:
        diffusion: Function s(t) of a float64 tensor; None for :math:`a\,g(t)/\sqrt2`.
        noise_level: Factor a, used if `diffusion` is None.
    """

    diffusion: Callable[[Tensor], float | Tensor] | None = None
    noise_level: float = 1.0

    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check.number("noise_level", self.noise_level, at_least=0)
        if self.diffusion is not None and self.noise_level != 1:
            raise ValueError(f"`diffusion` is the whole coefficient; drop `noise_level` = {self.noise_level:g}.")

    @property
    def memoryless(self) -> bool:
        return self.diffusion is None

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        first, evaluates, node = leg.history[0], leg.evaluates, leg.node
        if tape.no_noise(leg.t):
            new = tape.move(leg.row, leg.t, [first], evaluates=evaluates, node=node, note="one stage")
            return new, [new]
        s, t = tape.ends(leg)
        h, ratio = t.t - s.t, tape.sde.sigma_dot(s.t) / s.sigma
        g = self._diffusion(tape, (t if tape.no_signal(tape.time(leg.row)) else s).t)
        pull = ratio + g**2 / (2 * s.sigma**2)  # the drift is pull · x + (α̇ − pull · α) d
        x = [(leg.row, 1 + h * pull)]
        d = [(first, h * (tape.sde.alpha_dot(s.t) - pull * s.alpha))]
        std = g * (-h).sqrt()
        start, end = (tape.number(v.t.detach()) for v in (s, t))
        z = [(tape.draw(Span(start, end, "t")), std)] if not tape.plain or bool((std > 0).any()) else []
        new = tape.append(leg.t, x=x, d=d, z=z, evaluates=evaluates, node=node)
        return new, [new]

    def _diffusion(self, tape: Tape, t: Tensor) -> Tensor:
        """The coefficient at a time, checked."""
        if self.diffusion is None:
            return self.noise_level * (tape.sde.g2(t) / 2).sqrt()
        value = torch.as_tensor(self.diffusion(t), dtype=torch.float64)
        if not bool((value.detach() >= 0).all() and value.detach().isfinite().all()):
            raise ValueError(f"`diffusion` must be finite and at least 0, got {value.tolist()} at t = {t.tolist()}.")
        return value.expand_as(t)


@checked
@dataclass(frozen=True, repr=False)
class Preserving(Solver):
    r"""Coefficients-preserving steps, see :func:`CPS`; a step into σ = 0 returns the denoised state.

    Arguments:
        noise_level: Share η of a quarter turn between old and fresh noise, in [0, 1].
    """

    noise_level: float

    order: ClassVar[int] = 1
    memoryless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check.number("noise_level", self.noise_level, at_least=0, at_most=1)

    @property
    def weak_order(self) -> int:
        """1 without noise. Otherwise 0: the fresh noise of a step does not shrink with the step."""
        return 0 if self.noise_level else 1

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        first, evaluates, node = leg.history[0], leg.evaluates, leg.node
        if tape.no_noise(leg.t) or self.noise_level == 0:
            new = tape.move(leg.row, leg.t, [first], evaluates=evaluates, node=node)
            return new, [new]
        s, t = tape.ends(leg)
        angle = self.noise_level * math.pi / 2
        old, fresh = (0.0, 1.0) if self.noise_level == 1 else (math.cos(angle), math.sin(angle))
        x = [(leg.row, old * t.sigma / s.sigma)] if old else []
        d = [(first, -t.alpha * torch.expm1(math.log(old) + s.lam - t.lam) if old else t.alpha)]
        new = tape.append(leg.t, x=x, d=d, z=[(tape.draw(), fresh * t.sigma)], evaluates=evaluates, node=node)
        return new, [new]


@published
def FlowSDE(noise_level: float = 0.7) -> Solver:
    r"""Flow-SDE of Flow-GRPO, for any process: Euler–Maruyama on the reverse SDE with s(t) = a g(t)/√2.

    On :class:`Flow` this is :math:`s(t) = a\sqrt{t/(1-t)}`, as published. It is the reverse SDE with the constant
    stochasticity η = a/√2. For a = √2 the samples forget their start; for smaller a they remember a part of it
    (:mod:`scoresde.policies.optimum` tells why this counts). A step from α = 0, where s is infinite, uses s of its end
    time, as published. A step into σ = 0 returns the denoised state; the published code adds noise there too. Order
    1, weak order 1.

    Arguments:
        noise_level: Noise level a; 0 is :func:`Euler`.

    References:
        | Flow-GRPO: Training Flow Matching Models via Online RL (Liu et al., 2025), arXiv:2505.05470
    """
    return GivenDiffusion(None, noise_level)


@published
def ReverseEuler(diffusion: Callable[[Tensor], float | Tensor]) -> Solver:
    r"""Euler–Maruyama in t on the reverse SDE with any diffusion coefficient s(t).

    .. math:: x_t = x_s + \left[\dot\alpha d + \dot\sigma\varepsilon - \tfrac{s_s^2}{2}\,\nabla\log p_s\right](t - s)
              + s_s\sqrt{s - t}\;z

    The drift has the score with the weight s²/2, so that the marginals do not depend on s; noise without this term
    widens them. s(t) is evaluated at the start of a step; at the end of the first step if α = 0 at its start. A step
    into σ = 0 returns the denoised state. Order 1, weak order 1.

    Arguments:
        diffusion: Function s(t) of a float64 tensor, at least 0.

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          arXiv:2011.13456, appendix D
        | SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers (Ma et al.,
          2024), arXiv:2401.08740, eq. 4
    """
    return GivenDiffusion(diffusion)


@published
def CPS(noise_level: float = 0.8) -> Solver:
    r"""Coefficients-preserving sampling: DDIM's step with a fixed share of fresh noise, whatever the step size.

    .. math:: x_t = \alpha_t d_s + \sigma_t\left(\cos\tfrac{\pi\eta}2\,\varepsilon_s + \sin\tfrac{\pi\eta}2\,z\right)

    The coefficients of data and noise are exactly α_t and σ_t, so that the steps are exact for data concentrated in
    one point. For other data the share of fresh noise must shrink with the step, as in ``DDIM(eta)``, if the marginals
    are to be those of the process; here it does not, so the samples are too narrow and more steps do not help. Order
    1; weak order 0 if η > 0. η = 1 is :func:`ConsistencySampling`.

    Arguments:
        noise_level: Noise level η in [0, 1].

    References:
        | Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching (Wang & Yu, 2025),
          arXiv:2509.05952
    """
    return Preserving(noise_level)
