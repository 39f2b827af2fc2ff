r"""Potentials: what particles are steered towards, and how early they learn of it.

The target of steering is :math:`p(x_0)\,e^{r(x_0)} / Z`. A potential holds r and a *twist*, a guess of
:math:`\log E[e^{r(x_0)} \mid x_t]` that steers the particles on the way. Any finite twist leaves the target unchanged;
a better one needs fewer particles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import select
from scoresde.noise.keyed import Noise
from scoresde.processes.sde import SDE, TimeT

_P = TypeVar("_P", bound="Potential")


class Potential:
    """Base of potentials; a subclass writes :meth:`log_value`, and :meth:`twist` if it has a better one.

    A subclass that holds values of the problems of a batch also writes :meth:`rows`.

    Example:
        >>> import torch, scoresde as ss
        >>> class Inside(ss.steering.Potential):
        ...     # x₀ is inside the unit ball; on the way, the less the further outside.
        ...     def log_value(self, x0):
        ...         return torch.where(x0.square().sum(1) < 1, 0.0, -torch.inf)
        ...     def twist(self, x, x0, t, sde):
        ...         return -(x0.square().sum(1) - 1).clamp_min(0)
        >>> prior = ss.GaussianMixture(ss.VP(), torch.zeros(1, 2), std=1.0)
        >>> run = ss.steering.steer(prior, Inside(), (1, 2), particles=500, seed=0)
        >>> bool((run.resampled(seed=0)[0].norm(dim=1) < 1).all())
        True
    """

    sees_state = False
    """Whether the twist depends on x_t other than through the denoised state."""

    def log_value(self, x0: Tensor) -> Tensor:
        """Log-potential r of clean samples, (B, *event) to (B,); −∞ excludes a sample."""
        raise NotImplementedError(f"{type(self).__name__} must define `log_value(x0)`, one number for each sample.")

    def twist(self, x: Tensor, x0: Tensor, t: float | Tensor, sde: SDE) -> Tensor:
        """Log of the twisting function at time `t`, (B,), by default r of the denoised state.

        A particle whose twist is −∞ is lost, so a twist must be finite wherever the target may still be reached.

        Arguments:
            x: State, (B, *event).
            x0: Denoised state E[x₀ | x_t], (B, *event).
            t: Time.
            sde: Process.
        """
        return self.log_value(x0)

    def rows(self: _P, index: Tensor) -> _P:
        """This potential for some problems of the batch.

        Arguments:
            index: Numbers of the problems, an integer tensor; a number may occur more than once.
        """
        return self


@checked
@dataclass(frozen=True)
class Reward(Potential):
    r"""Any reward: :math:`p(x_0)\,e^{r(x_0)}`, with r in nats; a temperature β is ``lambda x: reward(x) / beta``.

    Arguments:
        fn: Function r, (B, *event) to (B,). It need not be differentiable, unless its gradient is the proposal. If it
            holds values of the problems of a batch, it has a method ``rows(index)`` that returns the function of some.
        anneal: Factor of r on the way, a function of time, such as ``lambda t: 1 - t``; by default 1. The target does
            not depend on it.
        state: Twist of the noisy state, a function ``state(x, t)`` to (B,), instead of r of the denoised state. For
            rewards that are trained on noisy states, and for black boxes that may only see x_t.

    References:
        | A General Framework for Inference-time Scaling and Steering of Diffusion Models (Singhal et al., 2025),
          arXiv:2501.06848

    Example:
        >>> import torch, scoresde as ss
        >>> prior = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.2)
        >>> run = ss.steering.steer(prior, ss.steering.Reward(lambda x: x[:, 0]), (1, 1), particles=1000, seed=0)
        >>> abs(float(run.log_z) - float(torch.logsumexp(torch.tensor([1.02, -0.98]), 0)) + 0.6931) < 0.1
        True
    """

    fn: Callable[[Tensor], Tensor]
    anneal: Callable[[float], float] | None = None
    state: Callable[[Tensor, float | Tensor], Tensor] | None = None

    @property
    def sees_state(self) -> bool:  # type: ignore[override]
        """Whether `state` replaces r on the way."""
        return self.state is not None

    def log_value(self, x0: Tensor) -> Tensor:
        return check_values("fn", self.fn(x0), x0)

    def twist(self, x: Tensor, x0: Tensor, t: float | Tensor, sde: SDE) -> Tensor:
        value = self.log_value(x0) if self.state is None else check_values("state", self.state(x, t), x)
        return value if self.anneal is None else check.number("anneal", self.anneal(float(t))) * value

    def rows(self, index: Tensor) -> Reward:
        parts = {name: getattr(self, name) for name in ("fn", "state")}
        return replace(self, **{k: select(f, index) if hasattr(f, "rows") else f for k, f in parts.items()})


@checked
@dataclass(frozen=True)
class Smoothed(Potential):
    r"""Another potential, whose twist is averaged over a Gaussian around the denoised state.

    .. math:: \log\frac1M\sum_m e^{r(D + r_t \xi_m)}, \qquad
              r_t^2 = \frac{\sigma^2 s^2}{\alpha^2 s^2 + \sigma^2}, \quad \xi_m \sim N(0, I)

    is close to :math:`\log E[e^r \mid x_t]` if x₀ given x_t is about N(D, r_t² I). For any likelihood or reward,
    differentiable or not. The points ξ come in pairs of opposite sign, and all particles have the same ones.

    Arguments:
        potential: Potential whose `log_value` is r.
        points: Number M of points, even.
        data_std: Standard deviation s of the data.
        seed: Seed of the points.

    References:
        | Loss-Guided Diffusion Models for Plug-and-Play Controllable Generation (Song et al., 2023), ICML
    """

    potential: Potential
    points: int = 16
    data_std: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if check.integer("points", self.points, at_least=2) % 2:
            raise ValueError(f"`points` must be even, because points come in pairs, got {self.points}.")
        check.number("data_std", self.data_std, above=0)

    def log_value(self, x0: Tensor) -> Tensor:
        return self.potential.log_value(x0)

    def twist(self, x: Tensor, x0: Tensor, t: float | Tensor, sde: SDE) -> Tensor:
        half = self.points // 2
        z = Noise(self.seed).normal((half, *x0.shape[1:]), 0, dtype=x0.dtype, device=x0.device)
        width = check.expand(spread(sde, t, self.data_std), x0)
        values = [self.log_value(x0 + sign * width * z[m]) for m in range(half) for sign in (1, -1)]
        return torch.stack(values).logsumexp(0) - math.log(self.points)

    def rows(self, index: Tensor) -> Smoothed:
        return replace(self, potential=self.potential.rows(index))


def spread(sde: SDE, t: TimeT, data_std: float) -> TimeT:
    r"""Standard deviation of x₀ given x_t for data N(0, s² I), :math:`\sigma s / \sqrt{\alpha^2 s^2 + \sigma^2}`."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    out: TimeT = sigma * data_std / (alpha**2 * data_std**2 + sigma**2) ** 0.5
    return out


