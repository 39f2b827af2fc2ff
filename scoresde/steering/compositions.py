r"""Products, mixtures and powers of models, sampled exactly in the limit: Feynman–Kac corrections.

The sum of the scores of two models is not the score of a noised product, so guidance by a sum does not sample
:math:`p^1 p^2`. Weights correct this. Take :math:`\pi_t = \Phi(p_t^1, \ldots, p_t^n)` at every noise level. With the
reverse steps :math:`p^i(x_s \mid x_t)` of the models and the noising step q, Bayes' rule gives, for any proposal K,

.. math:: \log p_s^i(x_s) = \log p_t^i(x_t) + \log\frac{p^i(x_s \mid x_t)}{q(x_t \mid x_s)}, \qquad
          w = \frac{\Phi(p_s(x_s))}{\Phi(p_t(x_t))}\,\frac{q(x_t \mid x_s)}{K(x_s \mid x_t)}.

The steps p^i(x_s | x_t) are Gaussians with the model's mean. With :math:`\varphi_i = \partial\log\Phi/\partial\log p^i`
and :math:`b = \sum_i\varphi_i`, the proposal is :math:`K \propto \prod_i p^i(x_s \mid x_t)^{\varphi_i}\,
q(x_t \mid x_s)^{1-b}`; as the steps become small, it is the reverse SDE with the score
:math:`\sum_i\varphi_i\nabla\log p_t^i` of π_t, and w are the weights of the Feynman–Kac equation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._printing import short
from scoresde._progress import each
from scoresde.denoisers.base import AbstractDenoiser, Counter, check_model, same_process
from scoresde.denoisers.gaussian import Gaussian
from scoresde.denoisers.modes import check_ready
from scoresde.denoisers.start import Start
from scoresde.grids.grid import check_grid
from scoresde.grids.spacings import uniform_lam
from scoresde.guidance.classifier import Graph, before_silence
from scoresde.noise.keyed import Noise
from scoresde.noise.streams import Stream
from scoresde.processes.sde import SDE
from scoresde.steering.driven import Grouped
from scoresde.steering.particles import Population, Steered
from scoresde.steering.potentials import Potential
from scoresde.steering.resampling import Resampling, Rule, as_resampling
from scoresde.steering.steer import Seed, begin

LogDensity = Callable[[Tensor], Tensor]
"""A function of the log-densities of n models, (n, B), that returns log Φ, (B,)."""


@checked
@dataclass(frozen=True, eq=False)
class Composition:
    r"""A density made from those of several models, :math:`\pi \propto \Phi(p^1, \ldots, p^n)`.

    :func:`product`, :func:`mixture` and :func:`power` make the usual ones. Others are a function of log-densities:

    Arguments:
        models: Denoisers on one process; each has its own conditions.
        log_density: Function log Φ of the log-densities, (n, B) to (B,), differentiable.

    Example:
        The third model times the mixture of the first two:

        >>> import torch, scoresde as ss
        >>> models = [ss.GaussianMixture(ss.VP(), torch.tensor([[m]]), std=0.5) for m in (-1.0, 1.0, 0.5)]
        >>> both = ss.steering.Composition(models, lambda log: log[2] + torch.logsumexp(log[:2], 0))
        >>> run = ss.steering.sample_composition(both, (1, 1), 60, particles=500, seed=0)
        >>> bool((run.mean() - 0.63).abs() < 0.1)
        True
    """

    models: Sequence[AbstractDenoiser]
    log_density: LogDensity

    def __post_init__(self) -> None:
        _check_models(self.models)

    @property
    def sde(self) -> SDE:
        """Process of all models."""
        return self.models[0].sde

    def exponents(self, logs: Tensor) -> tuple[Tensor, Tensor]:
        """log Φ, (B,), and its derivatives φ by the log-densities, (n, B).

        Arguments:
            logs: Log-densities, (n, B).
        """
        with torch.enable_grad():
            leaf = logs.detach().requires_grad_()
            value = self.log_density(leaf)
            if not isinstance(value, Tensor) or value.shape != logs.shape[1:]:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"`log_density` must map {tuple(logs.shape)} to {tuple(logs.shape[1:])}, got {got}.")
            (phi,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), phi


@checked
def product(models: Sequence[AbstractDenoiser], powers: Sequence[float] | None = None) -> Composition:
    r"""Product of powers, :math:`\pi \propto \prod_i (p^i)^{\beta_i}`.

    Powers 1 give a product of experts. Powers w and 1 − w of a conditional and the unconditional model give what
    classifier-free guidance of scale w aims at, :math:`p(x \mid c)^w\,p(x)^{1-w}`.

    Arguments:
        models: Denoisers on one process.
        powers: Powers β, by default 1; their sum must be positive.

    References:
        | Feynman-Kac Correctors in Diffusion (Skreta et al., 2025), arXiv:2503.02819
    """
    _check_models(models)
    beta = [1.0] * len(models) if powers is None else [check.number("powers", b) for b in powers]
    if len(beta) != len(models):
        raise ValueError(f"`powers` must have one entry for each of {len(models)} models, got {len(beta)}.")
    if sum(beta) <= 0:
        raise ValueError(f"`powers` must have a positive sum, got {sum(beta):g}; the product has no finite integral.")
    return Composition(models, lambda logs: (logs * logs.new_tensor(beta)[:, None]).sum(0))


@checked
def power(model: AbstractDenoiser, beta: float) -> Composition:
    r"""Power of a model, :math:`\pi \propto p^\beta`: the model at the temperature 1/β.

    Arguments:
        model: Denoiser.
        beta: Power β, positive; above 1 it sharpens the density.
    """
    return product([model], [check.number("beta", beta, above=0)])


@checked
def mixture(models: Sequence[AbstractDenoiser], weights: Sequence[float] | None = None) -> Composition:
    r"""Mixture of models, :math:`\pi = \sum_i w_i p^i`, with the score of the mixture at every noise level.

    Arguments:
        models: Denoisers on one process.
        weights: Weights w, positive; normalised to sum 1. By default equal.
    """
    _check_models(models)
    w = [1.0] * len(models) if weights is None else [check.number("weights", v, above=0) for v in weights]
    if len(w) != len(models):
        raise ValueError(f"`weights` must have one entry for each of {len(models)} models, got {len(w)}.")
    logs_w = [math.log(v / sum(w)) for v in w]
    return Composition(models, lambda logs: (logs + logs.new_tensor(logs_w)[:, None]).logsumexp(0))


@checked
@torch.no_grad()
def sample_composition(
    composition: Composition,
    shape_or_x: Sequence[int] | Tensor,
    grid: int | Tensor | Sequence[float] = 100,
    *,
    particles: int = 100,
    potential: Potential | None = None,
    variance: str = "trace",
    resample: str | Rule | Resampling = "systematic",
    start: Start | Gaussian | None = None,
    seed: Seed = None,
    progress: bool | str = False,
) -> Steered:
    r"""Sample a composition of models with weighted particles.

    The result is exact as the numbers of particles and steps grow. The means of the Gaussian steps are exact, so the
    variance v of :math:`p^i(x_s \mid x_t)` decides how many steps are needed. It is

    .. math:: v = v_{DDPM} + c_0^2\,\mathrm{Var}[x_0 \mid x_t], \qquad
              \mathrm{Var}[x_0 \mid x_t] \approx \frac{\sigma^2}{\alpha D}\,\mathrm{tr}\frac{\partial D}{\partial x_t},

    the trace from one backward pass with a random probe, or with ``variance="small"`` DDPM's alone. On isotropic
    Gaussian data the first is exact with any number of steps. The estimate of log Z is that of the integral
    :math:`\int\Phi(p^1, \ldots, p^n)\,e^r\,dx` over normalised models. If the exponents sum to more than 1, as in a
    product of experts, the weights have heavy tails: run several problems, and compare their log Z.

    Arguments:
        composition: Models and their composition.
        shape_or_x: Shape (P, *event) of P independent problems, or their particles at the first time, (P, N, *event),
            distributed as the prior with the power of the composition.
        grid: Decreasing times, or a number of steps of equal size in λ. The first time must have α > 0.
        particles: Number N of particles of each problem.
        potential: Potential r, for :math:`\pi\,e^r`; None for none.
        variance: Variance of the steps: ``"trace"`` or ``"small"``.
        resample: Rule of resampling, as in :func:`steer`.
        start: Scale, dtype and device of the initial particles, as in ``ss.solve``; without a Gaussian.
        seed: Seed of the noise: an integer, one integer for each problem, or a :class:`Noise`.
        progress: True for a progress bar in a terminal or notebook; ``"always"`` shows it everywhere.

    References:
        | Feynman-Kac Correctors in Diffusion (Skreta et al., 2025), arXiv:2503.02819

    Example:
        >>> import torch, scoresde as ss
        >>> left, right = (ss.GaussianMixture(ss.VP(), torch.tensor([[m]]), std=1.0) for m in (-0.5, 1.5))
        >>> run = ss.steering.sample_composition(ss.steering.product([left, right]), (1, 1), 30, particles=1000, seed=0)
        >>> bool((run.mean() - 0.5).abs() < 0.1)
        True
    """
    check.choice("variance", variance, ("trace", "small"))
    for model in composition.models:
        check_ready(model)
    sde, counter = composition.sde, Counter()
    times = _times(sde, grid)
    scale = _power_of(composition)
    x, noise, shape = begin(composition.models[0], shape_or_x, particles, times[0], start, seed)
    if isinstance(start, Gaussian) or (isinstance(start, Start) and start.gaussian is not None):
        raise ValueError(
            "`start` must have no Gaussian here, because the composition starts from a power of the prior."
        )
    if not isinstance(shape_or_x, Tensor):
        x = x / math.sqrt(scale)
    index = torch.arange(shape[0], device=x.device).repeat_interleave(shape[1])
    models = [model.rows(index).counted(counter) for model in composition.models]
    potential = None if potential is None else potential.rows(index)
    population = Population(*shape, as_resampling(resample), noise, x.device)
    chain = _Chain(composition, models, variance, Grouped(noise.fork(Stream.STEPS), shape), noise, shape)
    chain.open(x, times[0], 1.0 if start is None else start.data_std, scale)
    log_h: Tensor | float = 0.0
    factor = chain.log_factor
    every = population.resampling.every
    for k, (t, s) in enumerate(each(pairwise(times), progress, "composition")):
        chain.evaluate(t)
        if potential is not None and k % every == 0:
            new = potential.twist(chain.x, chain.x0(), t, sde).double()
            factor, log_h = factor + new - log_h, new
        population.add(factor, t)
        index_of = population.settle() if k % every == 0 else None
        if index_of is not None:
            chain.select(index_of)
            log_h = log_h[index_of] if isinstance(log_h, Tensor) else log_h
        factor = chain.step(t, s, k)
    final = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    if potential is not None:
        final = potential.log_value(chain.x).double()
    population.add(factor + final - log_h, times[-1])
    check.warn_unless_finite(chain.x.unflatten(0, shape))
    out = Steered(
        x=chain.x.unflatten(0, shape),
        nfe=-(-counter.states // max(1, len(x))),
        calls=counter.calls,
        times=times,
        seed=noise.seed,
        log_potential=final.unflatten(0, shape),
        **population.result(),
    )
    object.__setattr__(out, "sde", sde)
    return out


class _Chain:
    """The particles of a composition, with the log-density of each under every model.

    Arguments:
        composition: Composition.
        models: Its models, for the particles.
        variance: Variance of the steps.
        normals: Normals of the steps.
        noise: Noise of the run, for the probes.
        shape: Pair (P, N).
    """

    def __init__(
        self,
        composition: Composition,
        models: list[AbstractDenoiser],
        variance: str,
        normals: Grouped,
        noise: Noise,
        shape: tuple[int, int],
    ) -> None:
        self.composition, self.models, self.variance, self.normals = composition, models, variance, normals
        self.probes, self.shape = noise.fork(Stream.PROBES), shape
        self.sde = composition.sde
        self.draws = 0

    def open(self, x: Tensor, t: float, data_std: float, scale: float) -> None:
        """Set the first states, and weigh them by Φ of the prior over their own density."""
        prior = self.sde.prior(t, std=data_std)
        log = prior.log_prob(x.double())
        self.x, self.logs = x, log.expand(len(self.models), -1).clone()
        z = (x.double() / prior.std).flatten(1)
        own = -0.5 * scale * z.square().sum(1) - z.shape[1] * math.log(prior.std * math.sqrt(2 * math.pi / scale))
        self.log_phi, self.phi = self.composition.exponents(self.logs)
        self.log_factor = self.log_phi - own

    def evaluate(self, t: float) -> None:
        """Evaluate all models, and the variance of x₀ given x_t under each, (B,)."""
        self.x0s: list[Tensor] = []
        self.spreads: list[Tensor] = []
        at = float(before_silence(self.sde, t))
        for model in self.models:
            if self.variance == "small":
                self.x0s.append(model.x0(self.x, t))
                self.spreads.append(torch.zeros(len(self.x), dtype=torch.float64, device=self.x.device))
                continue
            graph = Graph(model, self.x, at, {})
            u = self.probes.uniform((self.shape[0], self.shape[1], *self.x.shape[1:]), self.draws, dtype=self.x.dtype)
            probe = (u.to(self.x) > 0.5).to(self.x).flatten(0, 1) * 2 - 1
            self.draws += 1
            trace = (probe * graph.pull(probe)).double().flatten(1).mean(1)
            flat = self.sde.sigma(at) ** 2 / self.sde.alpha(at)
            self.x0s.append(graph.x0.detach())
            self.spreads.append((flat * trace).clamp(0, flat / self.sde.alpha(at)))

    def x0(self) -> Tensor:
        """Mean of the models' data predictions by their exponents: where a twist is evaluated."""
        b = self.phi.sum(0)
        parts = [_column(phi / b, x0) * x0 for phi, x0 in zip(self.phi, self.x0s, strict=True)]
        return sum(parts, torch.zeros_like(self.x))

    def select(self, index: Tensor) -> None:
        """Keep what belongs to the parents of resampled particles."""
        self.x, self.log_phi = self.x[index], self.log_phi[index]
        self.logs, self.phi = self.logs[:, index], self.phi[:, index]
        self.x0s, self.spreads = [v[index] for v in self.x0s], [v[index] for v in self.spreads]

    def step(self, t: float, s: float, draw: int) -> Tensor:
        """Move the particles from time t to s; return the logarithm of the factor of their weights, (B,)."""
        c_t, c_0, small = self.sde.posterior(s, t)
        a, std = self.sde.transition(s, t)
        x, b = self.x, self.phi.sum(0)
        means = [c_t * x + c_0 * x0 for x0 in self.x0s]
        if small == 0 and self.variance == "small":  # point masses: the step has no density
            self.x = sum((_column(f / b, x) * m for f, m in zip(self.phi, means, strict=True)), torch.zeros_like(x))
            return torch.zeros_like(b)
        variances = [(small + c_0**2 * v).clamp_min(1e-30) for v in self.spreads]
        flat = (std / a) ** 2
        precision = (1 - b) / flat + sum(f / v for f, v in zip(self.phi, variances, strict=True))
        precision = precision.clamp_min(1 / flat)
        centre = _column((1 - b) / (flat * precision), x) * (x / a)
        for f, v, m in zip(self.phi, variances, means, strict=True):
            centre = centre + _column(f / (v * precision), x) * m
        new = centre + _column(precision.rsqrt(), x) * self.normals.like(x, draw)
        forward = _log_normal(x, a * new, new.new_tensor(std**2).double())
        self.logs = self.logs + torch.stack(
            [_log_normal(new, m, v) - forward for m, v in zip(means, variances, strict=True)]
        )
        before = self.log_phi
        self.log_phi, self.phi = self.composition.exponents(self.logs)
        self.x = new
        return self.log_phi - before + forward - _log_normal(new, centre, 1 / precision)


