r"""Universal tables: weights for a number of evaluations, fitted to many problems at once.

In the frame y = x/α, with noise levels s = σ/α in units of the data's standard deviation, a table of n evaluations is

.. math:: y_r = \frac{s_r}{s_T}\,y_T + \Big(1 - \frac{s_r}{s_T}\Big) \sum_{k<r} w_{rk}\,D(y_k, \tau_k),
          \qquad \sum_k w_{rk} = 1, \qquad s_n = 0,

from the first state :math:`y_0 = (s_0/s_T)\,y_T`, or from a state :math:`y_0` that the flow of a Gaussian reaches at
:math:`s_0`, which then takes the place of T. :func:`descend` fits levels, network levels and weights to random
mixtures: their trajectories cost no evaluation of a network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from scoresde.fitting.descent import lbfgs_round
from scoresde.fitting.mixtures import Problems
from scoresde.solvers.universal import UniversalTable

_ROUND = 25  # iterations between two evaluations of the held-out errors
_PATIENCE = 3  # rounds without improvement before the fit stops
_LOWEST = -6.0  # logarithm of the smallest level that a fit reaches
_HIGHEST = 6.0  # logarithm of the largest first level that a fit reaches


class Trajectories(Protocol):
    """Trajectories of one or more problems, whose errors a fit makes smaller."""

    def errors(self, table: UniversalTable) -> Tensor:
        """Error of each sample, (P, B), differentiable in the table."""

    def __len__(self) -> int:
        """Number P of problems."""


@dataclass(frozen=True)
class Group:
    """Trajectories of a batch of problems.

    Arguments:
        problems: The problems.
        y: Initial states, (P, B, D).
        end: Ends of their flow, (P, B, D).
        axes: Eigenvectors of the data, (P, D, D), for a Gaussian start, or None.
        spectrum: Eigenvalues of the data, (P, D), for a Gaussian start, or None.
    """

    problems: Problems
    y: Tensor
    end: Tensor
    axes: Tensor | None = None
    spectrum: Tensor | None = None

    @classmethod
    def draw(cls, problems: Problems, n: int, *, seed: int, gaussian: bool = False) -> Group:
        """Draw initial states and solve for their ends.

        Arguments:
            problems: The problems.
            n: Number of trajectories of each problem.
            seed: Seed.
            gaussian: Whether a Gaussian start carries them to the first level of a table.
        """
        with torch.no_grad():
            y = problems.draw(n, seed)
            end = problems.end(y)
            if not gaussian:
                return cls(problems, y, end)
            spectrum, axes = torch.linalg.eigh(problems.data.covariance())
            return cls(problems, y, end, axes, spectrum.clamp_min(0))

    def __len__(self) -> int:
        return len(self.y)

    def run(self, table: UniversalTable) -> Tensor:
        """Results of a table, (P, B, D)."""
        if self.axes is None or self.spectrum is None:
            return table.run(self.problems.x0, self.y, self.problems.first)
        m, first, level = self.problems.data.mean()[:, None], self.problems.first[:, 0], table.levels[0]
        grow = ((self.spectrum + level.square()) / (self.spectrum + first.square())).sqrt()
        y = ((self.y - m) @ self.axes * grow[:, None]) @ self.axes.mT + m
        return table.run(self.problems.x0, y, level)

    def errors(self, table: UniversalTable) -> Tensor:
        """Error of each sample, root mean square over its entries, (P, B)."""
        return self.problems.error(self.run(table), self.end)


@dataclass
class Parameters:
    """Numbers that a fit changes; a table of positive, decreasing levels for any of their values."""

    head: Tensor
    gaps: Tensor
    shifts: Tensor
    changes: Tensor
    base: Tensor
    mask: Tensor
    free: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, table: UniversalTable, *, first_shift: bool) -> Parameters:
        """Parameters whose table is the given one.

        Arguments:
            table: Table to start from.
            first_shift: Whether the first network level may differ from the first level.
        """
        lam = -table.levels.log()
        n = table.nfe
        mask = torch.ones(n + 1, n, dtype=torch.float64).tril(-1)
        moves = torch.ones(n, dtype=torch.float64)
        moves[0] = float(first_shift)
        own = cls(
            lam[:1].clone(),
            lam.diff().log(),
            -table.network_levels.log() - lam,
            torch.zeros(n + 1, n, dtype=torch.float64),
            table.weights.clone(),
            mask,
        )
        own.shift_mask = moves  # type: ignore[attr-defined]
        own.free = [own.head, own.gaps, own.shifts, own.changes]
        for k in own.free:
            k.requires_grad_(True)
        return own

    def __call__(self) -> UniversalTable:
        """The table at the current values."""
        head = self.head.clamp(-_HIGHEST, 4.0)
        lam = torch.cat([head, head + self.gaps.exp().cumsum(0)])
        change = self.changes * self.mask
        count = self.mask.sum(1, keepdim=True).clamp_min(1)
        change = (change - change.sum(1, keepdim=True) / count) * self.mask
        told = (lam + self.shifts * self.shift_mask).clamp(-_HIGHEST, -_LOWEST)  # type: ignore[attr-defined]
        return UniversalTable((-lam.clamp_max(0.5 - _LOWEST)).exp(), (-told).exp(), self.base + change)

    def table(self) -> UniversalTable:
        """The table without gradients."""
        with torch.no_grad():
            t = self()
            return UniversalTable(*(v.detach().clone() for v in (t.levels, t.network_levels, t.weights)))


def errors(table: UniversalTable, groups: Sequence[Trajectories]) -> list[Tensor]:
    """Errors of a table on all groups, (P, B) each, without gradients."""
    with torch.no_grad():
        return [g.errors(table) for g in groups]


def mean_log(values: Sequence[Tensor], squares: float = 0.0) -> float:
    """Mean over the problems of the mean logarithm of the error; infinite if one is not finite.

    Arguments:
        values: Errors, (P, B) for each group.
        squares: Share of the logarithm of the root mean square error in the mean.
    """
    flat = torch.cat([(1 - squares) * e.log().mean(1) + squares * _log_rms(e) for e in values])
    return float(flat.mean()) if bool(flat.isfinite().all()) else math.inf


def _log_rms(e: Tensor) -> Tensor:
    """Logarithm of the root mean square of each row."""
    return 0.5 * e.square().mean(1).log()


def descend(
    table: UniversalTable,
    train: Sequence[Trajectories],
    held_out: Sequence[Trajectories],
    *,
    steps: int,
    robust: float = 1.0,
    squares: float = 0.0,
    penalty: float = 0.0,
    first_shift: bool = False,
    note: Callable[[int, float, float], None] | None = None,
) -> tuple[UniversalTable, float]:
    r"""Fit a table to problems by L-BFGS; return it and its score.

    The loss is the mean over the problems p and their samples of

    .. math:: (1 - q)\,\tfrac12\log(e^2 + \delta_p^2) + q\,\log\operatorname{rms}_p(e)
              + \frac{c}{n} \sum_{r,k} w_{rk}^2

    with q = `squares` and c = `penalty`. The errors of each problem count relative to its own δ, `robust` times their
    median, so that hard and easy problems weigh alike. The problems that are held out decide which table is returned.

    Arguments:
        table: Table to start from.
        train: Groups to fit.
        held_out: Groups that decide.
        steps: Largest number of iterations.
        robust: Multiple of the median error of a problem below which errors count as squares.
        squares: Share q of the root mean square error of each problem in the loss and in the score; with 0 the fit
            improves the median, and the few samples near a boundary of two basins count little.
        penalty: Factor c of the mean over the rows of the sum of squared weights, by which errors of the network that
            are independent of each other grow.
        first_shift: Whether the first network level may differ from the first level, as with a Gaussian start.
        note: Function of the iterations, and of the scores on both sets, called after each round.
    """
    parameters = Parameters.of(table, first_shift=first_shift)
    best, best_score = table, mean_log(errors(table, held_out), squares)
    spent = stale = 0
    while spent < steps and stale < _PATIENCE:
        now = errors(parameters.table(), train)
        scales = [robust * e.median(1, keepdim=True).values.clamp_min(1e-9) for e in now]
        spent += _round(parameters, train, scales, min(_ROUND, steps - spent), squares, penalty)
        fitted = parameters.table()
        score = mean_log(errors(fitted, held_out), squares)
        if note is not None:
            note(spent, mean_log(errors(fitted, train), squares), score)
        stale = 0 if score < best_score - 0.002 else stale + 1
        if score < best_score:
            best, best_score = fitted, score
    return best, best_score


def _round(
    parameters: Parameters,
    train: Sequence[Trajectories],
    scales: Sequence[Tensor],
    steps: int,
    squares: float,
    penalty: float,
) -> int:
    """Run a round of L-BFGS; return its number of iterations."""
    problems = sum(len(s) for s in scales)

    def loss(group: Trajectories, delta: Tensor) -> Tensor:
        e = group.errors(parameters())
        each = (1 - squares) * 0.5 * (e.square() + delta.square()).log().mean(1)
        return (each + squares * _log_rms(e) if squares else each).sum() / problems

    def losses() -> Iterator[Callable[[], Tensor]]:
        for group, delta in zip(train, scales, strict=True):
            yield partial(loss, group, delta)
        if penalty:
            yield lambda: penalty * parameters().weights.square().sum() / parameters.mask.shape[1]

    return lbfgs_round(parameters.free, losses, steps)
