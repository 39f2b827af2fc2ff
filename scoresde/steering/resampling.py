r"""Rules of resampling: which particles survive, from their weights.

Each rule maps normalised weights W, (P, N), and uniform numbers, (P, N), to the indices of N parents in each of P
populations. Every rule is unbiased: the expected number of children of particle i is :math:`N W_i`. They differ in the
variance of that number; residual, stratified and systematic resampling have less than multinomial resampling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked

Rule = Callable[[Tensor, Tensor], Tensor]
"""A function of weights (P, N), float64, and uniform numbers (P, N) that returns indices (P, N), int64."""


def multinomial(weights: Tensor, uniform: Tensor) -> Tensor:
    """N independent choices with the probabilities W.

    Arguments:
        weights: Normalised weights, (P, N).
        uniform: Uniform numbers in (0, 1), (P, N).

    References:
        | Comparison of Resampling Schemes for Particle Filtering (Douc et al., 2005), arXiv:cs/0507025
    """
    return _at(weights, uniform.sort(1).values)


def stratified(weights: Tensor, uniform: Tensor) -> Tensor:
    """One choice in each of N equal parts of (0, 1), with independent places.

    Arguments:
        weights: Normalised weights, (P, N).
        uniform: Uniform numbers in (0, 1), (P, N).

    References:
        | Comparison of Resampling Schemes for Particle Filtering (Douc et al., 2005), arXiv:cs/0507025
    """
    n = weights.shape[1]
    return _at(weights, (torch.arange(n, device=weights.device) + uniform) / n)


def systematic(weights: Tensor, uniform: Tensor) -> Tensor:
    """As :func:`stratified` with one place for all parts: a particle has ⌊N W⌋ or ⌈N W⌉ children.

    Arguments:
        weights: Normalised weights, (P, N).
        uniform: Uniform numbers in (0, 1), (P, N); the first of each row is used.

    References:
        | Comparison of Resampling Schemes for Particle Filtering (Douc et al., 2005), arXiv:cs/0507025
    """
    return stratified(weights, uniform[:, :1])


def residual(weights: Tensor, uniform: Tensor) -> Tensor:
    """⌊N W⌋ children of each particle, and multinomial resampling with what is left of the weights for the rest.

    Arguments:
        weights: Normalised weights, (P, N).
        uniform: Uniform numbers in (0, 1), (P, N).

    References:
        | Comparison of Resampling Schemes for Particle Filtering (Douc et al., 2005), arXiv:cs/0507025
    """
    n = weights.shape[1]
    sure = (n * weights * (1 + 1e-12)).floor()  # rounding must not turn N W = 3 into 2 children
    slots = torch.arange(n, dtype=weights.dtype, device=weights.device).expand_as(weights)
    placed = sure.sum(1, keepdim=True)
    of_sure = torch.searchsorted(sure.cumsum(1), slots.contiguous(), right=True)
    left = (n * weights - sure).clamp_min(0)
    total = left.sum(1, keepdim=True)
    of_rest = _at(torch.where(total > 0, left, 1.0), uniform)
    return torch.where(slots < placed, of_sure, of_rest).clamp_max(n - 1)


RULES: dict[str, Rule] = {
    "systematic": systematic,
    "stratified": stratified,
    "residual": residual,
    "multinomial": multinomial,
}


@checked
@dataclass(frozen=True)
class Resampling:
    """When and how particles are resampled.

    Arguments:
        rule: Rule: ``"systematic"``, ``"stratified"``, ``"residual"`` or ``"multinomial"``, or a function as
            :data:`Rule`.
        threshold: Fraction in [0, 1]; a population is resampled when its effective sample size is below this × N. With
            1 it is resampled whenever the weights are not all equal, with 0 never.
        every: Number of grid steps from one evaluation of the potential, and so from one possible resampling, to the
            next; larger than 1 for expensive potentials.
    """

    rule: str | Rule = "systematic"
    threshold: float = 0.5
    every: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.rule, str):
            check.choice("rule", self.rule, tuple(RULES))
        check.number("threshold", self.threshold, at_least=0, at_most=1)
        check.integer("every", self.every, at_least=1)

    def choose(self, weights: Tensor, uniform: Tensor) -> Tensor:
        """Indices of the parents, (P, N) int64.

        Arguments:
            weights: Normalised weights, (P, N).
            uniform: Uniform numbers in (0, 1), (P, N).
        """
        rule = RULES[self.rule] if isinstance(self.rule, str) else self.rule
        index = rule(weights, uniform)
        if not isinstance(index, Tensor) or index.shape != weights.shape or index.is_floating_point():
            got = tuple(index.shape) if isinstance(index, Tensor) else type(index).__name__
            raise ValueError(f"`rule` must return integer indices of shape {tuple(weights.shape)}, got {got}.")
        return index


def as_resampling(given: str | Rule | Resampling) -> Resampling:
    """A :class:`Resampling` from what users give: the name of a rule, a rule, or a :class:`Resampling`."""
    if isinstance(given, str):
        check.choice("resample", given, tuple(RULES))
    return given if isinstance(given, Resampling) else Resampling(given)


def effective_size(log_weights: Tensor) -> Tensor:
    r"""Effective sample size :math:`(\sum w)^2 / \sum w^2` of each population, (P,); 0 without weight.

    Arguments:
        log_weights: Log-weights, (P, N), normalised or not.

    References:
        | Sequential Imputations and Bayesian Missing Data Problems (Kong et al., 1994)
    """
    log = log_weights.double()
    size = (2 * log.logsumexp(-1) - (2 * log).logsumexp(-1)).exp()
    return size.nan_to_num(0.0)


def _at(weights: Tensor, places: Tensor) -> Tensor:
    """Indices of the particles whose interval of the cumulated weights holds each place."""
    edges = weights.cumsum(1)
    edges = edges / edges[:, -1:]
    return torch.searchsorted(edges, places.contiguous(), right=True).clamp_max(weights.shape[1] - 1)
