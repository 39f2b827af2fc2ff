"""Populations of weighted particles: weights, resampling, ancestry, and the estimate of log Z with its error."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.integrators.method import Solution
from scoresde.noise.keyed import Noise, as_noise
from scoresde.noise.streams import Stream
from scoresde.steering.resampling import Resampling, effective_size, multinomial, systematic


@dataclass(frozen=True, eq=False, kw_only=True)
class Steered(Solution):
    r"""Weighted particles of P problems, with the other fields of a :class:`Solution`.

    Arguments:
        x: Particles, (P, N, *event).
        log_weights: Normalised log-weights of the particles, (P, N), float64.
        log_potential: Log-potential r of the particles, (P, N).
        log_z: Estimate of log Z, (P,). Its exponential is an unbiased estimate of :math:`E[e^{r(x_0)}]` over the
            samples of the plan, for any number of particles.
        z_variance: Estimate of Var(Z) / Z² from the ancestry of one run, (P,). It may be negative by chance, and is NaN
            if all particles of a resampled population descend from one initial particle.
        ess: Effective sample size at every evaluation of the potential before resampling, and at the end, (K + 1, P).
        parents: Index of the parent of each particle at every evaluation of the potential, (K, P, N).

    References:
        | Variance Estimation in the Particle Filter (Lee and Whiteley, 2018), arXiv:1509.00394
    """

    log_weights: Tensor = field(repr=False)
    log_potential: Tensor = field(repr=False)
    log_z: Tensor
    z_variance: Tensor = field(repr=False)
    ess: Tensor = field(repr=False)
    parents: Tensor = field(repr=False)

    @property
    def log_z_error(self) -> Tensor:
        """Standard error of `log_z`, (P,): the root of `z_variance`, 0 where this is negative.

        It is that of the particles; the error of the steps of the plan stays for any number of them.
        It is noisy if particles are few. Independent runs as problems of one batch, and :meth:`merged`, give a better
        one.
        """
        return self.z_variance.clamp_min(0).sqrt()

    @checked
    def mean(self, fn: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Weighted mean of a function of the particles, for each problem, (P, ...).

        Arguments:
            fn: Function of samples (B, *event) that returns (B, ...); by default the samples themselves.
        """
        values = self.x.flatten(0, 1)
        values = values if fn is None else fn(values)
        w = self.log_weights.exp().flatten().to(values).reshape(-1, *[1] * (values.ndim - 1))
        weighted: Tensor = w * values
        return weighted.reshape(*self.log_weights.shape, *values.shape[1:]).sum(1)

    @checked
    def resampled(self, seed: int | Noise | None = None) -> Tensor:
        """Resample N particles of equal weight for each problem, (P, N, *event), by the systematic rule.

        Arguments:
            seed: Seed, or a :class:`Noise`.
        """
        shape = self.log_weights.shape
        u = as_noise(seed).fork(Stream.FINAL).uniform(shape, 0, dtype=torch.float64).to(self.log_weights.device)
        index = systematic(self.log_weights.exp(), u)
        return self.x[torch.arange(shape[0], device=index.device)[:, None], index]

    def lineage(self) -> Tensor:
        """Index of the ancestor of each final particle at every evaluation of the potential, (K, P, N)."""
        index = torch.arange(self.parents.shape[2], device=self.parents.device).expand(self.parents.shape[1:])
        found = []
        for parents in self.parents.flip(0):
            index = parents.gather(1, index)
            found.append(index)
        return torch.stack(found[::-1]) if found else self.parents

    def merged(self) -> Steered:
        """All problems as independent runs of one problem: one population of P N particles.

        Each run has the weight of its estimate of Z. The error of log Z is that of a mean over the runs, so it also
        holds where that of a single run cannot be estimated; it needs at least two runs.
        """
        P, N = self.log_weights.shape
        log_z = self.log_z.logsumexp(0) - math.log(P)
        share = (self.log_z - log_z).exp()  # of mean 1
        variance = share.var() / P if P > 1 else self.z_variance[0]
        weights = (self.log_weights + self.log_z[:, None] - log_z - math.log(P)).reshape(1, P * N)
        offset = N * torch.arange(P, device=self.parents.device)[:, None]
        merged = Steered(
            x=self.x.reshape(1, P * N, *self.x.shape[2:]),
            nfe=self.nfe,
            calls=self.calls,
            times=self.times,
            seed=self.seed,
            plan=self.plan,
            log_weights=weights,
            log_potential=self.log_potential.reshape(1, P * N),
            log_z=log_z[None],
            z_variance=variance[None],
            ess=torch.cat([self.ess[:-1].sum(1), effective_size(weights)])[:, None],
            parents=(self.parents + offset).reshape(len(self.parents), 1, P * N),
        )
        object.__setattr__(merged, "sde", self.sde)
        return merged


class Weighted(TypedDict):
    """The fields of :class:`Steered` that come from the weights."""

    log_weights: Tensor
    log_z: Tensor
    z_variance: Tensor
    ess: Tensor
    parents: Tensor