def check_values(name: str, values: object, x: Tensor) -> Tensor:
    """Return the values of a potential; raise an error unless there is one for each row of `x`."""
    if not isinstance(values, Tensor) or values.shape != (len(x),):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"`{name}` must return one number for each sample, ({len(x)},), got {got}.")
    return values


# Schedules: the log-potential that particles have so far, from the twists on their path.

Schedule = Callable[[Tensor], Tensor]
"""A function of the twists that a particle has met, (B, k), that returns its log-potential so far, (B,)."""


def difference(twists: Tensor) -> Tensor:
    """The last twist: each step weighs by the difference of two.

    Arguments:
        twists: Twists on the path of each particle, (B, k).
    """
    return twists[:, -1]


def maximum(twists: Tensor) -> Tensor:
    """Sum over the steps of the largest twist so far.

    Arguments:
        twists: Twists on the path of each particle, (B, k).
    """
    return twists.cummax(1).values.sum(1)


def total(twists: Tensor) -> Tensor:
    """Sum over the steps of the sum of the twists so far.

    Arguments:
        twists: Twists on the path of each particle, (B, k).
    """
    return twists.cumsum(1).sum(1)


SCHEDULES: dict[str, Schedule] = {"difference": difference, "max": maximum, "sum": total}


def as_schedule(given: str | Schedule) -> Schedule:
    """A schedule from its name, or itself."""
    return SCHEDULES[check.choice("schedule", given, tuple(SCHEDULES))] if isinstance(given, str) else given
