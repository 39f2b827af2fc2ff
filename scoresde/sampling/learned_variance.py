"""Ancestral sampling with learned variances, and the statistics for optimal (Analytic-DPM) variances."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.network import Denoiser
from scoresde.grids.grid import check_grid
from scoresde.noise.keyed import Noise
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
    r"""DDPM with the variance that the network predicts, a geometric mean of the small and the large variance.

    .. math:: \log v = \tfrac{1+r}{2}\log\beta + \tfrac{1-r}{2}\log\frac{\beta\,\sigma_t^2}{\sigma_s^2}, \qquad
              \beta = \sigma_s^2\left(1 - e^{-2h}\right)

    The variance depends on the state, so this sampler has no :class:`Plan`. With the same seed it uses the same start
    and the same normals as ``sample(model, ..., DDPM())``.

    Arguments:
        model: Denoiser made with ``learned_variance=True``; its network returns a prediction and r in [−1, 1].
        shape_or_x: Shape (B, *event) to start from the prior, or a state at the first time.
        times: Decreasing times, (N + 1,).
        seed: Integer, one integer for each sample, or a :class:`Noise`.
        dtype: Data type of the state, if a shape is given.
        device: Device of the state, if a shape is given; by default that of the model.
        **cond: Conditions for the network.

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
            c_x, c_d, std = (float(w) for w in posterior_step(sde, s, t, 1.0))
            x = c_x * x + c_d * d
            if std > 0:
                # The large variance is (σ_s/σ_t)² times the small one, so √v = std · (σ_s/σ_t)^((1 + r)/2).
                ratio = sde.sigma(float(s)) / sde.sigma(float(t))
                x = x + std * ratio ** ((1 + r) / 2) * noise.like(x, i)
    return x


def mean_squared_score(
    model: AbstractDenoiser, data: Tensor, times: Tensor | Sequence[float], *, seed: int = 0, **cond: Any
) -> Tensor:
    r"""Estimate E|∇log p_t|²/D at the start of each step, the `score_square` of DDPM with ``variance="optimal"``.

    Arguments:
        model: A denoiser.
        data: Data, (B, *event); a few hundred samples are enough.
        times: Decreasing times, (N + 1,).
        seed: Seed of the noise.
        **cond: Conditions for the network.

    Returns:
        Estimates, (N,), float64.

    References:
        | Analytic-DPM (Bao et al., 2022), arXiv:2201.06503, theorem 1
    """
    check.conditions(cond, mean_squared_score)
    noise, grid = Noise(seed), check_grid(model.sde, times)
    values = []
    with torch.no_grad():
        for i, t in enumerate(grid[:-1].tolist()):
            x = model.sde.perturb(data, t, noise.like(data, i))
            values.append(model.score(x, t, **cond).double().square().mean())
    return torch.stack(values).cpu()
