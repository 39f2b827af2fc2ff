"""The loop of all methods with error control: every sample has its own time and its own step.

All samples take their steps together, in one batched evaluation at a time, and leave the batch when they arrive. The
result and the cost of a sample do not depend on the other samples. A step is accepted if its error, in the units of
:mod:`scoresde.integrators.control`, is at most 1. Times, steps and weights are float64 on the CPU; the errors are read
back from the device once a step. With a fixed number of steps nothing is read back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.integrators.control import Control
from scoresde.integrators.dense import Record
from scoresde.integrators.embedded import Attempt, Parts, Past, Scheme, advance, on_device, polynomial, wide
from scoresde.integrators.method import Stats

ROUNDING = 1e-14  # a step of this length, relative to the clock, does not change the clock

BROKEN = 1e-6  # shortest step, relative to the clock, with slopes that are not finite


class SolverError(RuntimeError):
    """A solve that cannot continue.

    Arguments:
        reason: Description of the failure.
        t: Time that the failing sample had reached.
        dt: Step that it attempted.
        nfe: Number of evaluations that the sample had used.
        worst_sample: Number of the sample in the batch.
        finite: Whether its slopes were finite.
    """

    def __init__(self, reason: str, *, t: float, dt: float, nfe: int, worst_sample: int, finite: bool) -> None:
        super().__init__(
            f"{reason} Sample {worst_sample} was at t = {t:g}, attempted a step of {dt:.3g} and had used {nfe} "
            f"evaluations; its slopes were {'' if finite else 'not '}finite."
        )
        self.t = t
        self.dt = dt
        self.nfe = nfe
        self.worst_sample = worst_sample
        self.finite = finite


class Equation:
    """A differential equation dy/du = rate(u) · f(u, y) for a batch; a subclass writes :meth:`slopes` and :meth:`rows`.

    The clock u is a tensor (b,), float64 on the CPU; the state is a tuple of tensors with b rows.
    """

    def slopes(self, u: Tensor, y: Parts) -> Parts:
        """Slopes f of all samples."""
        raise NotImplementedError

    def rows(self, index: Tensor) -> Equation:
        """The equation of some samples.

        Arguments:
            index: Positions of the samples in the present batch, (b,).
        """
        raise NotImplementedError

    def weigh(self, s: Tensor, t: Tensor, nodes: Tensor) -> Tensor:
        """Weights of slopes in a step, see :data:`~scoresde.integrators.embedded.Weigh`."""
        return polynomial(s, t, nodes)

    def rate(self, u: Tensor) -> Tensor:
        """Factor of f in dy/du."""
        return torch.ones_like(u)

    def unit(self, u: Tensor) -> Tensor:
        """Value, in units of the absolute tolerance, of a change of y by 1."""
        return torch.ones_like(u)

    def time(self, u: Tensor) -> Tensor:
        """Time at clock u, for messages."""
        return u

    def size(self, u: Tensor, attempt: Attempt, tolerance: Tensor) -> Tensor:
        """Size of the error of a step to u in units of the tolerance, (b,).

        Arguments:
            u: Ends of the steps, (b,).
            attempt: Results of the steps.
            tolerance: Tolerance of each number of the state, (b, *event).
        """
        return rms(attempt.error.detach() / tolerance)


Function = Callable[[Tensor, Parts, "Tensor | None"], "Parts | Tensor"]
"""Slopes ``f(u, y, rows)``; `rows` are the numbers of the samples, None for all."""


class FunctionEquation(Equation):
    """The equation of a plain function.

    Arguments:
        function: Slopes ``f(u, y, rows)``.
        index: Numbers of the samples, None for all.
    """

    def __init__(self, function: Function, index: Tensor | None = None) -> None:
        self.function, self.index = function, index

    def slopes(self, u: Tensor, y: Parts) -> Parts:
        rows = self.index
        f = self.function(u, y, rows if rows is None else rows.to(y[0].device, non_blocking=True))
        f = (f,) if isinstance(f, Tensor) else f
        if len(f) != len(y) or any(a.shape != b.shape for a, b in zip(f, y, strict=True)):
            raise ValueError(
                f"the function must return slopes of the shapes of the state, {[tuple(a.shape) for a in y]}, got "
                f"{[tuple(a.shape) for a in f]}."
            )
        return f

    def rows(self, index: Tensor) -> FunctionEquation:
        return FunctionEquation(self.function, index if self.index is None else self.index[index])


class Accepted:
    """A step that some samples accepted; (a,) and (a, *event) for the a samples that did.

    Arguments:
        samples: Numbers of the samples.
        s: Clock at the start of the step.
        t: Clock at its end.
        before: State of the whole batch at s.
        attempt: Attempt of the whole batch.
        index: Positions of the samples in the batch, on the device of the states; None for all.
    """

    def __init__(
        self, samples: Tensor, s: Tensor, t: Tensor, before: Parts, attempt: Attempt, index: Tensor | None
    ) -> None:
        self.samples, self.s, self.t = samples, s, t
        self._before, self._attempt, self._index = before, attempt, index

    @cached_property
    def before(self) -> Parts:
        """State at s."""
        return self._chosen(self._before)

    @cached_property
    def after(self) -> Parts:
        """State at t."""
        return self._chosen(self._attempt.y)

    @cached_property
    def stages(self) -> list[Parts]:
        """Slopes of the stages, for pairs with stages."""
        return [self._chosen(f) for f in self._attempt.stages]

    def _chosen(self, y: Parts) -> Parts:
        index = self._index
        return y if index is None else tuple(v[index] for v in y)


Observer = Callable[[Accepted], None]


@dataclass(frozen=True, eq=False)
class Run:
    """Result of :func:`integrate`.

    Arguments:
        y: Last state of each sample.
        u: Clock of that state, (B,): the end, unless the sample reached its limit.
        f: Slopes at the newest two nodes, the newest first.
        nodes: Clocks of these nodes, (2, B); NaN where a node is missing.
        stats: Cost of each sample.
        record: Nodes of all accepted steps, from which ``record.path`` makes a function of the clock, if `dense`.
    """

    y: Parts
    u: Tensor
    f: tuple[Parts, Parts]
    nodes: Tensor
    stats: Stats
    record: Record | None


@checked
def integrate(
    equation: Equation | Function,
    y: Tensor | Parts,
    start: float | Tensor,
    end: float | Tensor,
    scheme: Scheme,
    control: Control,
    *,
    observers: Sequence[Observer] = (),
    dense: bool = False,
) -> Run:
    """Integrate a differential equation in either direction, with a step of its own for every sample.

    Arguments:
        equation: Equation, or a function ``(u, y, rows)`` that returns the slopes.
        y: Initial state: a tensor (B, ...), or several that are integrated together, of which the first controls the
            steps.
        start: First clock, a number or (B,).
        end: Last clock, a number or (B,).
        scheme: Scheme of a step.
        control: Tolerances and limits.
        observers: Functions of an :class:`Accepted` step.
        dense: Whether to record the nodes of all accepted steps.
    """
    if not isinstance(equation, Equation):
        equation = FunctionEquation(equation)
    loop = _Loop(equation, (y,) if isinstance(y, Tensor) else tuple(y), start, end, scheme, control, observers, dense)
    if control.steps:
        loop.equal_steps(control.steps)
    while len(loop.samples):
        loop.step()
    return loop.result()


class _Loop:
    """The samples that have not arrived: tensors (b,) on the CPU, and states of b rows."""

    def __init__(
        self,
        equation: Equation,
        y: Parts,
        start: float | Tensor,
        end: float | Tensor,
        scheme: Scheme,
        control: Control,
        observers: Sequence[Observer],
        dense: bool,
    ) -> None:
        first = check.state("y", y[0])
        smallest = 8 * torch.finfo(first.dtype).eps
        if control.rtol + control.atol < smallest and not control.steps:
            raise ValueError(
                f"`rtol` + `atol` must be at least {smallest:.1e} for a state of {str(first.dtype)[6:]}, got "
                f"{control.rtol + control.atol:g}; use a float64 state."
            )
        self.equation, self.scheme, self.control, self.observers = equation, scheme, control, observers
        self.y = y
        self.u, self.end = (
            torch.as_tensor(v, dtype=torch.float64, device="cpu").expand(len(first)).clone() for v in (start, end)
        )
        B = len(first)
        self.samples = torch.arange(B)
        self.errors = torch.ones(2, B, dtype=torch.float64)
        steps, rejected, nfe = torch.zeros(3, B, dtype=torch.long)
        self.stats = Stats(steps, rejected, nfe, torch.zeros(B, dtype=torch.bool))
        self.done: list[tuple[Tensor, Parts, Tensor, Past]] = []
        self.record = Record(B) if dense else None
        self.memory = max(2, scheme.memory)
        if B == 0:
            self.past = Past([self.u] * 2, [y] * 2, torch.zeros(0, dtype=torch.long))
            return
        f = self.evaluate(self.u, y)
        self.past = Past([self.u] * self.memory, [f] * self.memory, torch.ones(B, dtype=torch.long))
        self.add_nodes(torch.ones(B, dtype=torch.bool))
        self.h = self.first_step(f)
        self.leave(self.u == self.end)

    def evaluate(self, u: Tensor, y: Parts) -> Parts:
        """Slopes of all samples that have not arrived."""
        self.stats.nfe[self.samples] += 1
        return self.equation.slopes(u, y)

    def evaluate_some(self, index: Tensor, u: Tensor, y: Parts) -> Parts:
        """Slopes of some of these samples."""
        self.stats.nfe[self.samples[index]] += 1
        return self.equation.rows(index).slopes(u, y)

    def tolerance(self, u: Tensor, *states: Tensor) -> Tensor:
        """The sum atol + rtol max |y|, in units of y."""
        atol = self.control.atol / self.equation.unit(u)
        y = states[0].abs()
        for other in states[1:]:
            y = torch.maximum(y, other.abs())
        return y.mul_(self.control.rtol).add_(wide(on_device(atol, y), y))

    def first_step(self, f: Parts) -> Tensor:
        """Hairer's estimate from the sizes of the state, of its slope, and of its change over a small step."""
        far, control = (self.end - self.u).abs(), self.control
        if control.steps or control.first_step is not None:
            return torch.full_like(far, control.first_step or 0.0).minimum(far)
        with torch.no_grad():
            y0, f0 = self.y[0].detach(), f[0].detach()
            tol = self.tolerance(self.u, y0)
            pace = self.equation.rate(self.u).abs()
            d0, d1 = to_host(rms(y0 / tol), rms(f0 / tol))
            d1 = pace * d1
            self.fail(~d1.isfinite(), "The slope at the start is not finite.", torch.zeros_like(far))
            h = torch.where(d1 > 1e-10, 0.01 * d0 / d1, 1e-3 * far).clamp_min(1e-8).minimum(0.01 * far)
            step = torch.where(h > 0, self.u + (self.end - self.u).sign() * h, self.u)
            small = advance(self.y, self.equation.weigh(self.u, step, self.u[None]), [f])
            f1 = self.evaluate(step, small)[0].detach()
            (d2,) = to_host(rms((f1 - f0) / tol))
        d2 = pace * d2 / h.clamp_min(1e-300)
        power = 2 if self.scheme.memory > 1 else self.scheme.order
        estimate = (0.01 / torch.maximum(d1, d2).clamp_min(1e-15)) ** (1 / power)
        return torch.minimum(torch.minimum(100 * h, estimate), far)

    def equal_steps(self, n: int) -> None:
        """All samples take n steps of equal length; nothing is read back from the device."""
        start, span = self.u, self.end - self.u
        every = torch.ones(len(self.samples), dtype=torch.bool)
        for k in range(1, n + 1) if len(self.samples) else ():
            t = self.end if k == n else start + span * (k / n)
            attempt = self.scheme.attempt(self.evaluate, self.equation.weigh, self.u, t, self.y, self.past)
            self.stats.steps[self.samples] += 1
            self.accept(every, t, attempt)
        self.leave(every)

    def step(self) -> None:
        """All samples attempt a step; those that arrive, or have used all their evaluations, leave."""
        if self.reached_limit():
            return
        s = self.u
        t = self.control.land(s, self.h, self.end)
        h = (t - s).abs()
        attempt = self.scheme.attempt(self.evaluate, self.equation.weigh, s, t, self.y, self.past)
        with torch.no_grad():
            tol = self.tolerance(t, self.y[0].detach(), attempt.y[0].detach())
            (E,) = to_host(self.equation.size(t, attempt, tol))
        finite = E.isfinite()
        E = torch.where(finite, E, math.inf)
        ok = E <= 1
        clock = torch.maximum(s.abs(), self.end.abs())
        broken = "The slopes are not finite; Denoiser(..., check_finite=True) shows where."
        self.fail(~finite & (h <= BROKEN * clock), broken, t - s, finite)
        too_small = ~ok & (h <= (ROUNDING * clock).clamp_min(self.control.lengths[0]))
        self.fail(too_small, "The step became too small: the tolerance cannot be met.", t - s, finite)
        self.h = (h * self.control.factor(E, self.errors, attempt.power)).clamp_max(self.control.lengths[1])
        self.errors = torch.where(ok, torch.stack([E.clamp_min(1e-10), self.errors[0]]), self.errors)
        self.stats.steps[self.samples[ok]] += 1
        self.stats.rejected[self.samples[~ok]] += 1
        self.accept(ok, t, attempt)
        self.leave(ok & (t == self.end))

    def accept(self, ok: Tensor, t: Tensor, attempt: Attempt) -> None:
        """Move the samples whose step was accepted, and call the observers."""
        if not bool(ok.any()):
            return
        every = bool(ok.all())
        good = ok.nonzero()[:, 0]
        on = None if every else good.to(self.y[0].device, non_blocking=True)
        y, f = attempt.y, attempt.f
        if f is None:
            if on is None:
                f = self.evaluate(t, y)
            else:
                part = self.evaluate_some(good, t[good], tuple(v[on] for v in y))
                f = tuple(old.index_copy(0, on, new) for old, new in zip(self.past.f[0], part, strict=True))
        where = None if every else ok.to(y[0].device, non_blocking=True)

        def choose(new: Parts, old: Parts) -> Parts:
            if where is None:
                return new
            return tuple(torch.where(wide(where, a), a, b) for a, b in zip(new, old, strict=True))

        past, s, before = self.past, self.u, self.y
        self.past = Past(
            [torch.where(ok, a, b) for a, b in zip([t, *past.u[:-1]], past.u, strict=True)],
            [choose(a, b) for a, b in zip([f, *past.f[:-1]], past.f, strict=True)],
            torch.where(ok, (past.count + 1).clamp_max(self.memory), past.count),
        )
        self.y = choose(y, before)
        self.u = torch.where(ok, t, s)
        self.add_nodes(ok)
        accepted = Accepted(self.samples[good], s[good], t[good], before, attempt, on)
        for observe in self.observers:
            observe(accepted)

    def add_nodes(self, ok: Tensor) -> None:
        """Record the new nodes of some samples."""
        if self.record is not None:
            at = ok.nonzero()[:, 0]
            on = at.to(self.y[0].device, non_blocking=True)
            self.record.add(self.samples[at], self.u[at], self.y[0][on], self.past.f[0][0][on])

    def reached_limit(self) -> bool:
        """Whether no sample may continue; samples that have used all their evaluations leave, or raise."""
        control = self.control
        over = self.stats.nfe[self.samples] + self.scheme.calls > control.max_nfe
        if not bool(over.any()):
            return False
        if control.limit is not None:
            limit = control.limit or f"`max_nfe` = {control.max_nfe} evaluations"
            self.fail(over, f"{limit} were not enough.", (self.end - self.u).sign() * self.h)
        self.leave(over)
        return not len(self.samples)

    def leave(self, who: Tensor) -> None:
        """Some samples leave the batch."""
        if not bool(who.any()):
            return
        self.stats.finished[self.samples[who]] = self.u[who] == self.end[who]
        self.done.append(self.part(who))
        stay = ~who
        if not bool(stay.any()):
            self.samples = self.samples[:0]
            return
        index = stay.nonzero()[:, 0]
        self.samples, self.y, self.u, self.past = self.part(stay)
        self.equation, self.scheme = self.equation.rows(index), self.scheme.rows(index)
        self.end, self.h, self.errors = self.end[stay], self.h[stay], self.errors[:, stay]

    def part(self, who: Tensor) -> tuple[Tensor, Parts, Tensor, Past]:
        """Numbers, states, clocks and slopes of some samples."""
        if bool(who.all()):
            return self.samples, self.y, self.u, self.past
        at = who.nonzero()[:, 0]
        on = at.to(self.y[0].device, non_blocking=True)
        past = Past(
            [u[at] for u in self.past.u],
            [tuple(v[on] for v in f) for f in self.past.f],
            self.past.count[at],
        )
        return self.samples[at], tuple(v[on] for v in self.y), self.u[at], past

    def fail(self, bad: Tensor, reason: str, dt: Tensor, finite: Tensor | None = None) -> None:
        """Raise an error about the first of the bad samples, if there is one."""
        if not bool(bad.any()):
            return
        i = int(bad.nonzero()[0, 0])
        here, there = (self.equation.time(u) for u in (self.u[i : i + 1], self.u[i : i + 1] + dt[i]))
        sample = int(self.samples[i])
        slopes = finite[i] if finite is not None else self.past.f[0][0][i].isfinite().all()
        raise SolverError(
            reason,
            t=float(here),
            dt=float(there - here),
            nfe=int(self.stats.nfe[sample]),
            worst_sample=sample,
            finite=bool(slopes),
        )

    def result(self) -> Run:
        """All samples in their first order."""
        if not self.done:
            self.done.append((self.samples, self.y, self.u, self.past))
        order = torch.cat([samples for samples, *_ in self.done]).argsort()
        on = order.to(self.y[0].device)

        def join(parts: Sequence[Parts]) -> Parts:
            return tuple(torch.cat(pieces)[on] for pieces in zip(*parts, strict=True))

        pasts = [past for *_, past in self.done]
        count = torch.cat([past.count for past in pasts])[order]
        nodes = torch.stack([torch.cat([past.u[j] for past in pasts])[order] for j in range(2)])
        nodes[1, count < 2] = math.nan
        return Run(
            y=join([y for _, y, _, _ in self.done]),
            u=torch.cat([u for _, _, u, _ in self.done])[order],
            f=(join([past.f[0] for past in pasts]), join([past.f[1] for past in pasts])),
            nodes=nodes,
            stats=self.stats,
            record=self.record,
        )


def rms(v: Tensor) -> Tensor:
    """Root mean square of each row, (B, ...) to (B,)."""
    return v.square().flatten(1).mean(1).sqrt() if v.ndim > 1 else v.abs()


def to_host(*values: Tensor) -> Tensor:
    """Tensors (B,) as one float64 tensor on the CPU; it is read back once."""
    return torch.stack(values).to("cpu", torch.float64)
