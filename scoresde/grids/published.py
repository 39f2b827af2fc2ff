"""Grids from tables of noise levels, such as those that were published for well-known models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.grids.grid import check_grid
from scoresde.processes.sde import SDE

# σ/α of Align Your Steps, table 3 of arXiv:2404.14507.
_PUBLISHED = {
    "ays-sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays-sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "ays-if": (160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006),
    "ays-svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}

_SLACK = 0.01  # largest difference of log σ/α between the first level and T: the published levels are rounded


@checked
@dataclass(frozen=True)
class NoiseLevels:
    r"""Grid maker from a table of noise levels ϱ = σ/α, interpolated linearly in log ϱ to any number of steps.

    A call ``levels(sde, steps)`` gives a grid of `sde`, so an instance is a `grid` of ``ss.solve``. If the grid ends at
    σ = 0, this level replaces the last one, as in diffusers and ComfyUI; with a positive `t_end` it ends there.

    Arguments:
        levels: Decreasing noise levels σ/α; on :class:`EDM` they are times.
        name: Name of the table.

    Example:
        >>> import scoresde as ss
        >>> maker = ss.grids.NoiseLevels((80.0, 8.0, 0.8, 0.08))
        >>> [round(t, 3) for t in maker(ss.EDM(), 3).tolist()]
        [80.0, 8.0, 0.8, 0.0]
        >>> [round(t, 3) for t in maker(ss.EDM(), 6).tolist()]
        [80.0, 25.298, 8.0, 2.53, 0.8, 0.253, 0.0]
    """

    levels: Sequence[float]
    name: str = ""

    def __post_init__(self) -> None:
        levels = tuple(check.number(f"levels[{i}]", v, above=0) for i, v in enumerate(self.levels))
        if len(levels) < 2 or any(a <= b for a, b in pairwise(levels)):
            raise ValueError(f"`levels` must be at least two decreasing noise levels, got {levels}.")
        object.__setattr__(self, "levels", levels)

    def __repr__(self) -> str:
        return f"published({self.name!r})" if self.name else f"NoiseLevels({self.levels})"

    def __call__(self, sde: SDE, steps: int, *, t_start: float | None = None, t_end: float = 0.0) -> Tensor:
        """Grid of a process.

        Arguments:
            sde: Process.
            steps: Number of steps; the grid has one more time.
            t_start: First time, by default that of the first level.
            t_end: Last time, default 0, which gives the denoised state.
        """
        N = check.integer("steps", steps, at_least=1)
        table = torch.tensor(self.levels, dtype=torch.float64).log()
        first, last = self._first(sde) if t_start is None else check.number("t_start", t_start, above=0), t_end
        check.number("t_end", t_end, at_least=0, below=first)
        a = 0.0 if t_start is None else self._place(table, -sde.lam(first))
        b = self._place(table, -sde.lam(last)) if sde.sigma(last) > 0 else 1.0
        u = (len(table) - 1) * torch.linspace(a, b, N + 1, dtype=torch.float64)
        k = u.floor().clamp(0, len(table) - 2).long()
        log_rho = torch.lerp(table[k], table[k + 1], u - k)
        grid = sde.inverse_lam(-log_rho).clamp(0.0, sde.T)
        grid[0], grid[-1] = first, last
        return check_grid(sde, grid)

    def _first(self, sde: SDE) -> float:
        """Time of the first level: T if the level is that of T up to rounding."""
        log_rho, largest = math.log(self.levels[0]), -sde.lam(sde.T)
        if log_rho > largest + _SLACK:
            raise ValueError(
                f"the first of `levels`, {self.levels[0]:g}, is above σ/α = {math.exp(largest):g} of {sde!r} at T; use "
                f"the process of the model that the levels belong to, or give `t_start`."
            )
        return sde.T if log_rho > largest - _SLACK else sde.t_of_lam(-log_rho)

    @staticmethod
    def _place(table: Tensor, log_rho: float) -> float:
        """Place of a level in the table, from 0 at the first to 1 at the last; levels outside go to the ends."""
        k = int((table > log_rho).sum().clamp(1, len(table) - 1)) - 1
        part = float((table[k] - log_rho) / (table[k] - table[k + 1]))
        return (k + min(max(part, 0.0), 1.0)) / (len(table) - 1)


@checked
def published(name: str) -> NoiseLevels:
    """Grid maker from noise levels that were published for a model.

    ==========  =============================================================================
    name        levels
    ==========  =============================================================================
    ays-sd15    Align Your Steps, Stable Diffusion 1.5: 10 steps
    ays-sdxl    Align Your Steps, Stable Diffusion XL: 10 steps
    ays-if      Align Your Steps, DeepFloyd IF, stage 1: 10 steps
    ays-svd     Align Your Steps, Stable Video Diffusion: 10 steps
    ==========  =============================================================================

    Other numbers of steps are interpolated linearly in log σ, as in the paper. The levels belong to the process and the
    data of that model; ``ss.fitting.align_your_steps`` finds such levels for another model.

    Arguments:
        name: Name from the table.

    Example:
        >>> import torch, scoresde as ss
        >>> sde = ss.Discrete(ss.processes.betas("scaled_linear", 1000, beta_start=0.00085, beta_end=0.012))
        >>> grid = ss.grids.published("ays-sd15")(sde, 10)
        >>> [round(rho, 3) for rho in (-sde.lam(grid[1:-1])).exp().tolist()]
        [6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152]

    References:
        | Align Your Steps: Optimizing Sampling Schedules in Diffusion Models (Sabour et al., 2024), arXiv:2404.14507,
          table 3
    """
    return NoiseLevels(_PUBLISHED[check.choice("name", name, tuple(_PUBLISHED))], name)