class Population:
    """The weights of P populations of N particles during a run.

    Arguments:
        problems: Number P of populations.
        particles: Number N of particles of each.
        resampling: Rule of resampling.
        noise: Noise of the run, keyed by problem.
        device: Device of the particles.
    """

    def __init__(
        self, problems: int, particles: int, resampling: Resampling, noise: Noise, device: torch.device
    ) -> None:
        self.shape = (problems, particles)
        self.resampling = resampling
        self.choices = noise.fork(Stream.CHOICES)
        self.log_w = torch.zeros(self.shape, dtype=torch.float64, device=device)
        self.log_z = torch.zeros(problems, dtype=torch.float64, device=device)
        self.roots = torch.arange(particles, device=device).expand(self.shape)
        self.events = torch.zeros(problems, dtype=torch.float64, device=device)
        self.ess: list[Tensor] = []
        self.parents: list[Tensor] = []
        self.finite = check.Finite("the log-weights of the particles")

    def add(self, log_factor: Tensor, t: float | Tensor) -> None:
        """Multiply the weights by a factor.

        Arguments:
            log_factor: Logarithm of the factor of each particle, (P N,); −∞ removes a particle.
            t: Time, for the error message of a factor that is not a number.
        """
        factor = log_factor.detach().double().reshape(self.shape)
        lost = self.log_w == -math.inf  # its twists are −∞, and their difference is not a number
        factor = torch.where(lost | (factor == -math.inf), 0.0, factor)
        self.finite.add(factor, float(t))
        self.log_w = torch.where(log_factor.reshape(self.shape) == -math.inf, -math.inf, self.log_w + factor)

    def settle(self) -> Tensor | None:
        """Resample the populations that need it; return the index of all particles, (P N,), or None."""
        ess = effective_size(self.log_w)
        self.ess.append(ess)
        P, N = self.shape
        own = torch.arange(N, device=ess.device).expand(self.shape)
        below = (ess < self.resampling.threshold * N * (1 - 1e-9)) & (ess > 0)
        if not bool(below.any()):
            self.parents.append(own)
            return None
        u = self.choices.uniform(self.shape, len(self.parents), dtype=torch.float64).to(ess.device)
        weights = self.log_w.softmax(1).nan_to_num(0.0)
        weights = torch.where(below[:, None], weights, 1.0 / N)  # a population without weight stays as it is
        index = torch.where(below[:, None], self.resampling.choose(weights, u), own)
        self.log_z = torch.where(below, self.log_z + log_mean(self.log_w), self.log_z)
        self.log_w = torch.where(below[:, None], 0.0, self.log_w)
        self.roots = self.roots.gather(1, index)
        self.events = self.events + below
        self.parents.append(index)
        return (index + N * torch.arange(P, device=index.device)[:, None]).flatten()

    def variance(self) -> Tensor:
        r"""Estimate of the relative variance of Z, (P,), from the roots E of the final particles.

        .. math:: 1 - \left(\frac{N}{N - 1}\right)^{m + 1} \sum_{E_i \neq E_j} W_i W_j

        After m multinomial resamplings it is unbiased if multiplied by Z². Each of them adds about 1/N to the sum of
        the squared weights of families, which the factor takes away again. The other rules add next to nothing, so
        they count as m = 0 here.
        """
        P, N = self.shape
        weights = self.log_w.softmax(1).nan_to_num(0.0)
        of_root = torch.zeros_like(weights).scatter_add_(1, self.roots, weights)
        together = of_root.square().sum(1)
        noisy = self.resampling.rule in ("multinomial", multinomial)
        events = self.events if noisy else torch.zeros_like(self.events)
        scale = (N / (N - 1)) ** (events + 1) if N > 1 else torch.full_like(events, math.inf)
        variance = 1 - scale * (1 - together)
        alone = (self.events > 0) & (self.roots == self.roots[:, :1]).all(1)
        return torch.where(alone | variance.isnan(), math.nan, variance)

    def warn_if_collapsed(self) -> None:
        """Warn if fewer than two particles had all the weight at a time, or if all descend from one initial particle.

        Populations of less than 20 particles collapse by chance, and runs of a batch of many may: no warning there.
        """
        few = torch.stack(self.ess).amin(0) < 2
        single = self.variance().isnan()
        collapsed = (few | single) & (self.log_w > -math.inf).any(1)
        P, N = self.shape
        if N >= 20 and int(collapsed.sum()) > P // 10:
            warnings.warn(
                f"the particles collapsed in {int(collapsed.sum())} of {P} problems: the effective sample size fell to "
                f"{float(torch.stack(self.ess)[:, collapsed].amin()):.2g} of {N}, or all particles descend from one; "
                f"mean and log Z are not reliable. Take a twist that is less sure at high noise, "
                f"Reward(fn, anneal=lambda t: (1 - t) ** 2) or Smoothed(potential), or more `particles`.",
                stacklevel=check.levels_to_user(),
            )

    def result(self) -> Weighted:
        """The fields of :class:`Steered` that come from the weights; raises an error if one is not a number."""
        self.finite.require()
        self.ess.append(effective_size(self.log_w))
        log_z = self.log_z + log_mean(self.log_w)
        empty = (log_z == -math.inf)[:, None]
        if bool(empty.any()):
            warnings.warn(
                f"no particle has weight in {int(empty.sum())} of {len(log_z)} problems, the first is problem "
                f"{int(empty.flatten().nonzero()[0])}; take more particles, or a twist that is finite further out.",
                stacklevel=check.levels_to_user(),
            )
        return {
            "log_weights": torch.where(empty, -math.log(self.shape[1]), self.log_w.log_softmax(1)),
            "log_z": log_z,
            "z_variance": self.variance(),
            "ess": torch.stack(self.ess),
            "parents": torch.stack(self.parents),
        }


def log_mean(log_w: Tensor) -> Tensor:
    """Logarithm of the mean weight of each population, (P, N) to (P,)."""
    return log_w.logsumexp(1) - math.log(log_w.shape[1])
