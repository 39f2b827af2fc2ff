r"""Algebraically reversible solvers of the probability flow ODE, with exact inversion and constant-memory gradients.

The solver holds y = x/(α + σ) and a second state z, in the time variable τ = σ/(α + σ). Let Ψ_h be the increment of a
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
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from scoresde import _checks as check
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.grids.grid import check_grid
from scoresde.integrators.adaptive import slope
from scoresde.integrators.embedded import Frame
from scoresde.solvers.runge_kutta import MIDPOINT, Tableau


class Twin(NamedTuple):
    """The two states of a reversible solver; they agree up to the error of the one-step method.

    Arguments:
        x: State, (B, *event).
        z: Second state, (B, *event), required for the exact inverse.
    """

    x: Tensor
    z: Tensor


@dataclass(frozen=True)
class Reversible:
    """Reversible solver: :meth:`solve` runs the steps, and :meth:`invert` with the same times undoes them.

    Arguments:
        tableau: Butcher tableau of the one-step method; each stage costs two evaluations per step.
        coupling: Coupling c in (0, 1]. A smaller c damps the difference of the two states faster, but the inverse of n
            steps amplifies rounding by c⁻ⁿ.

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.1)
        >>> times = ss.grids.karras(mix.sde, 20, t_end=mix.sde.t_min)
        >>> noise = torch.randn(4, 1, dtype=torch.float64)
        >>> twin = ss.integrators.Reversible().solve(mix, noise, times)
        >>> back = ss.integrators.Reversible().invert(mix, twin, times)
        >>> bool((back.x - noise).abs().max() < 1e-10)
        True
    """

    tableau: Tableau = MIDPOINT
    coupling: float = 0.99

    def __post_init__(self) -> None:
        check.number("coupling", self.coupling, above=0, at_most=1)

    def solve(
        self,
        model: AbstractDenoiser,
        x: Tensor | Twin,
        times: Tensor | Sequence[float],
        *,
        grad: str = "off",
        **cond: Any,
    ) -> Twin:
        """Solve the probability flow along `times`.

        Arguments:
            model: A denoiser.
            x: State (B, *event) at the first time, or a :class:`Twin`.
            times: Times with σ > 0, decreasing or increasing.
            grad: ``"off"``, ``"full"``, or ``"reversible"``, which gives the same gradients with the memory of one
                step: the inverse recomputes the states.
            **cond: Conditions for the network.
        """
        check.conditions(cond, Reversible.solve)
        check.choice("grad", grad, ("off", "full", "reversible"))
        flow = self._flow(model, times, cond)
        y = self._to_flow(flow, x, 0)
        with torch.set_grad_enabled(grad != "off"):
            if grad == "reversible":
                leaves = [*model.parameters(), *(v for v in tree_leaves(cond) if isinstance(v, Tensor))]
                inputs = [v for v in leaves if v.requires_grad]
                y = Twin(*_Recomputed.apply(flow, *y, *inputs))  # type: ignore[no-untyped-call]
            else:
                y = flow.forward(y)
        return self._from_flow(flow, y, -1)

    def invert(self, model: AbstractDenoiser, twin: Twin, times: Tensor | Sequence[float], **cond: Any) -> Twin:
        """Recover the initial states of :meth:`solve` from its result.

        Arguments:
            model: Denoiser passed to :meth:`solve`.
            twin: Result of :meth:`solve`.
            times: Times passed to :meth:`solve`, in the same order.
            **cond: Conditions passed to :meth:`solve`.
        """
        check.conditions(cond, Reversible.invert)
        flow = self._flow(model, times, cond)
        with torch.no_grad():
            return self._from_flow(flow, flow.backward(self._to_flow(flow, twin, -1)), 0)

    def _flow(self, model: AbstractDenoiser, times: Any, cond: dict[str, Any]) -> _Flow:
        sde = model.sde
        grid = torch.as_tensor(times, dtype=torch.float64)
        rising = len(grid) > 1 and bool(grid[0] < grid[1])
        grid = check_grid(sde, grid.flip(0)).flip(0) if rising else check_grid(sde, grid)
        if bool((sde.sigma(grid) == 0).any()):
            raise ValueError("`times` must have σ > 0 everywhere, as in ss.grids.karras(sde, n, t_end=sde.t_min).")
        frame = Frame(sde)
        return _Flow(self, frame, frame.u(grid), lambda u, y: slope(model, frame, u, y, **cond))

    def _to_flow(self, flow: _Flow, x: Tensor | Twin, end: int) -> Twin:
        pair = Twin(x, x) if isinstance(x, Tensor) else x
        scale = float(flow.frame.scale(flow.u[end, None]))
        return Twin(*(check.state("x", v) / scale for v in pair))

    def _from_flow(self, flow: _Flow, y: Twin, end: int) -> Twin:
        scale = float(flow.frame.scale(flow.u[end, None]))
        return Twin(*(v * scale for v in y))


@dataclass(frozen=True, eq=False)
class _Flow:
    """Discretised flow dy/du = field(u, y) on the grid u."""

    solver: Reversible
    frame: Frame
    u: Tensor
    field: Callable[[float, Tensor], Tensor]

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

    def step(self, n: int, at: Twin) -> Twin:
        u, v, c = float(self.u[n]), float(self.u[n + 1]), self.solver.coupling
        y = c * at.x + (1 - c) * at.z + self.increment(u, v - u, at.z)
        return Twin(y, at.z - self.increment(v, u - v, y))

    def back(self, n: int, at: Twin) -> Twin:
        """Inverse of step n."""
        u, v, c = float(self.u[n]), float(self.u[n + 1]), self.solver.coupling
        z = at.z + self.increment(v, u - v, at.x)
        return Twin((at.x - (1 - c) * z - self.increment(u, v - u, z)) / c, z)

    def forward(self, at: Twin) -> Twin:
        for n in range(len(self.u) - 1):
            at = self.step(n, at)
        return at

    def backward(self, at: Twin) -> Twin:
        for n in reversed(range(len(self.u) - 1)):
            at = self.back(n, at)
        return at


class _Recomputed(torch.autograd.Function):
    """Gradients with the memory of one step: the backward pass recomputes the states by inverse steps."""

    @staticmethod
    def forward(ctx: Any, flow: _Flow, y: Tensor, z: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            end = flow.forward(Twin(y, z))
        ctx.flow = flow
        ctx.save_for_backward(*end, *inputs)
        return end.x, end.z

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_z: Tensor) -> Any:
        y, z, *inputs = ctx.saved_tensors
        at, grads = Twin(y, z), (grad_y, grad_z)
        sums = [torch.zeros_like(v) for v in inputs]
        for n in reversed(range(len(ctx.flow.u) - 1)):
            with torch.no_grad():
                at = ctx.flow.back(n, at)
            with torch.enable_grad():
                start = Twin(*(v.detach().requires_grad_() for v in at))
                end = ctx.flow.step(n, start)
                inner = torch.autograd.grad(end, (*start, *inputs), grads, allow_unused=True)
            grads = (inner[0], inner[1])
            for total, g in zip(sums, inner[2:], strict=True):
                if g is not None:
                    total += g
        return (None, *grads, *sums)
