r"""The probability flow of a denoiser, solved by torchdiffeq with any of its methods.

In t the flow of most processes is steep near data. Other clocks make it smooth, flow time τ the most:

.. math:: \frac{dx}{dt} = \dot\alpha x_0 + \dot\sigma\varepsilon, \qquad
          \frac{d}{d\tau}\frac{x}{\alpha+\sigma} = \varepsilon - x_0, \qquad
          \frac{d}{d\rho}\frac{x}{\alpha} = \varepsilon, \qquad
          \tau = \frac{\sigma}{\alpha + \sigma},\ \rho = \frac{\sigma}{\alpha}.

torchdiffeq takes one step for the whole batch; :class:`Adaptive` takes one for each sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser, trainable
from scoresde.denoisers.distributed import refuse_ddp
from scoresde.integrators.adaptive import slope
from scoresde.integrators.embedded import Frame
from scoresde.integrators.loop import SolverError
from scoresde.integrators.method import Method, Problem, Solution
from scoresde.solvers.interpolants import NOISE, VELOCITY

ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")

CLOCKS = ("tau", "t", "rho", "lam")

Event = Callable[[float, Tensor], Tensor]


@checked
@dataclass(frozen=True)
class TorchDiffEq(Method):
    """Solve the probability flow with torchdiffeq (``pip install torchdiffeq``), in either direction.

    Where σ(t_end) = 0, the solve stops at ``sde.t_min`` and returns E[x_0 | x] there, with one more evaluation. A solve
    with ``grad="adjoint"`` uses the continuous adjoint: its memory does not grow with the steps, its gradients
    have the error of a second solve, and parameters and conditions that require grad receive theirs.

    Arguments:
        method: Name of the method in torchdiffeq. Methods with fixed steps need ``options={"step_size": …}``, in units
            of the clock.
        clock: Time variable: ``"tau"`` (flow time), ``"t"``, ``"rho"`` (σ/α) or ``"lam"``. The state that the
            tolerances refer to is x/(α + σ), x, x/α or x/(α + σ).
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        coupling: Error norm of a batch: ``"max"``, that of the sample with the largest error, so that every sample
            meets the tolerance; or ``"mean"``, torchdiffeq's own, the root mean square over the batch, under which a
            difficult sample among easy ones exceeds the tolerance.
        event: Function ``(t, x) -> values``. The solve ends at the first time at which one of the values changes sign;
            this time is the last entry of ``Solution.times``.
        max_nfe: Largest number of evaluations of the denoiser.
        options: Options of the method in torchdiffeq.

    References:
        | Neural Ordinary Differential Equations (Chen et al., 2018), arXiv:1806.07366

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.1)
        >>> solution = ss.solve(mix, (4, 1), ss.integrators.TorchDiffEq("bosh3", rtol=1e-3, atol=1e-3), seed=0)
        >>> solution.times, bool(((solution.x.abs() - 1).abs() < 0.5).all())
        ([1.0, 0.0], True)
    """

    grads = ("off", "full", "adjoint")
    watches = ("save_at", "save_device")

    method: str = "dopri5"
    clock: str = "tau"
    rtol: float = 1e-5
    atol: float = 1e-5
    coupling: str = "max"
    event: Event | None = None
    max_nfe: int = 10_000
    options: Mapping[str, object] | None = None

    def __post_init__(self) -> None:
        check.choice("clock", self.clock, CLOCKS)
        check.choice("coupling", self.coupling, ("max", "mean"))
        check.number("rtol", self.rtol, at_least=0)
        check.number("atol", self.atol, at_least=0)
        check.integer("max_nfe", self.max_nfe, at_least=1)

    def run(self, problem: Problem) -> Solution:
        sde, watch = problem.model.sde, problem.watch
        if self.method in ADAPTIVE:
            refuse_ddp(problem.model)
        start = sde.T if problem.t_start is None else check.number("t_start", problem.t_start, above=0, at_most=sde.T)
        end = check.number("t_end", problem.t_end, at_least=0, at_most=sde.T)
        clean = sde.sigma(end) == 0
        stop = min(sde.t_min, start) if clean else end
        if self.event is not None and watch.save_at:
            raise ValueError("`save_at` has no meaning with `event`; solve again up to the time of the event.")
        with torch.set_grad_enabled(problem.grad != "off"):
            x = problem.draw(start)
            flow = FlowProblem(problem.model, self.clock, start, stop, self.max_nfe, has_event=self.event is not None)
            times = [start, *flow.between(watch.save_at), stop]
            states, last = self._integrate(flow, x / flow.scale(start), times, problem.grad == "adjoint")
            inner = zip(times[1:-1], states[1:-1], strict=True)
            trajectory = {t: (y * flow.scale(t)).to(watch.save_device) for t, y in inner}
            x = states[-1] * flow.scale(last)
            if self.event is None:
                x = problem.denoise(x, stop) if clean else x
                last = end
        return problem.solution(x, [start, last], trajectory=trajectory)

    def _integrate(self, flow: FlowProblem, y: Tensor, times: list[float], adjoint: bool) -> tuple[Tensor, float]:
        """States at all times, or at the start and the event; and the last time."""
        import torchdiffeq

        if times[0] == times[-1]:
            return y[None].expand(len(times), *y.shape), times[-1]
        norm, event = _Norm(self.coupling), self.event
        u = torch.tensor([flow.u(t) for t in times], dtype=torch.float64, device=y.device)
        options: dict[str, object] = {"norm": norm, **(self.options or {})}
        if self.method in ADAPTIVE:
            options.setdefault("step_t", u[1:])  # no step passes one of these times
        else:
            u = u.to(y.dtype)
        arguments: dict[str, object] = {"rtol": self.rtol, "atol": self.atol, "method": self.method, "options": options}
        if adjoint:
            arguments["adjoint_params"] = trainable(flow.model)
        if event is not None:
            arguments["event_fn"] = lambda u, y: event(*flow.at(u, y))
        integrate = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
        # torchdiffeq warns if a problem with callbacks is solved by scipy, which has none
        derivative = flow if self.method != "scipy_solver" else lambda u, y: flow(u, y)
        try:
            result = integrate(derivative, y, u, **arguments)
        except AssertionError as error:
            raise flow.failure(str(error), norm) from None
        if event is None:
            return result, times[-1]
        return result[1], flow.time(float(result[0]))


class FlowProblem(nn.Module):
    """The differential equation that torchdiffeq solves: dy/du, with clock u and state y = x/N.

    Arguments:
        model: Denoiser.
        clock: Time variable, as in :class:`TorchDiffEq`.
        start: First time.
        stop: Last time.
        max_nfe: Largest number of evaluations of the denoiser.
        has_event: Whether the solve ends at an event. If the event does not happen before `stop`, the solve ends with
            an error; torchdiffeq alone would continue forever.
    """

    def __init__(
        self, model: AbstractDenoiser, clock: str, start: float, stop: float, max_nfe: int, *, has_event: bool = False
    ) -> None:
        super().__init__()
        sde = model.sde
        ends = sorted((start, stop))
        if sde.sigma(ends[0]) == 0:
            raise ValueError(f"σ = 0 at t = {ends[0]:g}; start at a positive time such as {sde.t_min:g}.")
        if sde.alpha(ends[1]) == 0 and clock in ("rho", "lam"):
            raise ValueError(f"`clock`={clock!r} is infinite at t = {ends[1]:g}, where α = 0; take 'tau', or 't'.")
        self.model, self.clock, self.max_nfe = model, clock, max_nfe
        self.start, self.stop, self.has_event = start, stop, has_event
        self.frame = None if clock == "t" else Frame(sde, NOISE if clock == "rho" else VELOCITY, clock == "lam")
        self.nfe = 0
        self._ends = self.u(start), self.u(stop)
        self._step: tuple[float, float] = (self._ends[0], 0.0)  # start and length of the current step
        self._state: Tensor | None = None
        self._slope: Tensor | None = None  # of the last evaluation

    def u(self, t: float) -> float:
        """Clock at time t."""
        return t if self.frame is None else float(self.frame.u(torch.tensor([t], dtype=torch.float64)))

    def time(self, u: float) -> float:
        """Time at clock u; exact at both ends."""
        if u in self._ends:
            return (self.start, self.stop)[self._ends.index(u)]
        return u if self.frame is None else float(self.frame.t(torch.tensor([u], dtype=torch.float64)))

    def scale(self, t: float) -> float:
        """Scale N of the state y = x/N."""
        if self.frame is None:
            return 1.0
        sde = self.model.sde
        return sde.alpha(t) if self.clock == "rho" else sde.alpha(t) + sde.sigma(t)

    def at(self, u: Tensor, y: Tensor) -> tuple[float, Tensor]:
        """Time t and state x of a clock and its state."""
        t = self.time(float(u))
        return t, y * self.scale(t)

    def between(self, save_at: str | Sequence[float]) -> list[float]:
        """The times of `save_at` in the order in which the solve passes them."""
        low, high = sorted((self.start, self.stop))
        if isinstance(save_at, str):
            raise ValueError("`save_at` must be times, because torchdiffeq chooses its own steps, got 'all'.")
        for t in save_at:
            if not low < float(t) < high:
                raise ValueError(f"`save_at` must name times inside ({low:g}, {high:g}), got {t!r}.")
        return sorted({float(t) for t in save_at}, reverse=self.start > self.stop)

    def forward(self, u: Tensor, y: Tensor) -> Tensor:
        """dy/du."""
        if self.nfe >= self.max_nfe:
            raise self.failure(f"`max_nfe` = {self.max_nfe} evaluations were not enough.", None)
        self.nfe += 1
        if not math.isfinite(float(u.detach())):  # a length of the first step from slopes that are not finite
            self._state = self._slope
            raise self.failure("The slope at the start is not finite.", None)
        clock = self._inside(float(u.detach()))
        if self.frame is None:
            out = self.model.velocity(y, self.time(clock))
        else:
            out = slope(self.model, self.frame, clock, y, self.time(clock))
        self._slope = out.detach()
        return out

    def _inside(self, u: float) -> float:
        """The nearest clock between the ends; torchdiffeq passes them by rounding, and when it sets the first step."""
        low, high = sorted(self._ends)
        return min(max(u, low), high)

    def callback_step(self, u: Tensor, y: Tensor, du: Tensor) -> None:
        """Store the start of each step, for errors."""
        self._step = float(u.detach()), float(du.detach())
        self._state = y.detach()
        if self.has_event and self._inside(self._step[0]) == self._ends[1]:
            raise self.failure("The event had not happened at the end.", None)

    def failure(self, reason: str, norm: _Norm | None) -> SolverError:
        """The error with its time, step and sample.

        Arguments:
            reason: Reason of the failure.
            norm: Error norm of the solve, if torchdiffeq raised the error.
        """
        u, du = self._step
        here = self.time(self._inside(u))
        there = self.time(self._inside(u + du if self._ends[0] < self._ends[1] else u - du))
        bad = torch.zeros(1) if self._state is None else (~self._state.isfinite()).flatten(1).any(1).cpu().double()
        ratio = bad if norm is None or norm.last is None else norm.last.cpu().double()
        finite = bool(ratio.isfinite().all()) and not bool(bad.any())
        worst = int(ratio.nan_to_num(nan=float("inf")).argmax())
        reason = f"torchdiffeq gave up ({reason})." if norm is not None else reason
        return SolverError(reason, t=here, dt=there - here, nfe=self.nfe, worst_sample=worst, finite=finite)


class _Norm:
    """Error norm of a batch; stores the norm of each sample in `last`."""

    def __init__(self, coupling: str) -> None:
        self.coupling = coupling
        self.last: Tensor | None = None

    def __call__(self, e: Tensor) -> Tensor:
        square = e.detach().square().flatten(1).mean(1) if e.ndim > 1 else e.detach().square()
        self.last = square.sqrt()
        return square.max().sqrt() if self.coupling == "max" else square.mean().sqrt()
