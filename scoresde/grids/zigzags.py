"""Grids that go up as well as down in time: solved steps down, fresh noise up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.grids.grid import check_grid, times_of_lam
from scoresde.processes.sde import SDE


def ancestral(sde: SDE, times: Tensor | Sequence[float], eta: float = 1.0) -> Tensor:
    r"""Zigzag grid of ancestral solvers: each step goes below its target time, then fresh noise is added up to it.

    .. math:: \varrho_{down}^2 = \varrho_t^2\left(1 - \eta^2\left(1 - \varrho_t^2/\varrho_s^2\right)\right),
              \qquad \varrho = \sigma/\alpha

    On this grid, DDIM is DDIM(η), which is DDPM for η = 1; other solvers become their ancestral version. If the bracket
    is not positive, the step goes down to data.

    Arguments:
        sde: The process.
        times: A grid.
        eta: Noise level η, at least 0; 0 returns the grid unchanged.

    References:
        | Denoising Diffusion Implicit Models (Song et al., 2021), arXiv:2010.02502, eq. 16
    """
    grid = check_grid(sde, times)
    eta = check.number("eta", eta, at_least=0)
    lam = sde.lam(grid)
    left = 1 + eta**2 * torch.expm1(2 * (lam[:-1] - lam[1:]))
    down = lam[1:] - 0.5 * left.clamp_min(0).log()
    below = times_of_lam(sde, torch.where(left > 0, down, torch.full_like(down, math.inf)))
    out = [grid[:1]]
    for low, end in zip(below, grid[1:], strict=True):
        out.append(torch.stack([low, end]) if low < end else end[None])
    return torch.cat(out)


def churn(
    sde: SDE, times: Tensor | Sequence[float], s_churn: float, s_tmin: float = 0.0, s_tmax: float = math.inf
) -> Tensor:
    r"""Zigzag grid with churn: before each step but the first, fresh noise multiplies ρ = σ/α by 1 + γ.

    .. math:: \gamma = \min(s_{churn}/N, \sqrt2 - 1) \quad\text{where}\quad s_{tmin} \le \varrho \le s_{tmax}

    No time is raised above T.

    Arguments:
        sde: The process.
        times: A grid of N steps.
        s_churn: Amount of fresh noise over the whole grid.
        s_tmin: Lowest ρ at which noise is added.
        s_tmax: Highest ρ at which noise is added.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv:2206.00364,
          algorithm 2
    """
    grid = check_grid(sde, times)
    gamma = min(check.number("s_churn", s_churn, at_least=0) / (len(grid) - 1), math.sqrt(2) - 1)
    lam = sde.lam(grid)
    up = times_of_lam(sde, lam - math.log1p(gamma))
    out = [grid[:1]]
    for i in range(1, len(grid)):
        inside = i < len(grid) - 1 and s_tmin <= math.exp(-float(lam[i])) <= s_tmax and up[i] > grid[i]
        out.append(torch.stack([grid[i], up[i]]) if inside else grid[i : i + 1])
    return torch.cat(out)


def restart(sde: SDE, times: Tensor | Sequence[float], low: float, high: float, repeats: int = 1) -> Tensor:
    """Zigzag grid with restarts: from time `low`, add noise up to `high` and solve down again, `repeats` times.

    Arguments:
        sde: The process.
        times: A grid; its times nearest to `low` and `high` are the ends of the interval.
        low: Time at which noise is added.
        high: Time up to which noise is added.
        repeats: Number of repetitions, default 1.

    References:
        | Restart Sampling for Improving Generative Processes (Xu et al., 2023), arXiv:2306.14878
    """
    grid = check_grid(sde, times)
    check.integer("repeats", repeats)
    a, b = (
        int((grid - check.number(name, t, at_least=0, at_most=sde.T)).abs().argmin())
        for name, t in (("high", high), ("low", low))
    )
    if a >= b:
        raise ValueError(f"`high` must lie above `low` by at least one step of the grid, got {high:g} and {low:g}.")
    if b == len(grid) - 1:
        raise ValueError(f"`low` must lie above the end of the grid by at least one step, got {low:g}.")
    return torch.cat([grid[: b + 1], grid[a : b + 1].repeat(repeats), grid[b + 1 :]])


def renoised(sde: SDE, times: Tensor | Sequence[float], zeta: float) -> Tensor:
    r"""Grid of DiffPIR: after each step, a fraction ζ of the noise variance is replaced by fresh noise.

    .. math:: x_s = \alpha_s D + \sigma_s(\sqrt{1 - \zeta}\,\varepsilon + \sqrt{\zeta}\,z)

    Each step ends at a lower time, where σ/α is :math:`\sqrt{1-\zeta}` times its value at s. The grid then returns
    to s, and the solver adds the missing noise.

    Arguments:
        sde: The process.
        times: Decreasing times.
        zeta: Fraction ζ in [0, 1); 0 returns `times`.
    """
    grid = check_grid(sde, times)
    zeta = check.number("zeta", zeta, at_least=0, below=1)
    if zeta == 0:
        return grid
    lam = sde.lam(grid) - 0.5 * math.log1p(-zeta)
    out = [grid[:1]]
    for i in range(1, len(grid)):
        below = grid[i : i + 1]
        if bool(lam[i].isfinite()):
            low = sde.t_of_lam(lam[i].clamp_max(sde.lam(0.0)))
            below = torch.stack([low, grid[i]]) if low < grid[i] and i < len(grid) - 1 else below
        out.append(below)
    return torch.cat(out)


def repaint(sde: SDE, times: Tensor | Sequence[float], jump: int = 10, resample: int = 10) -> Tensor:
    """Grid of RePaint: each block of `jump` steps is repeated `resample` times, with noise added back in between.

    With :class:`Replacement` as the hook and the solver ``ss.DDPM()``, this grid gives RePaint. The
    last block, which usually ends at σ = 0, is solved once.

    Arguments:
        sde: The process.
        times: Decreasing times.
        jump: Number of steps in a block.
        resample: Number of times that each block is solved; 1 returns `times`.

    References:
        | RePaint: Inpainting Using Denoising Diffusion Probabilistic Models (Lugmayr et al., 2022), arXiv:2201.09865
    """
    grid = check_grid(sde, times)
    check.integer("jump", jump, at_least=1)
    check.integer("resample", resample, at_least=1)
    out = [grid[:1]]
    last = len(grid) - 1
    for i in range(0, last, jump):
        down = grid[i + 1 : min(i + jump, last) + 1]
        back = 0 if i + jump >= last else resample - 1
        out += [down, *([grid[i : i + 1], down] * back)]
    return torch.cat(out)
