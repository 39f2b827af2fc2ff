r"""The probability flow with error control: the method :class:`Adaptive`.

The state is :math:`y = x/N(\alpha, \sigma)` and the clock is that of the prediction, see
:class:`~scoresde.integrators.embedded.Frame`. Tolerances and the lengths of steps are in
:mod:`scoresde.integrators.control`. The loop over steps, which accepts or rejects them, is in
:mod:`scoresde.integrators.loop`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._progress import Bar
from scoresde.denoisers.base import AbstractDenoiser, Counter
from scoresde.denoisers.distributed import refuse_ddp
from scoresde.integrators.control import Control
from scoresde.integrators.embedded import Adams, Frame, Pair, Parts, advance, on_device, wide
from scoresde.integrators.loop import Accepted, Equation, Observer, Run, integrate
from scoresde.integrators.method import Method, Problem, Solution
from scoresde.processes.sde import SDE


@checked
@dataclass(frozen=True)
class Adaptive(Method):
    """The probability flow with error control for each sample; a method of ``ss.solve``, ``ss.encode``, ``ss.decode``.

    Where σ(t_end) = 0, the steps end at ``sde.t_min``. The rest is one step without evaluation that extrapolates the
    slope: E[x_0 | x], corrected by its change over the last step.

    Arguments:
        pair: Embedded pair. The default evaluates the network once a step.
        rtol: Relative tolerance of a step.
        atol: Absolute tolerance of a step, in units of x/(α + σ), which is of the size of the data at t = 0 and of the
            noise at T.
        max_nfe: Number of evaluations that a sample may use.
        on_limit: ``"raise"`` raises a :class:`SolverError` at that limit. ``"return"`` takes the rest of the way in one
            step of first order; ``Solution.stats.finished`` tells which samples arrived without it.
        pid: Gains (P, I, D) of the step control; (0, 1, 0) is the elementary one.
        safety: Factor κ of every new step.
        first_step: First step in the clock of the pair; None estimates it with one evaluation.
        dense: Whether ``Solution.path`` interpolates the solution; stores two states for each step.

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.1)
        >>> solution = ss.solve(mix, (4, 1), ss.Adaptive(rtol=1e-3, atol=1e-3), seed=0)
        >>> solution.x.shape, bool(solution.stats.finished.all())
        (torch.Size([4, 1]), True)

    References:
        | Digital filters in adaptive time-stepping (Söderlind, 2003)
        | torchode: A Parallel ODE Solver for PyTorch (Lienen & Günnemann, 2022), arXiv:2210.12375
    """

    grads = ("off", "full", "checkpoint")
    watches = ("save_at", "save_device", "progress")

    pair: Pair = field(default_factory=Adams)
    rtol: float = 1e-3
    atol: float = 1e-3
    max_nfe: int = 1000
    on_limit: str = "raise"
    pid: tuple[float, float, float] = (0.2, 0.7, 0.0)
    safety: float = 0.8
    first_step: float | None = None
    dense: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.pair, Pair):
            raise TypeError(
                f"`pair` must be a pair such as integrators.Adams() or integrators.DPM23(), got {self.pair!r:.80}."
            )
        check_tolerances(self.rtol, self.atol)
        check.integer("max_nfe", self.max_nfe, at_least=1)
        check.choice("on_limit", self.on_limit, ("raise", "return"))
        if len(self.pid) != 3:
            raise ValueError(f"`pid` must be three gains (P, I, D), got {self.pid}.")
        check.number("safety", self.safety, above=0, at_most=1)
        if self.first_step is not None:
            check.number("first_step", self.first_step, above=0)

    @property
    def control(self) -> Control:
        """Tolerances, limits and gains, as :func:`~scoresde.integrators.loop.integrate` needs them."""
        return Control(
            self.rtol,
            self.atol,
            self.pid,
            self.safety,
            first_step=self.first_step,
            max_nfe=self.max_nfe,
            limit="" if self.on_limit == "raise" else None,
        )

    def run(self, problem: Problem) -> Solution:
        refuse_ddp(problem.model)
        sde, watch = problem.model.sde, problem.watch
        frame = Frame(sde, self.pair.prediction, self.pair.in_lam)
        start, end = self._ends(sde, problem.t_start, problem.t_end)
        times = save_times(watch.save_at)
        x = problem.draw(start)
        clean = sde.sigma(end) == 0
        u, v = (frame.u(torch.full((len(x),), t, dtype=torch.float64)) for t in (start, clean_stop(sde, start, end)))
        with Bar(watch.progress, 1.0, type(self.pair).__name__, "run") as bar:
            run = integrate(
                FlowEquation(problem, frame),
                x / wide(on_device(frame.scale(u), x), x),
                u,
                v,
                self.pair,
                self.control,
                observers=progress(bar, u, v) if watch.progress else (),
                dense=self.dense or bool(times),
            )
        path = None
        if run.record is not None and len(x):
            path = run.record.path(2 if self.pair.order <= 3 else 3, frame.rate, frame)
        return problem.solution(
            _arrive(frame, run, end, clean),
            [start, end],
            stats=run.stats,
            path=path if self.dense else None,
            trajectory={} if path is None else {t: path(t).to(watch.save_device) for t in times},
        )

    def _ends(self, sde: SDE, t_start: float | None, t_end: float) -> tuple[float, float]:
        """First and last time, where the pair is defined."""
        start = sde.T if t_start is None else check.number("t_start", t_start, at_least=0, at_most=sde.T)
        end = check.number("t_end", t_end, at_least=0, at_most=sde.T)
        if sde.sigma(start) == 0:
            raise ValueError(
                f"`t_start` = {start:g} has σ = 0, where the flow has no noise to start from; start at a positive time "
                f"such as `sde.t_min` = {sde.t_min:g}."
            )
        if min(sde.alpha(start), sde.alpha(end)) == 0 and (self.pair.in_lam or self.pair.prediction.needs_signal):
            raise ValueError(
                f"{self.pair!r:.60} cannot start or end where α = 0, as {type(sde).__name__} does at T = {sde.T:g}; "
                f"use a pair for the velocity in its own clock, such as the default, or another time, such as "
                f"{0.999 * sde.T:g}."
            )
        return start, end


@checked
def flow(model: AbstractDenoiser, x: Tensor, s: float, t: float, rule: Adaptive | None = None) -> Solution:
    """Follow the probability flow from time s to time t, in either direction, with error control for each sample.

    Arguments:
        model: Denoiser.
        x: State at time s, (B, *event).
        s: Initial time.
        t: Target time.
        rule: Pair, tolerances and limits, by default ``Adaptive()``.
    """
    rule = Adaptive() if rule is None else rule
    counter = Counter()
    return rule.run(Problem(model.counted(counter), check.state("x", x), s, t, counter=counter))


@dataclass(frozen=True)
class FlowEquation(Equation):
    """The probability flow of a denoiser in the state and the clock of a frame.

    Arguments:
        problem: Problem with the denoiser and its gradient mode.
        frame: Definition of y and u.
    """

    problem: Problem
    frame: Frame

    def slopes(self, u: Tensor, y: Parts) -> Parts:
        frame, x = self.frame, y[0]
        at = frame.point(u)
        N, p, q = (fn(at.alpha, at.sigma) for fn in (frame.prediction.scale, frame.prediction.p, frame.prediction.q))
        scale, of_x, of_d = on_device(torch.stack([N, p, q]), x)
        state = x * wide(scale, x)
        d = self.problem.denoise(state, at.t if x.device.type == "cpu" else on_device(at.t, x))
        return (wide(of_x, x) * state + wide(of_d, x) * d,)

    def rows(self, index: Tensor) -> FlowEquation:
        return replace(self, problem=replace(self.problem, model=self.problem.model.rows(index)))

    def weigh(self, s: Tensor, t: Tensor, nodes: Tensor) -> Tensor:
        return self.frame.weigh(s, t, nodes)

    def rate(self, u: Tensor) -> Tensor:
        return self.frame.rate(u)

    def unit(self, u: Tensor) -> Tensor:
        if self.frame.prediction.name == "velocity":
            return torch.ones_like(u)
        lam = u if self.frame.in_lam else self.frame.prediction.lam_of_clock(u)
        one, rho = torch.ones_like(lam), (-lam).exp()
        return self.frame.prediction.scale(one, rho) / (1 + rho)

    def time(self, u: Tensor) -> Tensor:
        return self.frame.t(u)


def slope(model: AbstractDenoiser, frame: Frame, u: float, y: Tensor, t: float | None = None) -> Tensor:
    """dy/du of the probability flow at one clock for all samples, with y = x/N.

    Arguments:
        model: Denoiser.
        frame: Definition of y and u.
        u: Clock, a number.
        y: State, (B, *event).
        t: Time at `u`, if it is known.
    """
    at = frame.point(torch.tensor([u], dtype=torch.float64))
    N, p, q = (float(fn(at.alpha, at.sigma)) for fn in (frame.prediction.scale, frame.prediction.p, frame.prediction.q))
    rate = float(frame.rate(torch.tensor([u], dtype=torch.float64)))
    d = model.x0(y * N, float(at.t) if t is None else t)
    return torch.add(y * (rate * p * N), d, alpha=rate * q)


def _arrive(frame: Frame, run: Run, end: float, clean: bool) -> Tensor:
    """State at `end`: extrapolated over the interval below ``t_min``, and for samples that reached their limit."""
    (y,), u, f = run.y, run.u, run.f
    one = torch.ones_like(u)
    if clean and frame.in_lam:  # λ is infinite at σ = 0, where the state is the data prediction
        at = frame.point(u)
        N, p, q = (fn(at.alpha, at.sigma) for fn in (frame.prediction.scale, frame.prediction.p, frame.prediction.q))
        of_y, of_f = on_device(torch.stack([-p * N / q, 1 / q]), y)
        return wide(of_y, y) * y + wide(of_f, y) * f[0][0]
    v = frame.u(end * one)
    if clean or not bool(run.stats.finished.all()):
        w = torch.stack([frame.weigh(u, v, u[None])[0], torch.zeros_like(u)])
        if clean:
            known = run.stats.finished & run.nodes[1].isfinite()
            both = frame.weigh(u, v, torch.stack([u, torch.where(known, run.nodes[1], u + 1)]))
            w = torch.where(known, both, w)
        (y,) = advance((y,), w, f)
    return y * wide(on_device(frame.scale(v), y), y)


def clean_stop(sde: SDE, start: float, end: float) -> float:
    """Last time of the steps: ``sde.t_min`` where σ(end) = 0, otherwise `end`."""
    return min(sde.t_min, start) if sde.sigma(end) == 0 else end


def save_times(save_at: str | Sequence[float]) -> list[float]:
    """Times of ``Watch.save_at``, which must be numbers."""
    if isinstance(save_at, str):
        raise ValueError("`save_at` must be times, not 'all', because each sample has steps of its own.")
    return [float(t) for t in save_at]


def check_tolerances(rtol: float, atol: float) -> None:
    """Raise an error unless both tolerances are at least 0, and one of them is positive."""
    check.number("rtol", rtol, at_least=0)
    check.number("atol", atol, at_least=0)
    if rtol + atol == 0:
        raise ValueError("`rtol` and `atol` must not both be 0, because every step has an error.")


def progress(bar: Bar, start: Tensor, end: Tensor) -> list[Observer]:
    """Observer that moves a bar by the share of the clock that the samples have passed.

    Arguments:
        bar: Bar from 0 to 1.
        start: First clock of each sample, (B,).
        end: Last clock of each sample, (B,).
    """
    done = torch.zeros_like(start)

    def observe(step: Accepted) -> None:
        span = (end - start)[step.samples]
        done[step.samples] = torch.where(span == 0, 1.0, (step.t - start[step.samples]) / span)
        bar.to(round(float(done.mean()), 3))

    return [observe]
