r"""A stochastic plan as a policy: Gaussian transitions and their log-densities.

.. math:: x_r \sim N(m_r, s_r^2 I), \qquad m_r = \sum_k a_{rk} x_k + \sum_k b_{rk} d_k, \quad s_r = |c_r|,

given all states before row r. Reinforcement learning of samplers (DDPO, DPOK, GRPO on flows) computes them twice:
during sampling, and at the same states with updated parameters.

References:
    | Training Diffusion Models with Reinforcement Learning (Black et al., 2024), arXiv:2305.13301
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.noise.keyed import Noise
from scoresde.plan.rows import Weight
from scoresde.plan.run import updates
from scoresde.plan.table import Plan


class Transition(NamedTuple):
    """Transition to the state of one row.

    Arguments:
        t: Time of the new state.
        x: New state, (B, *event), without gradient.
        mean: Mean given all earlier states, (B, *event).
        std: Standard deviation, a number or (B,); 0 for rows without noise.
        log_prob: Log-density of `x` in nats, (B,); None for rows without noise.
    """

    t: Weight
    x: Tensor
    mean: Tensor
    std: Weight
    log_prob: Tensor | None

    def kl(self, other: Transition) -> Tensor:
        r"""KL divergence to the transition of another model with the same plan, in nats, (B,); 0 for equal means.

        .. math:: KL = \frac{|m - m'|^2}{2 s^2}

        The expectation of their sum over a run is the KL divergence of the laws of the paths.

        Arguments:
            other: Transition of the same row, from the same earlier states.
        """
        self._check_same(other)
        gap = (self.mean - other.mean) / check.expand(self.std, self.mean)
        return 0.5 * gap.square().flatten(1).sum(1)

    def log_ratio(self, other: Transition) -> Tensor:
        r"""Logarithm of the density of `x` relative to that of another model, in nats, (B,).

        .. math:: \log\frac{p(x)}{p'(x)} = \frac{(m - m')\cdot(2x - m - m')}{2 s^2}

        It equals the difference of the two log-densities, without the cancellation of their sums over many elements:
        in float32 the error of log-densities of 65,536 elements is about 0.002, and that of this form is 1e-6 of the
        result.

        Arguments:
            other: Transition of the same row, from the same earlier states.
        """
        self._check_same(other)
        std = check.expand(self.std, self.mean)
        terms = ((self.mean - other.mean) / std) * ((self.x - other.mean + (self.x - self.mean)) / std)
        return 0.5 * terms.flatten(1).sum(1)

    def _check_same(self, other: Transition) -> None:
        if self.log_prob is None or other.log_prob is None:
            raise ValueError("a row without noise has no density; give transitions of rows with noise.")
        if not isinstance(self.std, Tensor) and self.std != other.std:
            raise ValueError(f"the transitions have the deviations {self.std:g} and {other.std}; give both one plan.")


@checked
def transitions(
    plan: Plan,
    model: AbstractDenoiser,
    x: Tensor,
    noise: Noise | None = None,
    *,
    states: Sequence[Tensor] | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[Transition]:
    """Run a plan and yield the transition of every row after the start; the last `x` is the result.

    If gradients are enabled, means and log-densities carry gradients to the parameters of the network; states do not.

    Arguments:
        plan: Plan with at most one normal per row, used in no other row.
        model: A denoiser; ``model.given(label=y)`` holds conditions.
        x: Initial state, (B, *event).
        noise: Source of the normals.
        states: States `x` of all transitions of an earlier run, to evaluate their log-density; replaces `noise`.
        rows: Rows whose transitions are yielded, by default all. The network is evaluated only where these need it,
            so that a minibatch of the steps costs no more than its share. Requires `states`.

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.1)
        >>> plan = ss.solvers.Multistep(1, eta=1.0).plan(mix.sde, ss.grids.karras(mix.sde, 5))
        >>> run = list(transitions(plan, mix, torch.randn(4, 1), ss.Noise(0)))
        >>> sum(step.log_prob for step in run if step.log_prob is not None).shape
        torch.Size([4])
    """
    _check_own_draws(plan)
    check.state("x", x)
    if states is not None and len(states) != len(plan) - 1:
        raise ValueError(f"`states` must have one entry for each of {len(plan) - 1} transitions, got {len(states)}.")
    if (noise is None) == (states is None) and plan.stochastic:
        raise ValueError("give either `noise`, to sample states, or `states`, to reuse those of an earlier run.")
    chosen = range(1, len(plan)) if rows is None else _chosen(plan, rows, states)
    denoise = model.x0 if rows is None else _Needed(plan, model, chosen)
    loop, finite = updates(plan, denoise, x, noise), check.Finite("the means of the transitions")
    at: Weight = plan.rows[0].t
    del x  # otherwise this reference holds the memory of the initial state
    for update in loop:
        if states is not None:
            update.x = check.match("states", states[update.row - 1], "x", update.mean)
        update.x = update.x.detach()
        if update.row not in chosen:
            continue
        weight = update.draws[0][1] if update.draws else 0.0
        std = weight.abs() if isinstance(weight, Tensor) else abs(weight)
        log_prob = _log_prob(update.x, update.mean, std) if update.draws else None
        finite.add(update.mean, at)
        at = update.t
        yield Transition(update.t, update.x, update.mean, std, log_prob)
        del update, log_prob
    finite.warn()


class _Needed:
    """A denoiser that is evaluated for some rows of a plan only, and returns zeros for the others."""

    def __init__(self, plan: Plan, model: AbstractDenoiser, rows: Sequence[int]) -> None:
        used = {k for row in rows for k, _ in plan.rows[row].d}
        self._model = model
        self._needed = iter([r in used for r, row in enumerate(plan.rows) if row.evaluates])

    def __call__(self, x: Tensor, t: Weight) -> Tensor:
        return self._model.x0(x, t) if next(self._needed) else torch.zeros_like(x)


def _chosen(plan: Plan, rows: Sequence[int], states: Sequence[Tensor] | None) -> Sequence[int]:
    if states is None:
        raise ValueError("`rows` chooses transitions of an earlier run; give its `states` too.")
    for row in rows:
        if not 1 <= check.integer("rows", row) < len(plan):
            raise ValueError(f"`rows` must be numbers of rows, 1 … {len(plan) - 1}, got {row}.")
    return rows


def _log_prob(x: Tensor, mean: Tensor, std: Weight) -> Tensor:
    z = (x - mean) / check.expand(std, x)
    n = x[0].numel()
    log_std = std.log().to(x) if isinstance(std, Tensor) else math.log(std)
    return -0.5 * z.square().reshape(len(x), -1).sum(1) - n * (log_std + 0.5 * math.log(2 * math.pi))


def _check_own_draws(plan: Plan) -> None:
    uses = Counter(k for row in plan.rows for k, _ in row.z)
    for r, row in enumerate(plan.rows):
        shared = [k for k, _ in row.z if uses[k] > 1]
        if len(row.z) > 1 or shared:
            raise ValueError(
                f"row {r} of `plan` uses {len(row.z)} normals, {len(shared)} of them shared with other rows, so it has "
                f"no density given the earlier rows; use a solver with one normal per step, such as DDPM, or a "
                f"first-order or multistep SDE solver without a corrector."
            )
