r"""Universal plans: one fitted table for each number of evaluations, for any process and any model.

``experiments/universal.py`` fits the tables to random exact mixtures with errors like those of networks. They are in
units of the data's standard deviation, so that a plan needs this one number of the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.gaussian import Gaussian
from scoresde.grids.grid import check_grid
from scoresde.plan.rows import Row
from scoresde.plan.table import Plan
from scoresde.processes.sde import SDE
from scoresde.solvers.rule import Solver

FOLDER = Path(__file__).parent / "universal_tables"

STARTS = ("prior", "gaussian")
PREDICTS = ("data", "noise")


@dataclass(frozen=True)
class UniversalTable:
    """Levels and weights of n evaluations, in units of the data's standard deviation.

    Arguments:
        levels: Noise levels σ/α of the evaluated states, (n,), decreasing.
        network_levels: Noise levels at which the network is evaluated there, (n,).
        weights: Weights of the denoised states in each state and in the result, (n + 1, n); rows 1 … n sum to one.
    """

    levels: Tensor
    network_levels: Tensor
    weights: Tensor

    @property
    def nfe(self) -> int:
        """Number of evaluations."""
        return len(self.levels)

    def run(self, denoise: Callable[[Tensor, Tensor], Tensor], y: Tensor, first: Tensor) -> Tensor:
        """Result of the table in the frame y = x/α.

        Arguments:
            denoise: Function of a state and its network level.
            y: State at the level `first`.
            first: Noise level of `y`; the first level of the table, or a higher one.
        """
        s0 = torch.minimum(self.levels[0], first)
        state = y * (s0 / first)
        # With a start at its own first level, the table may evaluate the network at a higher one.
        at = self.network_levels[0] if first is self.levels[0] else torch.minimum(self.network_levels[0], first)
        denoised = [denoise(state, at)]
        for r in range(1, self.nfe + 1):
            q = self.levels[r] / first if r < self.nfe else torch.zeros_like(first)
            state = q * y + (1 - q) * torch.einsum("k,k...->...", self.weights[r, :r], torch.stack(denoised))
            if r < self.nfe:
                denoised.append(denoise(state, self.network_levels[r]))
        return state

    def scaled(self, scale: float) -> UniversalTable:
        """The table for data of another scale: all levels times `scale`."""
        return replace(self, levels=self.levels * scale, network_levels=self.network_levels * scale)

    def to_dict(self) -> dict[str, list[float] | list[list[float]]]:
        """Lists of numbers with six digits; of the weights, the lower triangle."""
        rows = [[_digits(w) for w in row[:r].tolist()] for r, row in enumerate(self.weights)][1:]
        levels, network_levels = ([_digits(v) for v in t.tolist()] for t in (self.levels, self.network_levels))
        return {"levels": levels, "network_levels": network_levels, "weights": rows}

    @classmethod
    def from_dict(cls, table: Mapping[str, Sequence[float] | Sequence[Sequence[float]]]) -> UniversalTable:
        """The table of :meth:`to_dict`; each row of weights sums to one exactly.

        Arguments:
            table: Lists of numbers.
        """
        n = len(table["levels"])
        weights = torch.zeros(n + 1, n, dtype=torch.float64)
        for r, row in enumerate(table["weights"], 1):
            weights[r, :r] = torch.tensor(row, dtype=torch.float64)
            weights[r, r - 1] += 1 - weights[r].sum()
        levels, told = (torch.tensor(table[k], dtype=torch.float64) for k in ("levels", "network_levels"))
        return cls(levels, told, weights)


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


@checked
@dataclass(frozen=True)
class Universal(Solver):
    r"""Universal plan: a fitted table of levels and weights for the number of evaluations, used with any model.

    .. math:: x_r = \alpha(\tau_r) \Big[\frac{s_r}{s_T}\,y_T + \Big(1 - \frac{s_r}{s_T}\Big)
              \sum_{k<r} w_{rk}\,D(x_k, \tau_k)\Big], \qquad y_T = \frac{x_T}{\alpha_T}, \quad
              s_T = \frac{\sigma_T}{\alpha_T}

    The table has its own levels: of the grid, only the first time and the number of steps count. Every row is exact if
    the data is one point. There are tables for 3 to 12 evaluations and for 15.

    The levels are in units of the data's standard deviation or, if ``model.gaussian`` is known or the run has a
    Gaussian start, of the noise level at which the data's Gaussian is denoised most, :func:`unit_of`. In ``ss.sample``
    the solver reads from the model what is not given: the prediction of its network, and that unit.

    Arguments:
        data_std: Unit of the levels; by default that of ``model.gaussian``, or else 1.
        predicts: Table for networks that predict the data, v or the velocity, ``"data"``, or ε or the score,
            ``"noise"``; by default that of the model, or else ``"data"``.
        start: First state of the table, at T, ``"prior"``, or at the first level of the table, ``"gaussian"``, which
            the flow of a :class:`Gaussian` reaches without an evaluation. ``ss.sample`` chooses it by its `start`.

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.1)
        >>> x = ss.sample(mix, (4, 1), ss.solvers.Universal(), nfe=5, seed=0)
        >>> bool(((x.abs() - 1).abs() < 0.5).all())
        True
    """

    order = 0  # a table for one number of evaluations has no order

    own_times: ClassVar[bool] = True

    data_std: float | None = None
    predicts: str | None = None
    start: str = "prior"

    def __post_init__(self) -> None:
        if self.data_std is not None:
            check.number("data_std", self.data_std, above=0)
        if self.predicts is not None:
            check.choice("predicts", self.predicts, PREDICTS)
        check.choice("start", self.start, STARTS)

    @checked
    def suited(self, model: AbstractDenoiser, nfe: int, gaussian: Gaussian | None = None) -> Solver:
        predicts = self.predicts or ("noise" if model.kind.predicts in ("eps", "score") else "data")
        own = replace(self, predicts=predicts, start="gaussian" if gaussian is not None else self.start)
        data = gaussian or model.gaussian
        if own.data_std is not None or data is None:
            return own
        return replace(own, data_std=unit_of(data.spectrum))

    def table(self, nfe: int) -> UniversalTable:
        """The table of the package, in units of the data's standard deviation.

        Arguments:
            nfe: Number of evaluations.
        """
        check.integer("nfe", nfe, at_least=1)
        found = tables("gaussian" if self.start == "gaussian" else self.predicts or "data")
        if nfe not in found:
            allowed = ", ".join(map(str, sorted(found)))
            raise ValueError(
                f"Universal has tables for {allowed} evaluations, got {nfe}; take one of these numbers, or a solver "
                f"for any number, such as ss.sampling.default_solver({nfe}, model)."
            )
        return found[nfe]

    def plan(self, sde: SDE, times: Tensor | Sequence[float], *, up: str = "diffuse") -> Plan:
        grid = check_grid(sde, times)
        check.choice("up", up, ("diffuse", "solve"))
        end = float(grid[-1])
        if sde.sigma(end) > 0:
            raise ValueError(f"`times` must end at the data, t = 0, for Universal, got {end:g}; drop `t_end`.")
        table = self.table(len(grid) - 1).scaled(self.data_std or 1.0)
        start = None if self.start == "gaussian" else float(grid[0])
        return write_plan(table, sde, start, end, name=self.name)


def write_plan(table: UniversalTable, sde: SDE, start: float | None, end: float = 0.0, *, name: str = "") -> Plan:
    """The plan of a table, whose states have the scale of the time at which the network is evaluated.

    Arguments:
        table: Table on the scale of the data.
        sde: Process.
        start: Time of the initial state; None for the first level of the table.
        end: Time of the result, with σ = 0.
        name: Name of the plan.
    """
    low, high = sde.lam(sde.T), sde.lam(sde.t_min)

    def time_of(level: float) -> float:
        return float(sde.t_of_lam(min(max(-math.log(level), low), high)))

    first = time_of(float(table.levels[0])) if start is None else start
    alpha, sigma = float(sde.alpha(first)), float(sde.sigma(first))
    smallest = float(sde.sigma(sde.t_min) / sde.alpha(sde.t_min))
    largest = sigma / alpha if alpha > 0 else math.inf
    told = [time_of(float(v)) for v in table.network_levels]
    if start is not None:
        told[0] = min(told[0], first)
    levels = [min(max(float(v), smallest), largest) for v in table.levels]
    same = math.isclose(told[0], first, rel_tol=1e-9)
    rows = [Row(first, evaluates=same, node=0, note="start")]
    if not same:
        # pure noise at T is pure noise at the first level; a Gaussian start is at its level already
        scale = float(sde.sigma(told[0])) / sigma if start is not None else float(sde.alpha(told[0])) / alpha
        rows.append(Row(told[0], x=((0, scale),), evaluates=True))
    evaluated = [len(rows) - 1]
    for r in range(1, table.nfe + 1):
        last = r == table.nfe
        t, level = (end, 0.0) if last else (time_of(levels[r]), levels[r])
        scale = float(sde.alpha(t))
        noise, size = scale * level / sigma, scale * (1 - level * alpha / sigma)
        weights = tuple((k, size * w) for k, w in zip(evaluated, table.weights[r, :r].tolist(), strict=True) if w)
        x = ((0, noise),) if noise else ()
        here = last or math.isclose(told[r], t, rel_tol=1e-9)
        rows.append(Row(t, x=x, d=weights, evaluates=here and not last, node=r))
        if not here:  # the network is evaluated at this state, on the scale of another time
            rows.append(Row(told[r], x=((len(rows) - 1, float(sde.alpha(told[r])) / scale),), evaluates=True))
        evaluated.append(len(rows) - 1)
    # a fit that begins from the plan moves the levels of the states and the times of the network apart
    on_levels = [first, *(time_of(v) for v in levels[1:]), end]
    return Plan(tuple(rows), name=name, sde=repr(sde), meta={"levels": on_levels})


def unit_of(spectrum: Tensor) -> float:
    r"""Noise level at which the flow of Gaussian data denoises most, in units in which it is 1 for white data of std 1.

    Along the flow of data with variances c the denoised state changes at the rate

    .. math:: r(s) = \Big|\frac{dD}{d\log s}\Big| = \Big(\sum_i \frac{c_i^2 s^4}{(c_i + s^2)^3}\Big)^{1/2}

    The result is the mean of log s with the weight r. It is the standard deviation of white data, and larger if few
    directions hold most of the variance, as in images.

    Arguments:
        spectrum: Variances of the data in all directions, (D,).
    """
    c = spectrum.detach().to("cpu", torch.float64).clamp_min(0)
    largest = float(c.max())
    if largest == 0:
        raise ValueError("`spectrum` is 0 in all directions: data of one point has no scale; give `data_std`.")
    log_s = torch.linspace(-9.0, 6.0, 301, dtype=torch.float64)
    s2 = (2 * log_s).exp()[:, None]
    c = c / largest

    def centre(c: Tensor) -> float:
        rate = (c.square() * s2.square() / (c + s2) ** 3).sum(1).sqrt()
        return float((rate * log_s).sum() / rate.sum())

    return math.sqrt(largest) * math.exp(centre(c) - centre(torch.ones(1, dtype=torch.float64)))


@cache
@torch.inference_mode(False)
def tables(kind: str) -> Mapping[int, UniversalTable]:
    """Tables of the package by their number of evaluations.

    Arguments:
        kind: ``"data"``, ``"noise"`` or ``"gaussian"``.
    """
    found = json.loads((FOLDER / f"{kind}.json").read_text())
    return {int(n): UniversalTable.from_dict(table) for n, table in found["tables"].items()}
