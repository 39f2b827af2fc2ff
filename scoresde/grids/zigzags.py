"""Grids that go up as well as down in time: solved steps down, fresh noise up.

A grid that rises is a :class:`Zigzag`. The functions of this page return one, and :func:`zigzag` makes one from times.
Solvers refuse rising times of any other type, because a typing error would otherwise make a sampler stochastic.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.grids.grid import check_grid, times_of_lam
from scoresde.processes.sde import SDE


class Zigzag(Tensor):
    """A grid that may go up: a float64 tensor, and so are its parts; made by :func:`zigzag`."""

    def __deepcopy__(self, memo: dict[int, object]) -> Zigzag:
        return copy.deepcopy(self.as_subclass(Tensor), memo).as_subclass(Zigzag)


@checked
def zigzag(times: Tensor | Sequence[float] | Sequence[Sequence[float]]) -> Zigzag:
    r"""Mark times as a grid that goes up on purpose; each step up adds fresh noise, by the exact forward transition.

    .. math:: x_t = \frac{\alpha_t}{\alpha_s} x_s + \sqrt{\sigma_t^2 - \frac{\alpha_t^2}{\alpha_s^2}\sigma_s^2}\, z
              \qquad\text{for a step up from } s \text{ to } t

    Arguments:
        times: Times from noise to data, (N + 1,), or (N + 1, B) for one grid per sample; the first and the last step go
            down.

    Example:
        >>> import scoresde as ss
        >>> plan = ss.DDIM().plan(ss.VP(), zigzag([1.0, 0.5, 0.7, 0.2, 0.0]))
        >>> plan.stochastic, plan.draws
        (True, 1)
    """
    return torch.as_tensor(times, dtype=torch.float64).as_subclass(Zigzag)


@checked
def ancestral(sde: SDE, times: Tensor | Sequence[float], eta: float = 1.0) -> Zigzag:
    r"""Zigzag grid of ancestral solvers: each step goes below its target time, then fresh noise is added up to it.

    .. math:: \varrho_{down}^2 = \varrho_t^2\left(1 - \eta^2\left(1 - \varrho_t^2/\varrho_s^2\right)\right),
              \qquad \varrho = \sigma/\alpha

    On this grid, DDIM is DDIM(η), which is DDPM for η = 1; other solvers become their ancestral version. If the bracket
    is not positive, the step goes down to data.

    Arguments:
        sde: The process.
        times: Grid, (N + 1,).
        eta: Noise level η, at least 0; 0 returns the times unchanged.

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
    return zigzag(torch.cat(out))


@checked
def churn(
    sde: SDE, times: Tensor | Sequence[float], s_churn: float, s_tmin: float = 0.0, s_tmax: float = math.inf
) -> Zigzag:
    r"""Zigzag grid with churn: before each step but the first, fresh noise multiplies ρ = σ/α by 1 + γ.

    .. math:: \gamma = \min(s_{churn}/N, \sqrt2 - 1) \quad\text{where}\quad s_{tmin} \le \varrho \le s_{tmax}

    No time is raised above T.

    Arguments:
        sde: The process.
        times: Grid of N steps, (N + 1,).
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
    return zigzag(torch.cat(out))


@checked
def restart(sde: SDE, times: Tensor | Sequence[float], low: float, high: float, repeats: int = 1) -> Zigzag:
    """Zigzag grid with restarts: from time `low`, add noise up to `high` and solve down again, `repeats` times.

    Arguments:
        sde: The process.
        times: Grid, (N + 1,); its times nearest to `low` and `high` are the ends of the interval.
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
    return zigzag(torch.cat([grid[: b + 1], grid[a : b + 1].repeat(repeats), grid[b + 1 :]]))


@checked
def renoised(sde: SDE, times: Tensor | Sequence[float], zeta: float) -> Zigzag:
    r"""Grid of DiffPIR: after each step, a fraction ζ of the noise variance is replaced by fresh noise.

    .. math:: x_s = \alpha_s D + \sigma_s(\sqrt{1 - \zeta}\,\varepsilon + \sqrt{\zeta}\,z)

    Each step ends at a lower time, where σ/α is :math:`\sqrt{1-\zeta}` times its value at s. The grid then returns
    to s, and the solver adds the missing noise.

    Arguments:
        sde: The process.
        times: Decreasing times, (N + 1,).
        zeta: Fraction ζ in [0, 1); 0 returns `times`.

    References:
        | Denoising Diffusion Models for Plug-and-Play Image Restoration (Zhu et al., 2023), arXiv:2305.08995
    """
    grid = check_grid(sde, times)
    zeta = check.number("zeta", zeta, at_least=0, below=1)
    if zeta == 0:
        return zigzag(grid)
    lam = sde.lam(grid) - 0.5 * math.log1p(-zeta)
    out = [grid[:1]]
    for i in range(1, len(grid)):
        below = grid[i : i + 1]
        if bool(lam[i].isfinite()):
            low = sde.t_of_lam(lam[i].clamp_max(sde.lam(0.0)))
            below = torch.stack([low, grid[i]]) if low < grid[i] and i < len(grid) - 1 else below
        out.append(below)
    return zigzag(torch.cat(out))


@checked
def repaint(sde: SDE, times: Tensor | Sequence[float], jump: int = 10, resample: int = 10) -> Zigzag:
    """Grid of RePaint: each block of `jump` steps is repeated `resample` times, with noise added back in between.

    With :class:`Replacement` as the hook and the solver ``ss.DDPM()``, this grid gives RePaint. The
    last block, which usually ends at σ = 0, is solved once.

    Arguments:
        sde: The process.
        times: Decreasing times, (N + 1,).
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
    return zigzag(torch.cat(out))
