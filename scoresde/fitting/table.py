"""A plan as a function of the parameters that a fit changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.grids.grid import check_grid
from scoresde.plan.matrices import Unrolled, unroll
from scoresde.plan.table import Plan
from scoresde.processes.sde import SDE
from scoresde.solvers.rule import Solver

WHAT = ("times", "network_times", "weights")


@dataclass(frozen=True)
class _TimedTable(Unrolled):
    """A table whose evaluation times may differ from the times of its states.

    Arguments:
        levels: Times of the states, (n + 1,).
    """

    levels: Tensor


class Table:
    """A plan as a function of its trainable tensors, the parameters."""

    def __init__(
        self,
        solver: Plan | Solver,
        sde: SDE,
        grid: Tensor | Sequence[float] | None,
        what: Sequence[str] | None,
        starts_free: bool,
        still: bool = False,
    ) -> None:
        """Make the table.

        Arguments:
            solver: Plan or solver to start from.
            sde: Process.
            grid: Times of a solver.
            what: Parts to fit.
            starts_free: Whether the first time may move.
            still: Whether the times of the evaluations stay where they are when the states move.
        """
        self.sde = sde
        self.solver: Solver | None = None
        if isinstance(solver, Plan):
            if grid is not None:
                raise ValueError("`solver` is a plan, which has its own grid; drop `grid`.")
            self.plan = solver
        elif isinstance(solver, Solver):
            if grid is None or callable(grid):
                raise ValueError(
                    "`grid` must be given as times if `solver` is a solver, as in grid=ss.grids.karras(sde, 5)."
                )
            self.solver, grid = solver, check_grid(sde, grid)
            self.plan = solver.plan(sde, grid)
        else:
            raise TypeError(f"`solver` must be a Plan or a solver such as UniPC(), got {type(solver).__name__}.")
        self.name = self.plan.name or "plan"
        self.start = unroll(self.plan)
        if self.start.nfe == 0:
            raise ValueError("`solver` must evaluate the network at least once: there is nothing to fit.")
        times = [float(self.start.start), *(float(t) for t in self.start.t[1:])]
        known = self.plan.meta.get("levels", ())
        if len(known) == len(times):  # the plan was fitted before
            times = [*known]
        self.what = self._parts(what)
        for word in self.what:
            check.choice("what", word, WHAT)
        moved = grid.tolist() if isinstance(grid, Tensor) else times
        lam = sde.lam(torch.tensor(times[:-1], dtype=torch.float64))
        # evaluate at no larger λ than in training, unless the plan does
        self.max_lam = max(sde.lam(sde.t_min), float(lam.max()))
        self.levels = Levels(sde, moved, "times" in self.what, starts_free, self.max_lam)
        if "times" in self.what and self.plan.stochastic:
            raise ValueError("`what` must not hold 'times' for a stochastic plan: its noise depends on its times.")
        n = self.start.nfe
        self.base = torch.tensor(times, dtype=torch.float64)
        gaps = sde.lam(torch.tensor([float(t) for t in self.start.t[:-1]], dtype=torch.float64)) - lam
        self.shifts = torch.where(gaps.isfinite(), gaps, 0.0)
        self.told = torch.tensor([float(t) for t in self.start.t[:-1]], dtype=torch.float64)
        self.still = still
        self.weights = torch.zeros(n + 1, n, dtype=torch.float64)
        self.mask = torch.ones(n + 1, n, dtype=torch.float64).tril(-1)
        self.parameters = list(self.levels.parameters)
        self.parameters += [self.shifts] if "network_times" in self.what else []
        self.parameters += [self.weights] if "weights" in self.what and n > 1 else []
        if not self.parameters:
            raise ValueError(f"`what`={list(self.what)} leaves nothing to fit; evaluations of the plan: {n}.")
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def _parts(self, what: Sequence[str] | None) -> tuple[str, ...]:
        if what is not None:
            return tuple(what)
        return WHAT[1:] if self.plan.stochastic else WHAT

    def now(self, *, detach: bool = False) -> Unrolled:
        """The table at the current parameters."""
        if detach:
            with torch.no_grad():
                return self._now()
        return self._now()

    def levels_of(self, table: Unrolled) -> Any:
        """Times of the states of a table."""
        return table.levels if isinstance(table, _TimedTable) else table.t

    def _now(self) -> Unrolled:
        times = self.levels()
        if self.solver is not None and "times" in self.what:
            u = unroll(self.solver.plan(self.sde, times))
            levels = torch.stack([torch.as_tensor(t, dtype=torch.float64) for t in u.t])
            x, d = u.x, u.d
        elif "times" in self.what:
            levels, x, d = times, *self._moved(times)
        else:
            levels, x, d = self.base, self.start.x, self.start.d
        size = self.sde.alpha(levels) - x * self.sde.alpha(levels[:1])
        w = self.weights * self.mask
        w = (w - w.sum(1, keepdim=True) / self.mask.sum(1, keepdim=True).clamp_min(1)) * self.mask
        first = levels[0] if levels.requires_grad else float(levels[0])
        return _TimedTable(
            self._network_times(levels), x, d + size[:, None] * w, self.start.z, self.start.one, first, levels
        )

    def _moved(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Initial weights rescaled to other times, so that each row stays exact on one-point data."""
        (a, s), (a0, s0) = ((self.sde.alpha(t), self.sde.sigma(t)) for t in (times, self.base))
        shrink = torch.where(s0 > 0, s / torch.where(s0 > 0, s0, 1.0), 1.0)
        x = self.start.x * shrink * (s0[0] / s[0])
        old, new = a0 - s0 / s0[0] * a0[0], a - s / s[0] * a[0]
        return x, self.start.d * torch.where(old != 0, new / torch.where(old != 0, old, 1.0), 1.0)[:, None]

    def _network_times(self, levels: Tensor) -> tuple[Any, ...]:
        if self.still:
            return (*self.told, levels[-1])
        if "network_times" not in self.what and not bool(self.shifts.any()):
            return tuple(levels)
        lam = self.sde.lam(levels[:-1])
        moves = lam.detach().isfinite()
        shifted = torch.where(moves, lam, 0.0) + self.shifts
        t = self.sde.inverse_lam(shifted.clamp(self.sde.lam(self.sde.T), self.max_lam)).clamp(0.0, self.sde.T)
        # a first time without signal cannot move: it is T, or the one at which the plan evaluates a scaled state
        return (*torch.where(moves, t, self.told), levels[-1])


