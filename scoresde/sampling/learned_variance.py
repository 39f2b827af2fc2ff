"""Ancestral sampling with learned variances, and the statistics for optimal (Analytic-DPM) variances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.network import log_variance
from scoresde.grids.grid import check_grid
from scoresde.integrators.method import Method, Problem, Solution
from scoresde.noise.keyed import Noise
from scoresde.solvers.ancestral import posterior_step
from scoresde.solvers.quadrature import Point


@checked
@dataclass(frozen=True)
class LearnedVariance(Method):
    r"""DDPM with the variance that the network predicts, by default between the small and the large variance.

    .. math:: \log v = \tfrac{1+r}{2}\log\beta + \tfrac{1-r}{2}\log\frac{\beta\,\sigma_t^2}{\sigma_s^2}, \qquad
              \beta = \sigma_s^2\left(1 - e^{-2h}\right)

    The denoiser is made with ``learned_variance=True``; its network returns a prediction and r in [−1, 1]. Networks
    that return log v or v have ``learned_variance="log"`` or ``"value"``; their v belongs to one step of training, so
    use all the steps of training. Guidance changes the mean; the variance is that of the network with the condition.
    The published sampler of classifier guidance instead shifts the mean by v ∇log p(c | x). The variance depends on the
    state, so no :class:`Plan` exists. With the same seed and times the start and the normals are those
    of :class:`DDPM`.

    Example:
        >>> import torch, scoresde as ss
        >>> net = lambda x, t: torch.cat([0.5 * x, torch.zeros_like(x)], dim=1)
        >>> model = ss.Denoiser(net, ss.VP(), predicts="eps", learned_variance=True)
        >>> ss.solve(model, (2, 3), ss.sampling.LearnedVariance(), steps=5, seed=0).nfe
        5

    References:
        | Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), arXiv:2102.09672, eq. 15
    """

    grid = "times"

    def run(self, problem: Problem) -> Solution:
        if problem.times is None:
            raise ValueError("`problem` must have `times`, the grid of the solve.")
        model, sde = problem.model, problem.model.sde
        grid, noise = check_grid(sde, problem.times), problem.steps
        kind = model.kind.variance or "range"
        x = problem.draw(float(grid[0]))
        with torch.set_grad_enabled(problem.grad != "off"):
            for i, (s, t) in enumerate(pairwise(Point.of(sde, grid).unbind())):
                d, r = model.x0_and_variance(x, float(s.t))
                c_x, c_d, std = (float(w) for w in posterior_step(s, t, 1.0))
                x = c_x * x + c_d * d
                if std > 0:
                    # The large variance is (σ_s/σ_t)² times the small one.
                    small = torch.tensor(std**2, dtype=torch.float64)
                    log_v = log_variance(kind, r, small, small * float(s.sigma / t.sigma) ** 2)
                    x = x + (log_v / 2).exp() * noise.like(x, i)
        return problem.solution(x, grid.tolist())


@checked
def mean_squared_score(
    model: AbstractDenoiser, data: Tensor, times: Tensor | Sequence[float], *, seed: int = 0
) -> Tensor:
    r"""Estimate E|∇log p_t|²/D at the start of each step, the `score_square` of DDPM with ``variance="optimal"``.

    Arguments:
        model: Denoiser; conditions belong to it, as in ``model.given(label=y)`` with one row for each sample of `data`.
        data: Data, (B, *event); a few hundred samples are enough.
        times: Decreasing times, (N + 1,).
        seed: Seed of the noise.

    Returns:
        Estimates, (N,), float64.

    References:
        | Analytic-DPM (Bao et al., 2022), arXiv:2201.06503, theorem 1
    """
    noise, grid = Noise(seed), check_grid(model.sde, times)
    values, finite = [], check.Finite("the scores")
    with torch.no_grad():
        for i, t in enumerate(grid[:-1].tolist()):
            x = model.sde.perturb(data, t, noise.like(data, i))
            score = model.score(x, t)
            finite.add(score, t)
            values.append(score.double().square().mean())
    finite.require()
    return torch.stack(values).cpu()
