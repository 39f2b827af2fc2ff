"""Ancestral sampling with variances that come from the model: learned ones, and what optimal ones need to know."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.denoiser import AbstractDenoiser, Denoiser
from scoresde.grids import check_grid
from scoresde.noise import Noise
from scoresde.solvers.ancestral import posterior_step

_START, _ROWS = 0, 1  # streams of a seed, as in `sample`


def sample_learned_variance(
    model: Denoiser,
    shape_or_x: Sequence[int] | Tensor,
    times: Tensor | Sequence[float],
    *,
    seed: int | Sequence[int] | Noise | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    **cond: Any,
) -> Tensor:
    r"""DDPM's sampler with the network's own variance, a geometric mean of the small and the large one.

    .. math:: \log v = \tfrac{1+r}{2}\log\beta + \tfrac{1-r}{2}\log\frac{\beta\,\sigma_t^2}{\sigma_s^2}, \qquad
              \beta = \sigma_s^2\left(1 - e^{-2h}\right)

    The variance depends on the state, so this is a loop of its own and no plan. With equal seeds it starts and draws
    as ``sample(model, ..., DDPM())`` does.

    Arguments:
        model: A denoiser made with ``learned_variance=True``, whose network returns r in [−1, 1] beside its prediction.
        shape_or_x: Shape (B, *event) to start from the prior, or a state at the first time.
        times: From noise to data, (N + 1,).
        seed: An integer, one for each sample, or a :class:`Noise`.
        dtype: Of the state, when a shape is given.
        device: Of the state, when a shape is given; by default the model's.
        **cond: Conditions, handed to the network.

    References:
        | Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), arXiv:2102.09672, eq. 15
    """
    check.conditions(cond, sample_learned_variance)
    sde, grid = model.sde, check_grid(model.sde, times)
    noise = seed if isinstance(seed, Noise) else Noise(seed)
    if isinstance(shape_or_x, Tensor):
        x = check.state("x", shape_or_x)
    else:
        first = next(model.parameters(), None)
        where = device or (first.device if first is not None else "cpu")
        x = sde.prior(float(grid[0])).sample(tuple(shape_or_x), noise.fork(_START), dtype=dtype, device=where)
    noise = noise.fork(_ROWS)
    with torch.no_grad():
        for i, (s, t) in enumerate(pairwise(grid)):
            d, r = model.x0_and_variance(x, float(s), **cond)
            keep, gain, std = (float(w) for w in posterior_step(sde, s, t, 1.0))
            x = keep * x + gain * d
            if std > 0:
                # log β − log v_small = 2 log(σ_s/σ_t); the noise is scaled by the root of what that share of it makes
                widen = sde.sigma(float(s)) / sde.sigma(float(t))
                x = x + std * widen ** ((1 + r) / 2) * noise.like(x, i)
    return x


def mean_squared_score(
    model: AbstractDenoiser, data: Tensor, times: Tensor | Sequence[float], *, seed: int = 0, **cond: Any
) -> Tensor:
    r"""E|∇log p_t|²/D at the start of each leg of a grid, over a batch of data: what ``DDPM("optimal")`` needs.

    Arguments:
        model: A denoiser.
        data: Real data, (B, *event); a few hundred do.
        times: From noise to data, (N + 1,).
        seed: Of the noise.
        **cond: Conditions, handed to the network.

    Returns:
        (N,), float64.

    References:
        | Analytic-DPM (Bao et al., 2022), arXiv:2201.06503, theorem 1
    """
    check.conditions(cond, mean_squared_score)
    noise, grid = Noise(seed), check_grid(model.sde, times)
    found = []
    with torch.no_grad():
        for i, t in enumerate(grid[:-1].tolist()):
            x = model.sde.perturb(data, t, noise.like(data, i))
            found.append(model.score(x, t, **cond).double().square().mean())
    return torch.stack(found).cpu()
