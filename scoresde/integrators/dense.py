"""Dense output: the solution between the steps of the error control."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.integrators.embedded import Frame, Parts, advance, on_device, wide


@dataclass(frozen=True, eq=False)
class Path:
    """Piecewise polynomial through values and slopes at m neighbouring nodes; its local error is of order h^{2m}.

    Arguments:
        u: Nodes of each sample in the order of the steps, (n, B); NaN after the last.
        place: Position of each node in `y` and `f`, (n, B).
        y: States at the nodes, (N, *event).
        f: Slopes at the nodes, (N, *event).
        nodes: Number m of nodes of a polynomial.
        rate: Factor of f in dy/du, a function of u.
        frame: Definition of the state and of the clock, for a probability flow.
    """

    u: Tensor
    place: Tensor
    y: Tensor
    f: Tensor
    nodes: int
    rate: Callable[[Tensor], Tensor]
    frame: Frame | None = None

    def __call__(self, t: float | Tensor) -> Tensor:
        """State x at a time inside the solved interval.

        Arguments:
            t: Time, a number or (B,).
        """
        if self.frame is None:
            raise ValueError("this path belongs to a plain equation, which has a clock and no time; use `at`.")
        B = self.u.shape[1]
        at = self.frame.u(check.time(t, self.frame.sde.T).to("cpu", torch.float64).expand(B))
        y = self.at(at)
        scale = on_device(self.frame.scale(at), y)
        return y * wide(scale, y)

    def at(self, u: Tensor) -> Tensor:
        """State y at clock u, (B,)."""
        count = self.u.isfinite().sum(0)
        last = self.u.gather(0, (count - 1)[None])[0]
        sign = (last - self.u[0]).sign()
        slack = 1e-9 * (1 + self.u[0].abs())
        beyond = ((u - last) * sign > slack) | ((self.u[0] - u) * sign > slack)
        if bool(beyond.any()):
            i = int(beyond.nonzero()[0, 0])
            raise ValueError(
                f"the path of sample {i} runs from u = {float(self.u[0, i]):g} to {float(last[i]):g}, "
                f"not to {float(u[i]):g}."
            )
        index = self._neighbours(u, count, sign)
        of_y, of_f = _hermite(self.u.gather(0, index), u)
        of_f = of_f * self.rate(self.u.gather(0, index))
        place = self.place.gather(0, index).to(self.y.device)
        out = torch.zeros_like(self.y[place[0]])
        for where, a, b in zip(place, of_y, of_f, strict=True):
            out = out + wide(on_device(a, self.y), self.y) * self.y[where]
            out = out + wide(on_device(b, self.y), self.y) * self.f[where]
        return out

    def _neighbours(self, u: Tensor, count: Tensor, sign: Tensor) -> Tensor:
        """Numbers of the nodes around u, (m, B)."""
        k = ((u - self.u) * sign >= 0).sum(0).sub(1).clamp_min(0)
        k = torch.minimum(k, (count - 2).clamp_min(0))
        first = k - (self.nodes - 2) // 2
        if self.nodes % 2:  # with an odd number, the last node is the nearer one of the two candidates
            rows = torch.arange(len(k))
            before, after = (k - 1).clamp_min(0), torch.minimum(k + 2, count - 1)
            first = first - ((u - self.u[before, rows]).abs() < (u - self.u[after, rows]).abs()).long()
        first = torch.minimum(first, count - self.nodes).clamp_min(0)
        return torch.minimum(first + torch.arange(self.nodes)[:, None], count - 1)


class Record:
    """Nodes of all accepted steps, from which a :class:`Path` is made.

    Arguments:
        size: Number of samples.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, samples: Tensor, u: Tensor, y: Tensor, f: Tensor) -> None:
        """Add one node for each of some samples.

        Arguments:
            samples: Numbers of the samples, (a,).
            u: Clock of the nodes, (a,).
            y: States, (a, *event).
            f: Slopes, (a, *event).
        """
        self.parts.append((samples, u, y, f))

    def path(self, nodes: int, rate: Callable[[Tensor], Tensor], frame: Frame | None = None) -> Path:
        """The solution as a function of the clock.

        Arguments:
            nodes: Number of nodes of a polynomial.
            rate: Factor of the slopes in dy/du.
            frame: Definition of the state and of the clock, for a probability flow.
        """
        samples, u, y, f = (torch.cat(column) for column in zip(*self.parts, strict=True))
        seen = torch.zeros(self.size, dtype=torch.long)
        number = []
        for part, *_ in self.parts:
            number.append(seen[part])
            seen[part] += 1
        table = torch.full((int(seen.max()), self.size), math.nan, dtype=torch.float64)
        place = torch.zeros(table.shape, dtype=torch.long)
        at = (torch.cat(number), samples)
        table[at] = u
        place[at] = torch.arange(len(u))
        if frame is not None and frame.in_lam:  # y is smoother in the clock of the prediction
            frame = Frame(frame.sde, frame.prediction)
            table, rate = frame.prediction.clock(table), frame.rate
        return Path(table, place, y, f, nodes, rate, frame)


def quartic(
    h: Tensor, before: Tensor, after: Tensor, stages: Sequence[Parts], middle: Sequence[float]
) -> Callable[[float], tuple[Tensor, Tensor]]:
    """Polynomial through the ends of a step, their slopes and the middle.

    The result is a function of the share of the step, which returns the state and its slope.

    Arguments:
        h: Length of the step of each sample, with its sign, (B,).
        before: State at the start, (B, *event).
        after: State at the end, (B, *event).
        stages: Slopes of the stages, of which the last is at the end of the step.
        middle: Weights of the stages for the state in the middle.
    """
    (centre,) = advance((before,), torch.tensor(middle, dtype=torch.float64)[:, None] * h, stages)
    width = wide(on_device(h, before), before)
    f0, f1 = width * stages[0][0], width * stages[-1][0]
    a4 = 2 * (f1 - f0) - 8 * (after + before) + 16 * centre
    a3 = 5 * f0 - 3 * f1 + 18 * before + 14 * after - 32 * centre
    a2 = f1 - 4 * f0 - 11 * before - 5 * after + 16 * centre

    def at(u: float) -> tuple[Tensor, Tensor]:
        slope = ((4 * a4 * u + 3 * a3) * u + 2 * a2) * u + f0
        return (((a4 * u + a3) * u + a2) * u + f0) * u + before, slope / width

    return at


def _hermite(nodes: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of values and slopes in the polynomial that takes both at `nodes`, (m, B); equal nodes count once."""
    m = len(nodes)
    same = torch.stack(
        [(nodes[:i] == nodes[i]).any(0) if i else torch.zeros_like(u, dtype=torch.bool) for i in range(m)]
    )
    of_y, of_f = [], []
    for i in range(m):
        basis, slope = torch.ones_like(u), torch.zeros_like(u)
        for j in range(m):
            if j != i:
                gap = torch.where(same[j] | same[i], 1.0, nodes[i] - nodes[j])
                basis = basis * torch.where(same[j], 1.0, (u - nodes[j]) / gap)
                slope = slope + torch.where(same[j], 0.0, 1 / gap)
        square = torch.where(same[i], 0.0, basis**2)
        of_y.append(square * (1 - 2 * slope * (u - nodes[i])))
        of_f.append(square * (u - nodes[i]))
    return torch.stack(of_y), torch.stack(of_f)
