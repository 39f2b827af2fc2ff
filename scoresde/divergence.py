r"""Traces of Jacobians: exact, by probes, and by Hutch++.

For a function f of rows, f(x)_b a function of x_b alone, the divergence of each row is the trace of its Jacobian,

.. math:: \mathrm{div} f = \mathrm{tr} J = \sum_i e_i^T J e_i = E[v^T J v], \qquad E[v v^T] = I.

A product J v of all rows costs about one evaluation, and many of them go through the network in one call.
Knows nothing of diffusion.

References:
    | A Stochastic Estimator of the Trace of the Influence Matrix (Hutchinson, 1989), doi:10.1080/03610918908812806
    | Hutch++: Optimal Stochastic Trace Estimation (Meyer et al., 2021), arXiv:2010.09649
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.noise import Noise

METHODS = ("exact", "hutchinson", "hutch++")
AUTODIFF = ("reverse", "forward", "loop")
PROBES = ("orthogonal", "rademacher", "gaussian")
_AT_ONCE = 1 << 22  # numbers of all the tangents that go through the network together
Function = Callable[[Tensor], Tensor]


def jacobian_products(f: Function, x: Tensor, *, autodiff: str = "reverse", chunk: int = 0) -> Function:
    """Products of each row's Jacobian with vectors, as a function of them.

    Arguments:
        f: A function of (B, *event) to the same shape, row by row.
        x: Where, (B, *event).
        autodiff: ``"reverse"`` for Jᵀv and ``"forward"`` for J v, many vectors in one call; ``"loop"`` for Jᵀv one
            backward pass at a time, which asks nothing of a network but a gradient. All have the same trace; the first
            and the last evaluate f once, the second keeps no activations.
        chunk: How many vectors go through the network at once; 0 to choose by their size.

    Returns:
        A function of (K, B, *event) to the same shape.
    """
    step = chunk or max(1, _AT_ONCE // max(1, x.numel()))
    if autodiff == "loop":
        return _one_by_one(f, x)
    if autodiff == "reverse":
        pull = torch.func.vjp(f, x)[1]
        one = torch.func.vmap(lambda u: pull(u)[0])
    else:
        one = torch.func.vmap(lambda u: torch.func.jvp(f, (x,), (u,))[1], randomness="same")

    def products(v: Tensor) -> Tensor:
        with warnings.catch_warnings():  # torch warns of its own code where it first differentiates forward
            warnings.filterwarnings("ignore", ".*torch.jit.script.*", DeprecationWarning)
            return torch.cat([one(v[k : k + step]) for k in range(0, len(v), step)])

    return products


def _one_by_one(f: Function, x: Tensor) -> Function:
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        y = x if graph and x.requires_grad else x.detach().requires_grad_()
        out = f(y)

    def products(v: Tensor) -> Tensor:
        if not out.requires_grad:
            return torch.zeros_like(v)
        with torch.enable_grad():
            pulled = [
                torch.autograd.grad(out, y, u, retain_graph=True, create_graph=graph, materialize_grads=True)[0]
                for u in v
            ]
        return torch.stack(pulled)

    return products


@dataclass(frozen=True)
class Divergence:
    r"""A way to take the trace, with its probes; one for a whole solve, so that the integrand is smooth.

    Independent probes have an error that falls as 1/√K. Orthogonal ones, √D times K columns of a random rotation, are
    drawn from D of them without replacement, and the error falls as √((1 − K/D)/K): nothing is left at K = D. Hutch++
    takes the trace on the span of J S, S being `rank` of the probes, and samples its complement by such columns.

    Arguments:
        method: One of ``"exact"``, ``"hutchinson"``, ``"hutch++"``.
        probes: Vectors with E[v vᵀ] = I, (K, B, *event); None where the trace is exact.
        rank: How many of the probes Hutch++ spends on finding the range.
        population: Out of how many directions the samples are drawn; infinite where they are independent.
        autodiff: As in :func:`jacobian_products`.
        chunk: As in :func:`jacobian_products`.
    """

    method: str
    probes: Tensor | None
    rank: int = 0
    population: float = math.inf
    autodiff: str = "reverse"
    chunk: int = 0

    @classmethod
    def make(
        cls, method: str, n_probes: int, kind: str, noise: Noise, x: Tensor, autodiff: str, chunk: int
    ) -> Divergence:
        """Draw the probes for a state `x`; row b's depend on the seed and on sample b alone."""
        check.choice("divergence", method, METHODS)
        check.choice("probe", kind, PROBES)
        check.choice("autodiff", autodiff, AUTODIFF)
        check.integer("n_probes", n_probes, least=1)
        check.integer("chunk", chunk)
        if method == "exact":
            return cls(method, None, autodiff=autodiff, chunk=chunk)
        size = math.prod(x.shape[1:])
        if method == "hutch++":
            if n_probes < 3:
                raise ValueError(
                    f"`n_probes` must be at least 3 for divergence='hutch++', which spends two thirds of the products "
                    f"on the range, got {n_probes}; use 'hutchinson'."
                )
            rank = n_probes // 3
            if n_probes - rank >= size:
                raise ValueError(
                    f"`n_probes` = {n_probes} is no less than an exact trace takes, events being of {size} numbers; "
                    f"use divergence='exact'."
                )
            draws = torch.stack([noise.like(x, j) for j in range(n_probes - rank)])
            return cls(method, draws, rank, size - rank, autodiff, chunk)
        if kind == "orthogonal":
            draws = torch.stack([noise.like(x, j) for j in range(min(n_probes, size))])
            return cls(method, _to_rows(size**0.5 * _orthonormal(draws), draws), 0, size, autodiff, chunk)
        draws = torch.stack([noise.like(x, j) for j in range(n_probes)])
        probes = draws.sign() if kind == "rademacher" else draws
        return cls(method, probes, autodiff=autodiff, chunk=chunk)

    def rows(self, rows: Tensor) -> Divergence:
        """For some of the rows."""
        if self.probes is None:
            return self
        return replace(self, probes=self.probes[:, rows])

    def products(self, x: Tensor) -> int:
        """How many products with the Jacobian one trace costs."""
        return math.prod(x.shape[1:]) if self.probes is None else len(self.probes) + self.rank

    @property
    def samples(self) -> int:
        """How many independent estimates a trace returns."""
        return 1 if self.probes is None else len(self.probes) - self.rank

    def __call__(self, f: Function, x: Tensor) -> Tensor:
        """Estimates of the trace, (K, B): their mean is unbiased, and with K = 1 and no probes it is exact."""
        times = jacobian_products(f, x, autodiff=self.autodiff, chunk=self.chunk)
        if self.probes is None:
            return _exact(times, x, self.chunk or max(1, _AT_ONCE // max(1, x.numel())))[None]
        if self.rank == 0:
            return _dot(self.probes, times(self.probes))
        sketch = times(self.probes[: self.rank])
        basis = _to_rows(_orthonormal(torch.cat([sketch, self.probes[self.rank :]])), self.probes)
        terms = _dot(basis, times(basis))
        return terms[: self.rank].sum(0) + self.population * terms[self.rank :]

    def standard_error(self, estimates: Tensor) -> Tensor:
        """Standard error of the mean of estimates (K, B), which a single one cannot tell."""
        K = len(estimates)
        if self.probes is None or self.population <= K:
            return torch.zeros_like(estimates[0])
        if K == 1:
            return torch.full_like(estimates[0], math.nan)
        return estimates.std(0) * math.sqrt(1 / K - 1 / self.population)


def _orthonormal(v: Tensor) -> Tensor:
    """Columns that span each row's vectors in turn, (K, B, *event) to (B, D, K)."""
    q: Tensor = torch.linalg.qr(v.flatten(2).permute(1, 2, 0))[0]
    return q


def _to_rows(q: Tensor, like: Tensor) -> Tensor:
    return q.permute(2, 0, 1).reshape(-1, *like.shape[1:])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(2).sum(2)


def _exact(times: Function, x: Tensor, step: int) -> Tensor:
    size = math.prod(x.shape[1:])
    trace = x.new_zeros(len(x))
    for start in range(0, size, step):
        i = torch.arange(start, min(start + step, size), device=x.device)
        unit = torch.nn.functional.one_hot(i, size).to(x.dtype)
        out = times(unit.reshape(len(i), 1, *x.shape[1:]).expand(-1, *x.shape)).flatten(2)
        trace = trace + out[torch.arange(len(i), device=x.device), :, i].sum(0)
    return trace