def _check_models(models: Sequence[AbstractDenoiser]) -> None:
    if not isinstance(models, tuple | list) or len(models) == 0:
        raise ValueError(f"`models` must be a list of at least one denoiser, got {short(models)}.")
    for i, model in enumerate(models):
        same_process(check_model(models[0], "models[0]"), check_model(model, f"models[{i}]"), f"models[{i}]")


def _times(sde: SDE, grid: int | Tensor | Sequence[float]) -> list[float]:
    """Times of the grid; the first has α > 0."""
    if check.is_integer(grid):
        first = float(before_silence(sde, sde.T))
        times = uniform_lam(sde, check.integer("grid", grid, at_least=1), t_start=first)
    else:
        times = check_grid(sde, grid)  # type: ignore[arg-type]
    if sde.alpha(float(times[0])) == 0:
        raise ValueError(
            f"`grid` must start where alpha > 0, because a power of pure noise has another scale than the process, got "
            f"t = {float(times[0]):g}; start at t = {before_silence(sde, sde.T):g}, or give a number of steps."
        )
    out: list[float] = times.tolist()
    return out


def _power_of(composition: Composition) -> float:
    """Sum of the exponents where all densities are equal, as for pure noise."""
    _, phi = composition.exponents(torch.zeros(len(composition.models), 1, dtype=torch.float64))
    b = float(phi.sum())
    if not b > 0:
        raise ValueError(f"`log_density` must grow with the densities, got exponents of sum {b:g} for equal densities.")
    return b


def _column(c: Tensor, x: Tensor) -> Tensor:
    return c.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _log_normal(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """log N(x; mean, variance I) of each row, float64; `variance` is () or (B,)."""
    square = (x.double() - mean.double()).flatten(1).square().sum(1)
    return -0.5 * (square / variance + x[0].numel() * (2 * math.pi * variance).log())
