r"""Solves of the probability flow that can be run back exactly, and differentiated with the memory of one step.

A second state z accompanies y = x/(α + σ), in flow time τ = σ/(α + σ). With Ψ_h the increment of any one-step method,

.. math::
    y_{n+1} &= c\,y_n + (1-c)\,z_n + \Psi_h(\tau_n, z_n), \\
    z_{n+1} &= z_n - \Psi_{-h}(\tau_{n+1}, y_{n+1}),

which has the order of that method and is solved for (y_n, z_n) by hand:

.. math::
    z_n &= z_{n+1} + \Psi_{-h}(\tau_{n+1}, y_{n+1}), \\
    y_n &= c^{-1}\left(y_{n+1} - (1-c)\,z_n - \Psi_h(\tau_n, z_n)\right).

Going back is exact but for rounding, whatever the network, the number of steps and their error are.

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
from scoresde.adaptive import slope
from scoresde.denoiser import AbstractDenoiser
from scoresde.grids import check_grid
from scoresde.pairs import Frame
from scoresde.solvers.singlestep import MIDPOINT, Tableau


class Twin(NamedTuple):
    """A state and its companion, both (B, *event): to the method's order they agree.

    Arguments:
        x: The state.
        z: The companion, needed to go back exactly.
    """

    x: Tensor
    z: Tensor


@dataclass(frozen=True)
class Reversible:
    """A rule whose solves can be run back exactly: :meth:`solve`, and :meth:`invert` with the same times.

    Arguments:
        tableau: The one-step method; each of its stages costs two evaluations a step.
        coupling: c, in (0, 1]: smaller damps the difference of the two states more, and costs c⁻ⁿ of rounding when n
            steps are run back.

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.1)
        >>> times = ss.karras(mix.sde, 20, t_end=mix.sde.t_min)
        >>> noise = torch.randn(4, 1, dtype=torch.float64)
        >>> twin = ss.Reversible().solve(mix, noise, times)
        >>> back = ss.Reversible().invert(mix, twin, times)
        >>> bool((back.x - noise).abs().max() < 1e-10)
        True
    """

    tableau: Tableau = MIDPOINT
    coupling: float = 0.99

    def __post_init__(self) -> None:
        check.number("coupling", self.coupling, above=0, most=1)

    def solve(
        self,
        model: AbstractDenoiser,
        x: Tensor | Twin,
        times: Tensor | Sequence[float],
        *,
        grad: str = "off",
        **cond: Any,
    ) -> Twin:
        """Follow the flow along `times`, up or down.

        Arguments:
            model: A denoiser.
            x: State (B, *event) at the first time, or a pair of them.
            times: Positive times where σ > 0, all falling or all rising.
            grad: ``"off"``, ``"full"``, or ``"reversible"``: the same gradients with the memory of one step; the states
                are made again by running back.
            **cond: Conditions, handed to the network.
        """
        check.conditions(cond, Reversible.solve)
        check.choice("grad", grad, ("off", "full", "reversible"))
        way = self._way(model, times, cond)
        y = self._enter(way, x, 0)
        with torch.set_grad_enabled(grad != "off"):
            if grad == "reversible":
                leaves = [*model.parameters(), *(v for v in tree_leaves(cond) if isinstance(v, Tensor))]
                reads = [v for v in leaves if v.requires_grad]
                y = Twin(*_Retraced.apply(way, *y, *reads))  # type: ignore[no-untyped-call]
            else:
                y = way.forward(y)
        return self._leave(way, y, -1)

    def invert(self, model: AbstractDenoiser, twin: Twin, times: Tensor | Sequence[float], **cond: Any) -> Twin:
        """Where :meth:`solve` with the same model, times and conditions came from.

        Arguments:
            model: A denoiser.
            twin: What :meth:`solve` returned.
            times: The times it was given, in the same order.
            **cond: Conditions, handed to the network.
        """
        check.conditions(cond, Reversible.invert)
        way = self._way(model, times, cond)
        with torch.no_grad():
            return self._leave(way, way.backward(self._enter(way, twin, -1)), 0)

    def _way(self, model: AbstractDenoiser, times: Any, cond: dict[str, Any]) -> _Way:
        sde = model.sde
        grid = torch.as_tensor(times, dtype=torch.float64)
        rising = len(grid) > 1 and bool(grid[0] < grid[1])
        grid = check_grid(sde, grid.flip(0)).flip(0) if rising else check_grid(sde, grid)
        if bool((sde.sigma(grid) == 0).any()):
            raise ValueError("`times` must keep away from σ = 0, as in ss.karras(sde, n, t_end=sde.t_min).")
        frame = Frame(sde)
        return _Way(self, frame, frame.u(grid), lambda u, y: slope(model, frame, u, y, **cond))

    def _enter(self, way: _Way, x: Tensor | Twin, end: int) -> Twin:
        pair = Twin(x, x) if isinstance(x, Tensor) else x
        scale = float(way.frame.scale(way.u[end, None]))
        return Twin(*(check.state("x", v) / scale for v in pair))

    def _leave(self, way: _Way, y: Twin, end: int) -> Twin:
        scale = float(way.frame.scale(way.u[end, None]))
        return Twin(*(v * scale for v in y))


@dataclass(frozen=True, eq=False)
class _Way:
    """Steps along clocks u with a field."""

    rule: Reversible
    frame: Frame
    u: Tensor
    field: Callable[[float, Tensor], Tensor]

    def increment(self, u: float, h: float, y: Tensor) -> Tensor:
        """Ψ_h."""
        tableau = self.rule.tableau
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
        """Step n."""
        u, v, c = float(self.u[n]), float(self.u[n + 1]), self.rule.coupling
        y = c * at.x + (1 - c) * at.z + self.increment(u, v - u, at.z)
        return Twin(y, at.z - self.increment(v, u - v, y))

    def back(self, n: int, at: Twin) -> Twin:
        """Step n undone."""
        u, v, c = float(self.u[n]), float(self.u[n + 1]), self.rule.coupling
        z = at.z + self.increment(v, u - v, at.x)
        return Twin((at.x - (1 - c) * z - self.increment(u, v - u, z)) / c, z)

    def forward(self, at: Twin) -> Twin:
        """All steps."""
        for n in range(len(self.u) - 1):
            at = self.step(n, at)
        return at

    def backward(self, at: Twin) -> Twin:
        """All steps undone."""
        for n in reversed(range(len(self.u) - 1)):
            at = self.back(n, at)
        return at


class _Retraced(torch.autograd.Function):
    """Gradients step by step, from states that are made again."""

    @staticmethod
    def forward(ctx: Any, way: _Way, y: Tensor, z: Tensor, *reads: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            end = way.forward(Twin(y, z))
        ctx.way = way
        ctx.save_for_backward(*end, *reads)
        return end.x, end.z

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_z: Tensor) -> Any:
        y, z, *reads = ctx.saved_tensors
        at, grads = Twin(y, z), (grad_y, grad_z)
        sums = [torch.zeros_like(v) for v in reads]
        for n in reversed(range(len(ctx.way.u) - 1)):
            with torch.no_grad():
                at = ctx.way.back(n, at)
            with torch.enable_grad():
                start = Twin(*(v.detach().requires_grad_() for v in at))
                end = ctx.way.step(n, start)
                found = torch.autograd.grad(end, (*start, *reads), grads, allow_unused=True)
            grads = (found[0], found[1])
            for total, g in zip(sums, found[2:], strict=True):
                if g is not None:
                    total += g
        return (None, *grads, *sums)
