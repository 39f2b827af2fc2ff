r"""Algebraically reversible solvers of the probability flow ODE, with exact inversion and constant-memory gradients.

The solver stores y = x/(α + σ) and a second state z, in the time variable τ = σ/(α + σ). Let Ψ_h be the increment of a
one-step method. A step is

.. math::
    y_{n+1} &= c\,y_n + (1-c)\,z_n + \Psi_h(\tau_n, z_n), \\
    z_{n+1} &= z_n - \Psi_{-h}(\tau_{n+1}, y_{n+1}),

which has the order of the one-step method. Its inverse is explicit:

.. math::
    z_n &= z_{n+1} + \Psi_{-h}(\tau_{n+1}, y_{n+1}), \\
    y_n &= c^{-1}\left(y_{n+1} - (1-c)\,z_n - \Psi_h(\tau_n, z_n)\right).

The inverse is exact up to rounding, for any network, number of steps and discretisation error.

References:
    | Efficient, Accurate and Stable Gradients for Neural ODEs (McCallum & Foster, 2024), arXiv:2410.11648
    | EDICT: Exact Diffusion Inversion via Coupled Transformations (Wallace et al., 2023), arXiv:2211.12446
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser, Counter, trainable
from scoresde.denoisers.modes import check_ready
from scoresde.grids.grid import check_grid
from scoresde.integrators.adaptive import slope
from scoresde.integrators.embedded import Frame
from scoresde.integrators.method import Method, Problem, Solution
from scoresde.noise.keyed import Noise
from scoresde.solvers.runge_kutta import MIDPOINT, Tableau


@checked
@dataclass(frozen=True)
class Reversible(Method):
    """Reversible solver of the probability flow along a grid with σ > 0, decreasing or increasing.

    The solution has two states, `x` and `companion`, which agree up to the error of the one-step method. :meth:`invert`
    recovers the initial states from both. A solve with ``grad="reversible"`` has the gradients of ``grad="full"`` with
    the memory of one step, because the inverse recomputes the states.

    Arguments:
        tableau: Butcher tableau of the one-step method; each stage costs two evaluations per step.
        coupling: Coupling c in (0, 1]. A smaller c damps the difference of the two states faster, but the inverse of n
            steps amplifies rounding by c⁻ⁿ.
        companion: Second state at the first time, (B, *event), such as that of a solution to continue; by default the
            initial state itself.

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.1)
        >>> times = ss.grids.karras(mix.sde, 20, t_end=mix.sde.t_min)
        >>> noise = torch.randn(4, 1, dtype=torch.float64)
        >>> solver = ss.integrators.Reversible()
        >>> solution = ss.solve(mix, noise, solver, grid=times)
        >>> bool((solver.invert(mix, solution).x - noise).abs().max() < 1e-10)
        True
    """

    grads = ("off", "full", "reversible")
    grid = "times"
    to_data = False

    tableau: Tableau = MIDPOINT
    coupling: float = 0.99
    companion: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check.number("coupling", self.coupling, above=0, at_most=1)

    def run(self, problem: Problem) -> Solution:
        if problem.times is None:
            raise ValueError("`problem` must have `times`, the grid of the solve.")
        flow = self._flow(problem.model, problem.times)
        with torch.set_grad_enabled(problem.grad != "off"):
            x = problem.draw(flow.times[0])
            start = flow.states(x, x if self.companion is None else check.match("companion", self.companion, "x", x), 0)
            if problem.grad == "reversible":
                inputs = trainable(problem.model)
                end = _States(*_Recomputed.apply(flow, *start, *inputs))  # type: ignore[no-untyped-call]
            else:
                end = flow.forward(start)
            x, companion = flow.outputs(end, -1)
        return problem.solution(x, flow.times, companion=companion)

    @checked
    def invert(
        self, model: AbstractDenoiser, solution: Solution, times: Tensor | Sequence[float] | None = None
    ) -> Solution:
        """Recover the initial states of a solve from its solution.

        Arguments:
            model: Denoiser of the solve.
            solution: Solution of this solver, with its `companion`.
            times: Grid of the solve in the same order, by default that of `solution`.

        Returns:
            Solution with both initial states; its times run backwards.
        """
        if solution.companion is None:
            raise ValueError("`solution` has no `companion`, so it cannot be inverted; solve with Reversible().")
        if solution.sde is not None and solution.sde != check_ready(model).sde:
            raise ValueError(
                f"`solution` is of a model on {solution.sde!r}, but `model` is on {model.sde!r}; give the model of the "
                f"solve."
            )
        counter = Counter()
        counted = model.counted(counter)
        flow = self._flow(counted, solution.times if times is None else times)
        problem = Problem(counted, solution.x, noise=Noise(solution.seed), counter=counter)
        with torch.no_grad():
            start = flow.backward(flow.states(solution.x, solution.companion, -1))
            x, companion = flow.outputs(start, 0)
        return problem.solution(x, flow.times[::-1], companion=companion)

    def _flow(self, model: AbstractDenoiser, times: Tensor | Sequence[float]) -> _Flow:
        sde = model.sde
        grid = torch.as_tensor(times, dtype=torch.float64)
        rising = len(grid) > 1 and bool(grid[0] < grid[1])
        grid = check_grid(sde, grid.flip(0)).flip(0) if rising else check_grid(sde, grid)
        if bool((sde.sigma(grid) == 0).any()):
            raise ValueError("`times` must have σ > 0 everywhere, as in ss.grids.karras(sde, n, t_end=sde.t_min).")
        frame = Frame(sde)
        u = frame.u(grid)
        scales = frame.scale(u).tolist()
        return _Flow(self, grid.tolist(), u.tolist(), scales, lambda u, y: slope(model, frame, u, y))


class _States(NamedTuple):
    """The two states of the solver, both in units of α + σ."""

    y: Tensor
    z: Tensor


@dataclass(frozen=True, eq=False)
class _Flow:
    """Discretised flow dy/du = field(u, y) on the grid u."""

    solver: Reversible
    times: list[float]
    u: list[float]
    scales: list[float]
    field: Callable[[float, Tensor], Tensor]

    def states(self, x: Tensor, companion: Tensor, node: int) -> _States:
        """States of the solver from x and its companion at a node."""
        scale = self.scales[node]
        return _States(check.state("x", x) / scale, check.state("companion", companion) / scale)

    def outputs(self, at: _States, node: int) -> tuple[Tensor, Tensor]:
        """x and its companion from the states of the solver at a node."""
        return at.y * self.scales[node], at.z * self.scales[node]

    def increment(self, u: float, h: float, y: Tensor) -> Tensor:
        """Increment Ψ_h of the one-step method at (u, y)."""
        tableau = self.solver.tableau
        slopes = [self.field(u, y)]
        for c, row in zip(tableau.c[1:], tableau.a, strict=True):
            stage = y
            for w, k in zip(row, slopes, strict=True):
                stage = torch.add(stage, k, alpha=h * w) if w else stage
            slopes.append(self.field(u + c * h, stage))
        total = torch.zeros_like(y)
        for w, k in zip(tableau.b, slopes, strict=True):
            total = torch.add(total, k, alpha=h * w) if w else total
        return total

    def step(self, n: int, at: _States) -> _States:
        u, v, c = self.u[n], self.u[n + 1], self.solver.coupling
        y = c * at.y + (1 - c) * at.z + self.increment(u, v - u, at.z)
        return _States(y, at.z - self.increment(v, u - v, y))

    def back(self, n: int, at: _States) -> _States:
        """Inverse of step n."""
        u, v, c = self.u[n], self.u[n + 1], self.solver.coupling
        z = at.z + self.increment(v, u - v, at.y)
        return _States((at.y - (1 - c) * z - self.increment(u, v - u, z)) / c, z)

    def forward(self, at: _States) -> _States:
        for n in range(len(self.u) - 1):
            at = self.step(n, at)
        return at

    def backward(self, at: _States) -> _States:
        for n in reversed(range(len(self.u) - 1)):
            at = self.back(n, at)
        return at


class _Context(Protocol):
    """Context of an autograd function."""

    flow: _Flow
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Recomputed(torch.autograd.Function):
    """Gradients with the memory of one step: the backward pass recomputes the states by inverse steps."""

    @staticmethod
    def forward(ctx: _Context, flow: _Flow, y: Tensor, z: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            end = flow.forward(_States(y, z))
        ctx.flow = flow
        ctx.save_for_backward(*end, *inputs)
        return end.y, end.z

    @staticmethod
    def backward(ctx: _Context, grad_y: Tensor, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        y, z, *inputs = ctx.saved_tensors
        at, grads = _States(y, z), (grad_y, grad_z)
        sums = [torch.zeros_like(v) for v in inputs]
        for n in reversed(range(len(ctx.flow.u) - 1)):
            with torch.no_grad():
                at = ctx.flow.back(n, at)
            with torch.enable_grad():
                start = _States(*(v.detach().requires_grad_() for v in at))
                end = ctx.flow.step(n, start)
                inner = torch.autograd.grad(end, (*start, *inputs), grads, allow_unused=True)
            grads = (inner[0], inner[1])
            for total, g in zip(sums, inner[2:], strict=True):
                if g is not None:
                    total += g
        return (None, *grads, *sums)
