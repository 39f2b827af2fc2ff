r"""Rollouts of a sampler, and their replay with other parameters.

A stochastic plan is a policy. Row r is an action with the density

.. math:: x_r \sim N(m_r, s_r^2 I), \qquad m_r = \sum_k a_{rk} x_k + \sum_k b_{rk}\,D_\theta(x_k, t_k).

A rollout stores the states, means and log-densities of a run. A replay computes means and log-densities at the same
states with the current parameters, with gradients. Both use the same loop, the same coefficients and the same
arithmetic, so that they are equal bit by bit at equal parameters if the network is (:func:`replay` says when).

References:
    | Training Diffusion Models with Reinforcement Learning (Black et al., 2024), arXiv:2305.13301
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked, checked_with, words
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.modes import check_ready
from scoresde.denoisers.start import Start, as_start
from scoresde.noise.keyed import Noise, as_noise
from scoresde.noise.streams import Stream
from scoresde.plan.table import Plan
from scoresde.sampling.solve import WORDS as SAMPLING
from scoresde.sampling.solve import GridMaker, plan_for
from scoresde.sampling.transitions import Transition, transitions
from scoresde.solvers.rule import Solver
from scoresde.solvers.stochastic import DDPM

WORDS = {name: hint for name, hint in SAMPLING.items() if "`watch`" not in hint and "`grad`" not in hint} | words("""
nfe: use `steps`
""")


@dataclass(frozen=True)
class Rollout:
    """A run of a stochastic plan, with the transition of every row; made by :func:`rollout`.

    ``rollout[index]`` is the rollout of some samples.

    Arguments:
        plan: Plan that was run.
        start: Initial states, (B, *event).
        transitions: Transitions to rows 1, 2, … of the plan, without gradient.
        seed: Seed of the run's noise.
    """

    plan: Plan
    start: Tensor = field(repr=False)
    transitions: tuple[Transition, ...] = field(repr=False)
    seed: int | tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.start)

    @property
    def x(self) -> Tensor:
        """Final states, (B, *event)."""
        return self.transitions[-1].x

    @property
    def rows(self) -> tuple[int, ...]:
        """Numbers of the rows with noise, which have densities; S of them."""
        return tuple(r for r, step in enumerate(self.transitions, 1) if step.log_prob is not None)

    @property
    def states(self) -> tuple[Tensor, ...]:
        """States of rows 1, 2, … of the plan, (B, *event) each."""
        return tuple(step.x for step in self.transitions)

    @property
    def log_prob(self) -> Tensor:
        """Log-densities of the rows with noise, in nats, (S, B)."""
        return torch.stack([step.log_prob for step in self.at() if step.log_prob is not None])

    @checked
    def at(self, rows: Sequence[int] | None = None) -> tuple[Transition, ...]:
        """Transitions of some rows.

        Arguments:
            rows: Rows with noise, by default all.
        """
        return tuple(self.transitions[r - 1] for r in _with_noise(self, rows))

    def __getitem__(self, index: Tensor | Sequence[int] | slice) -> Rollout:
        if any(isinstance(t, Tensor) and t.ndim for t in self.plan.times):
            raise ValueError("the plan has a grid for each sample; make one rollout for each part of the batch.")
        if not isinstance(index, Tensor | Sequence | slice) or isinstance(index, str):
            raise TypeError(f"`index` must be a slice, a list or a tensor of numbers, got {index!r}; one is [i].")
        chosen = index if isinstance(index, slice) else torch.as_tensor(index, device=self.start.device)

        def pick(step: Transition) -> Transition:
            log_prob = None if step.log_prob is None else step.log_prob[chosen]
            return step._replace(x=step.x[chosen], mean=step.mean[chosen], log_prob=log_prob)

        return replace(self, start=self.start[chosen], transitions=tuple(map(pick, self.transitions)), seed=None)


@checked_with(WORDS)
def rollout(
    model: AbstractDenoiser,
    shape_or_x: Sequence[int] | Tensor,
    solver: Solver | Plan | None = None,
    *,
    steps: int | None = None,
    grid: Tensor | Sequence[float] | GridMaker | None = None,
    t_start: float | None = None,
    t_end: float = 0.0,
    seed: int | Sequence[int] | Noise | None = None,
    start: Start | None = None,
) -> Rollout:
    """Run a stochastic solver without gradients and keep all transitions.

    Arguments:
        model: Denoiser; ``model.given(label=y)`` holds conditions. Dropout and batch norm must be off, as in
            ``model.eval()``: parameters still get gradients in the replay.
        shape_or_x: Shape (B, *event) to start from the prior, or initial states (B, *event).
        solver: Solver with one normal per step, or a plan; by default :func:`DDPM`.
        steps: Number of steps, by default 20.
        grid: Times from noise to data, or a function that makes them.
        t_start: First time, by default T.
        t_end: Last time. A step into σ = 0 has no noise, and so no density.
        seed: Seed of the samples, as in :func:`solve`.
        start: Scale, dtype and device of the initial states.

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.Flow(), torch.tensor([[-1.0], [1.0]]), std=0.1)
        >>> run = ss.policies.rollout(mix, (4, 1), ss.solvers.FlowSDE(), steps=5, seed=0)
        >>> run.rows, run.log_prob.shape, run.x.shape
        ((1, 2, 3, 4), torch.Size([4, 4]), torch.Size([4, 1]))
    """
    check_ready(model)
    plan = plan_for(model, DDPM() if solver is None else solver, steps, None, grid, t_start, t_end)
    if not plan.stochastic:
        raise ValueError(f"{plan.name or 'the plan'} draws no noise, so it has no densities; use DDPM() or FlowSDE().")
    noise = as_noise(seed)
    with torch.no_grad():
        x = as_start(start).draw(model, shape_or_x, plan.rows[0].t, noise)
        run = tuple(transitions(plan, model, x, noise.fork(Stream.STEPS)))
    return Rollout(plan, x, run, noise.seed)


@checked
def replay(rollout: Rollout, model: AbstractDenoiser, rows: Sequence[int] | None = None) -> tuple[Transition, ...]:
    """Transitions of a rollout with the current parameters: the same states, new means and log-densities.

    The network is evaluated only where the rows need it. At the parameters of the rollout, means and log-densities are
    those of the rollout bit by bit if the network's results are: the batch must be the same, since kernels may depend
    on its size, and the network may draw no random numbers. A part of the batch gives the same up to rounding.

    Arguments:
        rollout: Rollout.
        model: Denoiser; gradients flow to its parameters if they are enabled.
        rows: Rows with noise, by default all; the results are in the order of `rows`.

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.1)
        >>> run = ss.policies.rollout(mix, (4, 1), steps=5, seed=0)
        >>> again = ss.policies.replay(run, mix, rows=[4, 2])
        >>> [torch.equal(a.log_prob, b.log_prob) for a, b in zip(again, run.at([4, 2]))]
        [True, True]
    """
    check_ready(model)
    rows = _with_noise(rollout, rows)
    found = transitions(rollout.plan, model, rollout.start, states=rollout.states, rows=sorted(set(rows)))
    by_row = dict(zip(sorted(set(rows)), found, strict=True))
    return tuple(by_row[r] for r in rows)


@checked
def minibatches(
    rollout: Rollout, rows: int, samples: int | None = None, *, seed: int | Noise | None = None
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Partition the rows with noise and the samples of a rollout at random; yield pairs (rows, index of samples).

    Every pair of a row and a sample is in one minibatch. The last parts may be smaller.

    Arguments:
        rollout: Rollout.
        rows: Number of rows in a minibatch.
        samples: Number of samples in a minibatch, by default all, in their order: this keeps the batch of the rollout.
        seed: Seed of the partition.

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.1)
        >>> run = ss.policies.rollout(mix, (4, 1), steps=6, seed=0)
        >>> sorted(r for rows, index in ss.policies.minibatches(run, 2, seed=0) for r in rows)
        [1, 2, 3, 4, 5]
    """
    rows = check.integer("rows", rows, at_least=1)
    samples = None if samples is None else check.integer("samples", samples, at_least=1)
    return _partition(rollout, rows, samples, as_noise(seed))


def _partition(
    rollout: Rollout, rows: int, samples: int | None, noise: Noise
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    known, device = rollout.rows, rollout.start.device
    order = _order(len(known), noise, 0)
    index = torch.arange(len(rollout)) if samples is None else _order(len(rollout), noise, 1)
    for part in order.split(rows):
        for some in index.split(len(rollout) if samples is None else samples):
            yield tuple(known[int(k)] for k in part), some.to(device)


def _order(n: int, noise: Noise, draw: int) -> Tensor:
    """A random order of n numbers."""
    return noise.uniform((1, n), draw, dtype=torch.float64)[0].argsort()


def _with_noise(rollout: Rollout, rows: Sequence[int] | None) -> tuple[int, ...]:
    known = rollout.rows
    if rows is None:
        return known
    for row in rows:
        if check.integer("rows", row) not in known:
            raise ValueError(f"`rows` must be rows with noise, {', '.join(map(str, known))}, got {row}.")
    return tuple(int(row) for row in rows)
