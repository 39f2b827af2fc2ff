"""What the time of a run goes into: the network, the updates of the states, and the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.gaussian import Gaussian
from scoresde.denoisers.modes import check_ready
from scoresde.denoisers.start import Start, as_start
from scoresde.noise.keyed import Noise
from scoresde.noise.streams import Stream
from scoresde.plan.run import outputs_at, run
from scoresde.plan.table import Plan
from scoresde.sampling.capture import Captured
from scoresde.sampling.solve import event_of, plan_for
from scoresde.solvers.rule import Solver

_WORTH = 1.05  # smallest gain in time for which a graph is recommended


@dataclass(frozen=True)
class Profile:
    """Times of a run in milliseconds; made by :func:`profile`. ``print(profile)`` says whether a CUDA graph pays.

    Arguments:
        nfe: Number of evaluations.
        device: Type of the device.
        total: Time of a run.
        network: Time of its evaluations alone.
        update: Time of the same run with a network of no cost: updates, normals and the loop.
        host: Time that the host needs to launch a run on a GPU; on the CPU, that of the loop on states of one number.
        graph: Time of a run as a CUDA graph, or None.
        reason: Reason why there is no graph; empty if there is one.
    """

    nfe: int
    device: str
    total: float
    network: float
    update: float
    host: float
    graph: float | None = None
    reason: str = ""

    @property
    def network_share(self) -> float:
        """Part of the run that the network takes, in [0, 1]."""
        return min(1.0, self.network / self.total)

    def __str__(self) -> str:
        numbers = (
            f"a run of {self.nfe} evaluations on {self.device}: {self.total:.3g} ms, network {self.network:.3g} ms, "
        )
        numbers += f"updates {self.update:.3g} ms, host {self.host:.3g} ms"
        numbers += "" if self.graph is None else f", as a graph {self.graph:.3g} ms"
        return f"{numbers}; {self.verdict}"

    @property
    def verdict(self) -> str:
        """What to do about it, in a sentence."""
        share = f"the network is {100 * self.network_share:.1f} % of the run"
        if self.graph is None:
            return f"{share}; no CUDA graph was measured: {self.reason}."
        gain = self.total / self.graph
        if gain < _WORTH:
            return f"{share}; a CUDA graph is {gain:.2f} times as fast: not worth it."
        return f"{share}; a CUDA graph is {gain:.2f} times as fast: use ss.sampling.capture."


@checked
def profile(
    model: AbstractDenoiser,
    shape: Sequence[int],
    solver: Solver | Plan | None = None,
    *,
    steps: int | None = None,
    nfe: int | None = None,
    grid: Tensor | Sequence[float] | Callable[..., Tensor] | None = None,
    t_start: float | None = None,
    t_end: float = 0.0,
    start: Start | Gaussian | None = None,
    repeats: int = 5,
) -> Profile:
    """Measure where the time of a run goes, and whether a CUDA graph shortens it.

    Every time is the median of several runs, each of which waits for the device.

    Arguments:
        model: Denoiser.
        shape: Shape of the samples, (B, *event).
        solver: Solver, plan, or None for :func:`default_solver`.
        steps: Number of steps, by default 20.
        nfe: Budget of evaluations, instead of `steps`.
        grid: Times, or a function that makes them.
        t_start: First time, by default T.
        t_end: Last time, by default 0.
        start: Distribution, dtype and device of the initial states.
        repeats: Number of measured runs.

    Example:
        >>> import scoresde as ss
        >>> model = ss.Denoiser(ss.nn.MLP(2, hidden=64).eval(), ss.VP(), predicts="v")
        >>> found = ss.sampling.profile(model, (8, 2), nfe=5, repeats=1)
        >>> found.nfe, found.network > 0
        (5, True)
    """
    check.integer("repeats", repeats, at_least=1)
    plan = plan_for(check_ready(model), solver, steps, nfe, grid, t_start, t_end, event=event_of(shape))
    begin, noise = as_start(start), Noise(0)
    with torch.no_grad():
        x = begin.draw(model, check.shape("shape", shape), plan.rows[0].t, noise)
        normals = noise.fork(Stream.STEPS) if plan.stochastic else None
        denoise = outputs_at(plan, model, x)
        device = x.device
        total, host = _times(lambda: run(plan, denoise or model.x0, x, normals), device, repeats)
        if denoise is not None:
            evaluate, n = denoise.evaluate, plan.nfe
            network, _ = _times(lambda: [evaluate(x, k) for k in range(n)], device, repeats)
            still = evaluate(x, 0)
            free = replace(denoise, evaluate=lambda x, n: still)
            update, _ = _times(lambda: run(plan, free, x, normals), device, repeats)
        else:
            at = [row.t for row in plan.rows if row.evaluates]
            network, _ = _times(lambda: [model.x0(x, t) for t in at], device, repeats)
            still = model.x0(x, at[0]) if at else x
            update, _ = _times(lambda: run(plan, lambda x, t: still, x, normals), device, repeats)
        if device.type == "cpu":
            host, _ = _times(lambda: run(plan, lambda x, t: x, x.new_ones(1, 1), normals and Noise(0)), device, repeats)
        captured = Captured(model, tuple(x.shape), plan, begin)
        graph = None
        if captured.mode == "graph":
            graph, _ = _times(lambda: captured(0, x=x), device, repeats)
    return Profile(plan.nfe, device.type, total, network, update, host, graph, captured.reason)


def _times(function: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, float]:
    """Median milliseconds of a call until the device is done, and until the host is done."""
    done, launched = [], []
    for k in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        function()
        back = time.perf_counter()
        _wait(device)
        if k:  # the first call chooses kernels and fills caches
            done.append(time.perf_counter() - start)
            launched.append(back - start)
    return 1e3 * statistics.median(done), 1e3 * statistics.median(launched)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