class Levels:
    """Times that decrease for any values of their parameters, the first λ and the logarithms of gaps in λ."""

    def __init__(self, sde: SDE, times: Sequence[float], free: bool, first: bool, max_lam: float) -> None:
        self.sde = sde
        self.times = torch.tensor(times, dtype=torch.float64)
        self.parameters: list[Tensor] = []
        self.may_move = bool((self.times.diff() < 0).all())
        if not free:
            return
        if not self.may_move:
            raise ValueError(
                "`what` must not hold 'times' for a plan whose times do not all decrease, such as one with stages at "
                "the time of the next node; give a solver and its `grid` instead, or drop 'times'."
            )
        lam = sde.lam(self.times)
        self.no_signal = not bool(lam[0].isfinite())
        if self.no_signal and first:
            raise ValueError("`gaussian` needs a plan whose first time has α > 0, as with t_start=0.9 * sde.T.")
        inner = lam[int(self.no_signal) :]
        if not bool(inner[-1].isfinite()):  # the last time has σ = 0: stay within the times of training
            room = (inner[-2] - inner[0]) / max(1, len(inner) - 2)
            inner = torch.cat([inner[:-1], torch.maximum(inner.new_tensor(max_lam), inner[-2] + 0.05 * room)[None]])
        self.low, self.end = sde.lam(sde.T), float(inner[-1])
        self.head, self.gaps = inner[:1].clone(), inner.diff().log()
        if first or self.no_signal:
            self.parameters.append(self.head)
        self.parameters += [self.gaps] if len(self.gaps) > 1 else []

    def __call__(self) -> Tensor:
        if not self.parameters:
            return self.times
        head = self.head.clamp(max(self.low, self.end - 40.0), self.end - 1.0)
        share = self.gaps.softmax(0) + 1e-4  # no two times coincide
        lam = torch.cat([head, head + (self.end - head) * (share / share.sum()).cumsum(0)[:-1]])
        t = self.sde.inverse_lam(lam).clamp(0.0, self.sde.T)
        fixed = self.no_signal or not self.head.requires_grad
        return (
            torch.cat([self.times[:1], t if self.no_signal else t[1:], self.times[-1:]])
            if fixed
            else torch.cat([t, self.times[-1:]])
        )
