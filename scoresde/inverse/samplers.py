r"""Posterior samplers that change the update or the noise, not only the denoiser.

Each takes a denoiser, a :class:`Measurement` and a grid, and returns a :class:`Solution`. The result carries no
gradient. Conditions belong to the denoiser, as in ``model.given(label=y)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._progress import each
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.gaussian import Gaussian
from scoresde.denoisers.start import Start
from scoresde.grids.spacings import quadratic_vp
from scoresde.guidance.classifier import before_silence, gradient
from scoresde.integrators.method import Solution
from scoresde.inverse.denoisers import isotropic_variance
from scoresde.inverse.measurements import Measurement
from scoresde.inverse.operators import Linear
from scoresde.inverse.problem import Grid, Seed, make_problem
from scoresde.inverse.stacked import Seen
from scoresde.noise.keyed import Noise
from scoresde.sampling.solve import sample
from scoresde.solvers.deterministic import DPMSolverPP
from scoresde.solvers.rule import Solver


@checked
@torch.no_grad()
def ddrm(
    model: AbstractDenoiser,
    measurement: Seen,
    shape_or_x: Sequence[int] | Tensor,
    grid: Grid = 20,
    *,
    eta: float = 0.85,
    eta_b: float = 1.0,
    start: Start | Gaussian | None = None,
    seed: Seed = None,
    progress: bool | str = False,
) -> Solution:
    r"""Denoising diffusion restoration (DDRM): DDIM in the singular coordinates of A, each with its own noise level.

    A coordinate with singular value d > 0 has :math:`\bar y = u^T y / d` and :math:`n = \alpha_s\,\mathrm{std}/d`; a
    coordinate in the null space of A is unseen:

    .. math::
        x_s = \begin{cases}
        \alpha_s D + \sigma_s(\sqrt{1-\eta^2}\,\varepsilon + \eta z) & \text{unseen} \\
        \alpha_s D + \sigma_s(\sqrt{1-\eta^2}\,\alpha_s(\bar y - D)/n + \eta z) & \sigma_s < n \\
        \alpha_s((1-\eta_b) D + \eta_b\bar y) + \sqrt{\sigma_s^2 - \eta_b^2 n^2}\,z & \sigma_s \ge n
        \end{cases}

    Arguments:
        model: Denoiser of the prior.
        measurement: Measurement with a linear operator; `std` may be 0.
        shape_or_x: Shape (B, *event), or a state at the first time.
        grid: Decreasing times, or a number of steps.
        eta: Stochasticity η in [0, 1], without effect where σ_s ≥ n.
        eta_b: Weight η_b of the measurement where σ_s ≥ n, in [0, 1].
        start: Scale, dtype and device of the initial state, as in ``ss.solve``.
        seed: Seed of the noise: an integer, one integer for each sample, or a :class:`Noise`.
        progress: True for a progress bar in a terminal or notebook; ``"always"`` shows it everywhere.

    References:
        | Denoising Diffusion Restoration Models (Kawar et al., 2022), arXiv:2201.11793
    """
    problem, seen, times = make_problem(model, measurement, shape_or_x, grid, start, seed)
    check.number("eta", eta, at_least=0, at_most=1)
    check.number("eta_b", eta_b, at_least=0, at_most=1)
    measurement = seen.whitened()
    sde, steps = model.sde, problem.steps
    std = 0.0 if measurement.std == 0 else measurement.require_noise("ddrm")
    d, of_state, to_state, of_data = measurement.linear.spectrum()
    x = problem.draw(times[0])
    d = d.to(x)
    y = of_data(measurement.data(x)) / d
    if not isinstance(shape_or_x, Tensor):  # draw the seen coordinates given y
        alpha, sigma = sde.alpha(times[0]), sde.sigma(times[0])
        left = sigma**2 - (alpha * std / d) ** 2
        c = of_state(x)
        x = x + to_state(torch.where(left > 0, alpha * y + left.clamp_min(0).sqrt() * c / sigma, c) - c)
    c_eps = math.sqrt(1 - eta**2)
    for k, (t, s) in enumerate(each(pairwise(times), progress, "ddrm")):
        x0 = problem.model.x0(x, t)
        alpha, sigma = sde.alpha(s), sde.sigma(s)
        z = steps.like(x, k)
        eps = (x - sde.alpha(t) * x0) / sde.sigma(t)
        x = alpha * x0 + sigma * (c_eps * eps + eta * z)
        n = alpha * std / d
        known, z_known = of_state(x0), of_state(z)
        sharp = alpha * ((1 - eta_b) * known + eta_b * y) + (sigma**2 - (eta_b * n) ** 2).clamp_min(0).sqrt() * z_known
        tiny = torch.finfo(x.dtype).tiny
        blunt = alpha * known + sigma * (c_eps * alpha * (y - known) / n.clamp_min(tiny) + eta * z_known)
        x = x + to_state(torch.where(sigma >= n, sharp, blunt) - of_state(x))
    return problem.solution(x, times)


@checked
@torch.no_grad()
def daps(
    model: AbstractDenoiser,
    measurement: Seen,
    shape_or_x: Sequence[int] | Tensor,
    grid: Grid = 20,
    *,
    steps: int = 5,
    solver: Solver | None = None,
    data_std: float = 1.0,
    langevin: int = 100,
    start: Start | Gaussian | None = None,
    seed: Seed = None,
    progress: bool | str = False,
) -> Solution:
    r"""Decoupled annealing (DAPS): at each noise level, solve to data, sample given y, and add noise again.

    .. math:: \hat x_0 = \text{flow}(x_t), \qquad
              x_0 \sim N(x_0; \hat x_0, r^2 I)\, N(y; A x_0, \mathrm{std}^2 I), \qquad
              x_s = \alpha_s x_0 + \sigma_s z, \qquad r^2 = \frac{\sigma^2 s^2}{\alpha^2 s^2 + \sigma^2}

    The distribution of x₀ given y is Gaussian for a linear A and Gaussian noise, and is then sampled exactly. For any
    other likelihood Langevin dynamics sample :math:`N(x_0; \hat x_0, r^2 I)\,p(y \mid x_0)`, as in the paper, here with
    an acceptance test and a step size for each sample, so that no step size has to be tuned.
    ``data_std=math.inf`` gives the paper's r = σ/α; use it only if σ/α is not much larger than the data.

    Arguments:
        model: Denoiser of the prior.
        measurement: Measurement with a likelihood and a differentiable operator.
        shape_or_x: Shape (B, *event), or a state at the first time.
        grid: Decreasing times, or a number of noise levels.
        steps: Number of steps of each inner solve; all of them together take about ``steps`` × levels evaluations.
        solver: Solver of the inner solves; by default DPM-Solver++ of order 2.
        data_std: Standard deviation s of the data in r².
        langevin: Number of Langevin steps at each noise level, for operators that are not linear and other noise than
            Gaussian; they evaluate the operator, not the network.
        start: Scale, dtype and device of the initial state, as in ``ss.solve``.
        seed: Seed of the noise: an integer, one integer for each sample, or a :class:`Noise`.
        progress: True for a progress bar in a terminal or notebook; ``"always"`` shows it everywhere.

    References:
        | Improving Diffusion Inverse Problem Solving with Decoupled Noise Annealing (Zhang et al., 2025),
          arXiv:2407.01521, algorithm 1
    """
    problem, seen, times = make_problem(model, measurement, shape_or_x, grid, start, seed)
    if data_std != math.inf:
        check.number("data_std", data_std, above=0)
    check.integer("langevin", langevin, at_least=1)
    seen.require_likelihood("daps")
    linear = isinstance(seen.operator, Linear) and seen.gaussian
    measurement, sde = seen.whitened() if linear else seen, model.sde
    inner_solver = DPMSolverPP(2) if solver is None else solver
    draws = problem.steps
    x = problem.draw(times[0])
    for k, (t, s) in enumerate(each(pairwise(times), progress, "daps")):
        inner = quadratic_vp(sde, steps if t > sde.t_min else 1, t_start=t)
        x0 = sample(problem.model, x, inner_solver, grid=inner, seed=draws.fork(k))
        ratio = sde.sigma(t) / max(sde.alpha(t), 1e-12)
        var = ratio**2 if data_std == math.inf else isotropic_variance(sde, t, data_std)
        if linear:
            x0 = _gaussian_draw(measurement, x0, var, draws, 3 * k)
        else:
            x0 = adjusted_langevin(measurement, x0, var, langevin, draws.fork(len(times) + k))
        x = sde.alpha(s) * x0 + sde.sigma(s) * draws.like(x, 3 * k + 2)
    return problem.solution(x, times)


def _gaussian_draw(measurement: Measurement, centre: Tensor, variance: float, draws: Noise, draw: int) -> Tensor:
    """Sample N(x₀; centre, variance I) N(y; A x₀, std²) by Matheron's rule, for a whitened measurement.

    The rule corrects a sample of the first factor with the residual of its own simulated measurement.
    """
    std, A = measurement.require_noise("daps"), measurement.linear
    drawn = centre + math.sqrt(variance) * draws.like(centre, draw)
    r = measurement.residual(drawn)
    r = r + std * draws.normal(r.shape, draw + 1, dtype=r.dtype, device=r.device)
    out: Tensor = drawn + variance * A.adjoint(A.solve(r, variance, std**2))
    return out


def adjusted_langevin(measurement: Measurement, centre: Tensor, variance: float, steps: int, noise: Noise) -> Tensor:
    r"""Sample :math:`N(x_0; c, r^2 I)\,p(y \mid x_0)` by the Metropolis-adjusted Langevin algorithm, from x₀ = c.

    .. math:: x' = x + h\nabla\log\pi(x) + \sqrt{2h}\,z

    The step size h of each sample adapts to an acceptance rate of 0.574, by less and less.

    Arguments:
        measurement: Measurement with a likelihood.
        centre: Centre c, (B, *event).
        variance: Variance r².
        steps: Number of steps.
        noise: Noise of the steps.

    References:
        | Exponential convergence of Langevin distributions and their discrete approximations (Roberts and Tweedie,
          1996), Bernoulli 2(4)
    """

    def target(x: Tensor) -> Tensor:
        return measurement.log_prob(x) - (x - centre).flatten(1).square().sum(1) / (2 * variance)

    def rows(values: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (centre.ndim - 1))

    x = centre
    log, slope = target(x), gradient(target, x, measurement)
    log_h = torch.full_like(log, math.log(0.5 * variance))
    for k in range(steps):
        h = log_h.exp()
        z = noise.like(x, 2 * k)
        new = x + rows(h) * slope + rows((2 * h).sqrt()) * z
        new_log, new_slope = target(new), gradient(target, new, measurement)
        back = (x - new - rows(h) * new_slope).flatten(1).square().sum(1) / (4 * h)
        ratio = new_log - log - back + 0.5 * z.flatten(1).square().sum(1)
        u = noise.uniform((len(x), 1), 2 * k + 1, dtype=x.dtype, device=x.device)[:, 0]
        accepted = u.log() < ratio
        x, slope = (torch.where(rows(accepted), a, b) for a, b in ((new, x), (new_slope, slope)))
        log = torch.where(accepted, new_log, log)
        chance = ratio.clamp_max(0).exp().nan_to_num(0.0)
        log_h = log_h + 2 / (1 + k) ** 0.6 * (chance - 0.574)
    return x


@checked
def red_diff(
    model: AbstractDenoiser,
    measurement: Seen,
    shape_or_x: Sequence[int] | Tensor,
    grid: Grid = 100,
    *,
    lr: float = 0.1,
    weight: float = 0.25,
    start: Start | None = None,
    seed: Seed = None,
    progress: bool | str = False,
) -> Solution:
    r"""Regularisation by denoising (RED-diff): Adam on a state μ, with one step for each time of the grid.

    .. math:: \nabla_\mu \tfrac12\lVert y - A(\mu)\rVert^2 + w\,\frac{\sigma}{\alpha}\,(\varepsilon_\theta(x_t) -
              \varepsilon), \qquad x_t = \alpha\mu + \sigma\varepsilon

    is the gradient in μ. The result is an optimum, not a posterior sample: its variance comes from the noise in the
    optimisation, not from the posterior.

    Arguments:
        model: Denoiser of the prior.
        measurement: Measurement with any differentiable operator. `weight` replaces one `std` of all entries; for other
            Gaussian noise ‖·‖² is weighted by Σ⁻¹, scaled to a mean weight of 1, and for other noise the first term is
            −log p(y | μ).
        shape_or_x: Initial state, or shape (B, *event) to start from A⁺y (from 0 if A is not linear).
        grid: Decreasing times, or a number of steps; a time with σ = 0 is skipped.
        lr: Learning rate of Adam.
        weight: Weight w of the regulariser.
        start: Dtype and device of the state, if a shape is given.
        seed: Seed of ε: an integer, one integer for each sample, or a :class:`Noise`.
        progress: True for a progress bar in a terminal or notebook; ``"always"`` shows it everywhere.

    References:
        | A Variational Perspective on Solving Inverse Problems with Diffusion Models (Mardani et al., 2024),
          arXiv:2305.04391, algorithm 1
    """
    problem, seen, times = make_problem(model, measurement, shape_or_x, grid, start, seed)
    draws, sde = problem.steps, model.sde
    if isinstance(shape_or_x, Tensor):
        mu = check.state("x", shape_or_x).detach().clone()
    else:
        dtype, device = problem.start.placement(model)
        mu = torch.zeros(check.shape("shape_or_x", shape_or_x), dtype=dtype, device=device)
        if isinstance(seen.operator, Linear):
            mu = mu + seen.operator.pinv(seen.data(mu))
    check.number("lr", lr, above=0)
    adam = torch.optim.Adam([mu.requires_grad_()], lr=lr, betas=(0.9, 0.99))
    for k, t in enumerate(each((t for t in times if sde.sigma(t) > 0), progress, "red_diff")):
        with torch.no_grad():
            at = before_silence(sde, t)
            alpha, sigma = sde.alpha(at), sde.sigma(at)
            eps = draws.like(mu, k)
            fit = gradient(lambda m: _misfit(seen, m), mu, seen)
            mu.grad = fit + weight * sigma / alpha * (problem.model.eps(alpha * mu + sigma * eps, at) - eps)
        adam.step()
    return problem.solution(mu.detach(), times)


def _misfit(seen: Measurement, x0: Tensor) -> Tensor:
    """Half the squared residual, weighted by Σ⁻¹; −log p(y | x0) if the noise is not Gaussian."""
    if type(seen) is not Measurement:
        return -seen.log_prob(x0)
    r = seen.residual(x0)
    if seen.covariance is None:
        return 0.5 * r.flatten(1).square().sum(1)
    return 0.5 * seen.covariance.whiten(r).square().sum(1) / seen.covariance.mean_precision().to(r)
