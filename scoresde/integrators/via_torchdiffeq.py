r"""The probability flow of a denoiser as a problem for torchdiffeq, with any of its methods.

In t the flow of most processes is steep at data; other clocks make it smooth, flow time τ the most:

.. math:: \frac{dx}{dt} = \dot\alpha x_0 + \dot\sigma\varepsilon, \qquad
          \frac{d}{d\tau}\frac{x}{\alpha+\sigma} = \varepsilon - x_0, \qquad
          \frac{d}{d\rho}\frac{x}{\alpha} = \varepsilon, \qquad
          \tau = \frac{\sigma}{\alpha + \sigma},\ \rho = \frac{\sigma}{\alpha}.

torchdiffeq has one step for the whole batch; :class:`Adaptive` has one for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from scoresde import _checks as check
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.start import draw_start
from scoresde.integrators.adaptive import SolverError, refuse_ddp, slope
from scoresde.integrators.embedded import Frame
from scoresde.noise.keyed import Noise
from scoresde.solvers.interpolants import NOISE, VELOCITY

ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")

CLOCKS = ("tau", "t", "rho", "lam")

Event = Callable[[float, Tensor], Tensor]


@dataclass(frozen=True)
class ODESolution:
    """What :func:`torchdiffeq_solve` returns.

    Arguments:
        x: The result, (B, *event).
        nfe: Calls of the network.
        t: Time it is at: the end, or where the event happened.
        trajectory: States at the times that were asked for, by time.
        seed: The seed of the start.
    """

    x: Tensor
    nfe: int
    t: float
    trajectory: dict[float, Tensor] = field(repr=False)
    seed: int | tuple[int, ...] | None


def torchdiffeq_solve(
    model: AbstractDenoiser,
    shape_or_x: Sequence[int] | Tensor,
    method: str = "dopri5",
    *,
    clock: str = "tau",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    t_start: float | None = None,
    t_end: float = 0.0,
    coupling: str = "max",
    grad: str = "off",
    event: Event | None = None,
    save_at: Sequence[float] = (),
    max_nfe: int = 10_000,
    options: dict[str, Any] | None = None,
    seed: int | Sequence[int] | Noise | None = None,
    data_std: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    **cond: Any,
) -> ODESolution:
    """Follow the probability flow with torchdiffeq (``pip install torchdiffeq``), in either direction.

    Where σ(t_end) = 0 it stops at ``sde.t_min`` and returns E[x_0 | x], one more evaluation.

    Arguments:
        model: A denoiser.
        shape_or_x: Shape (B, *event) to start from the prior at `t_start`, or a state at `t_start`.
        method: Any method of torchdiffeq. Fixed-step ones need ``options={"step_size": …}``, in units of the clock.
        clock: ``"tau"``, flow time; ``"t"``; ``"rho"``, σ/α; ``"lam"``. Tolerances are for the state of the clock:
            x/(α + σ), x, x/α, x/(α + σ).
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        t_start: Where to start, by default T.
        t_end: Where to end.
        coupling: How the error of a batch is one number: ``"max"``, of its worst sample, so that each keeps its
            tolerance, or ``"mean"``, root mean square over everything, torchdiffeq's own, under which a hard sample
            among easy ones loses it.
        grad: ``"off"``, ``"full"``, or ``"adjoint"``: the continuous adjoint, whose memory does not grow with steps and
            whose gradients have the error of a second solve; parameters and conditions that require grad get theirs.
        event: ``(t, x) -> values``: the solve ends where one of them changes sign.
        save_at: Times between start and end whose states to keep.
        max_nfe: Calls of the network at most.
        options: torchdiffeq's own.
        seed: Of the start, see :func:`solve`.
        data_std: Standard deviation of the data, for the prior.
        dtype: Of the state, when a shape is given.
        device: Of the state, when a shape is given; by default the model's.
        **cond: Conditions, handed to the network.
    """
    import torchdiffeq

    check.conditions(cond, torchdiffeq_solve)
    check.choice("clock", clock, CLOCKS)
    check.choice("coupling", coupling, ("max", "mean"))
    check.choice("grad", grad, ("off", "full", "adjoint"))
    check.integer("max_nfe", max_nfe, at_least=1)
    noise = seed if isinstance(seed, Noise) else Noise(seed)
    sde = model.sde
    if method in ADAPTIVE:
        refuse_ddp(model)
    start = sde.T if t_start is None else check.number("t_start", t_start, above=0, at_most=sde.T)
    last = check.number("t_end", t_end, at_least=0, at_most=sde.T)
    clean = sde.sigma(last) == 0
    stop = min(sde.t_min, start) if clean else last
    with torch.set_grad_enabled(grad != "off"):
        x = draw_start(model, shape_or_x, start, noise, data_std, dtype, device)
        problem = FlowProblem(model, clock, start, stop, max_nfe, cond, waits=event is not None)
        norm = _Norm(coupling)
        times = [start, *problem.between(save_at), stop]
        how: dict[str, Any] = {"rtol": rtol, "atol": atol, "method": method}
        how["options"] = {"norm": norm, **(options or {})}
        ts = torch.tensor([problem.u(t) for t in times], dtype=torch.float64, device=x.device)
        if method in ADAPTIVE:
            how["options"].setdefault("step_t", ts[1:])  # no step reaches beyond an end
        else:
            ts = ts.to(x.dtype)
        if event is not None:
            if len(times) > 2:
                raise ValueError("`save_at` cannot be had together with `event`; solve again up to the event's time.")
            how["event_fn"] = lambda u, y: event(*problem.back(u, y))
        integrate = torchdiffeq.odeint
        if grad == "adjoint":
            integrate = torchdiffeq.odeint_adjoint
            given = [v for v in tree_leaves(cond) if isinstance(v, Tensor) and v.requires_grad]
            how["adjoint_params"] = (*(p for p in model.parameters() if p.requires_grad), *given)
        y = x / problem.scale(start)
        t = last
        if start == stop:
            states = y[None].expand(len(times), *y.shape)
        else:
            try:
                # scipy's methods know no callbacks, and say so
                asked = problem if method != "scipy_solver" else lambda u, y: problem(u, y)
                found = integrate(asked, y, ts, **how)
            except AssertionError as error:
                raise problem.failure(str(error), norm) from None
            states = found if event is None else found[1]
            if event is not None:
                t = problem.time(float(found[0]))
        kept = {s: states[i + 1] * problem.scale(s) for i, s in enumerate(times[1:-1])}
        out = states[-1] * problem.scale(t if event is not None else stop)
        if clean and event is None:
            out = model.x0(out, stop, **cond)
            problem.nfe += 1
    return ODESolution(out, problem.nfe, t, kept, noise.seed)


class FlowProblem(nn.Module):
    """The problem that torchdiffeq is given: dy/du, with u the clock and y = x/N its state.

    Arguments:
        model: A denoiser.
        clock: The clock.
        start: Time of the start.
        stop: Time of the end.
        max_nfe: Calls of the network at most.
        cond: Conditions for the network.
        waits: Whether the solve ends at an event, for which torchdiffeq would go on forever.
    """

    def __init__(
        self,
        model: AbstractDenoiser,
        clock: str,
        start: float,
        stop: float,
        max_nfe: int,
        cond: dict[str, Any],
        waits: bool = False,
    ) -> None:
        super().__init__()
        sde = model.sde
        ends = sorted((start, stop))
        if sde.sigma(ends[0]) == 0:
            raise ValueError(f"t = {ends[0]:g} has no noise to see; start at a positive time such as {sde.t_min:g}.")
        if sde.alpha(ends[1]) == 0 and clock in ("rho", "lam"):
            raise ValueError(f"`clock`={clock!r} is infinite at t = {ends[1]:g}, where α = 0; take 'tau', or 't'.")
        self.model, self.clock, self.cond, self.max_nfe = model, clock, cond, max_nfe
        self.start, self.stop, self.waits = start, stop, waits
        self.frame = None if clock == "t" else Frame(sde, NOISE if clock == "rho" else VELOCITY, clock == "lam")
        self.nfe = 0
        self._at: tuple[float, float] = (start, 0.0)
        self._ends = self.u(start), self.u(stop)
        self._state: Tensor | None = None

    def u(self, t: float) -> float:
        """The clock at time t."""
        return t if self.frame is None else float(self.frame.u(torch.tensor([t], dtype=torch.float64)))

    def time(self, u: float) -> float:
        """The time at clock u; the ends come back exactly."""
        if u in self._ends:
            return (self.start, self.stop)[self._ends.index(u)]
        return u if self.frame is None else float(self.frame.t(torch.tensor([u], dtype=torch.float64)))

    def scale(self, t: float) -> float:
        """N, of which the state is one."""
        if self.frame is None:
            return 1.0
        sde = self.model.sde
        return sde.alpha(t) if self.clock == "rho" else sde.alpha(t) + sde.sigma(t)

    def back(self, u: Tensor, y: Tensor) -> tuple[float, Tensor]:
        """Time and x."""
        t = self.time(float(u))
        return t, y * self.scale(t)

    def between(self, save_at: Sequence[float]) -> list[float]:
        """The times to keep, in the order they are passed."""
        low, high = sorted((self.start, self.stop))
        for t in save_at:
            if not low < float(t) < high:
                raise ValueError(f"`save_at` must name times inside ({low:g}, {high:g}), got {t!r}.")
        return sorted({float(t) for t in save_at}, reverse=self.start > self.stop)

    def forward(self, u: Tensor, y: Tensor) -> Tensor:
        """dy/du."""
        if self.nfe >= self.max_nfe:
            raise self.failure(f"`max_nfe` = {self.max_nfe} evaluations were not enough.", None)
        self.nfe += 1
        clock = self._inside(float(u.detach()))
        if self.frame is None:
            return self.model.velocity(y, self.time(clock), **self.cond)
        return slope(self.model, self.frame, clock, y, self.time(clock), **self.cond)

    def _inside(self, u: float) -> float:
        """u, or the end that it lies beyond: by rounding, or where torchdiffeq tries how steep the slope is."""
        low, high = sorted(self._ends)
        return min(max(u, low), high)

    def callback_step(self, u: Tensor, y: Tensor, du: Tensor) -> None:
        """Remember where each step starts."""
        self._at = float(u.detach()), float(du.detach())
        self._state = y.detach()
        if self.waits and self._inside(self._at[0]) == self._ends[1]:
            raise self.failure("The event had not happened at the end.", None)

    def failure(self, reason: str, norm: _Norm | None) -> SolverError:
        """The error that says where."""
        u, du = self._at
        here = self.time(self._inside(u))
        there = self.time(self._inside(u + du if self._ends[0] < self._ends[1] else u - du))
        bad = torch.zeros(1) if self._state is None else (~self._state.isfinite()).flatten(1).any(1).cpu().double()
        ratio = bad if norm is None or norm.last is None else norm.last.cpu().double()
        finite = bool(ratio.isfinite().all()) and not bool(bad.any())
        worst = int(ratio.nan_to_num(nan=float("inf")).argmax())
        reason = f"torchdiffeq gave up ({reason})." if norm is not None else reason
        return SolverError(reason, t=here, dt=there - here, nfe=self.nfe, worst_sample=worst, finite=finite)


class _Norm:
    """The error of a batch as one number; remembers that of each sample."""

    def __init__(self, coupling: str) -> None:
        self.coupling = coupling
        self.last: Tensor | None = None

    def __call__(self, e: Tensor) -> Tensor:
        square = e.detach().square().flatten(1).mean(1) if e.ndim > 1 else e.detach().square()
        self.last = square.sqrt()
        return square.max().sqrt() if self.coupling == "max" else square.mean().sqrt()
