r"""Divergence of a function: exact, by Hutchinson's estimator, and by Hutch++.

For a function f that acts on each row separately, the divergence of a row is the trace of its Jacobian,

.. math:: \mathrm{div} f = \mathrm{tr} J = \sum_i e_i^T J e_i = E[v^T J v], \qquad E[v v^T] = I.

A product J v of all rows costs about one evaluation of f, and one call computes many of them.

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
from scoresde._doors import checked
from scoresde.noise.keyed import Noise

KINDS = ("exact", "hutchinson", "hutch++")

AUTODIFF = ("reverse", "forward", "loop")

DISTRIBUTIONS = ("orthogonal", "rademacher", "gaussian")

DEFAULT_PROBES = 8

_MAX_ENTRIES = 1 << 22  # largest number of entries of the vectors of one call

Function = Callable[[Tensor], Tensor]


@checked
def jacobian_products(f: Function, x: Tensor, *, autodiff: str = "reverse", chunk: int = 0) -> Function:
    """Return a function that multiplies the Jacobian of each row by vectors.

    Arguments:
        f: Function of (B, *event) to the same shape, row by row.
        x: Point at which the Jacobian is taken, (B, *event).
        autodiff: Mode: ``"reverse"`` for Jᵀv and ``"forward"`` for J v, many vectors in one call; ``"loop"`` for Jᵀv by
            one backward pass for each vector, which needs only a gradient of f. All modes have the same trace.
            ``"reverse"`` and ``"loop"`` evaluate f once; ``"forward"`` stores no activations.
        chunk: Number of vectors in one call; 0 chooses it from their size.

    Returns:
        Function of vectors (K, B, *event) to the same shape.
    """
    check.choice("autodiff", autodiff, AUTODIFF)
    check.integer("chunk", chunk)
    return _linearize(f, x, autodiff, chunk)[0]


def _linearize(f: Function, x: Tensor, autodiff: str, chunk: int) -> tuple[Function, list[Tensor]]:
    """Products with the Jacobian, and a list that holds f(x) after the first of them."""
    step = chunk or max(1, _MAX_ENTRIES // max(1, x.numel()))
    if autodiff == "loop":
        return _one_by_one(f, x)
    value: list[Tensor] = []
    one: Function
    if autodiff == "reverse":
        out, pull, *_ = torch.func.vjp(f, x)
        value.append(out)
        one = torch.func.vmap(lambda u: pull(u)[0])
    else:
        push = torch.func.vmap(lambda u: torch.func.jvp(f, (x,), (u,)), randomness="same")

        def forward(v: Tensor) -> Tensor:
            outs: Tensor
            pushed: Tensor
            outs, pushed, *_ = push(v)
            value[:] = [outs[0]]
            return pushed

        one = forward

    def products(v: Tensor) -> Tensor:
        with warnings.catch_warnings():  # raised by torch's own code at the first forward-mode call
            warnings.filterwarnings("ignore", ".*torch.jit.script.*", DeprecationWarning)
            try:
                return torch.cat([one(v[k : k + step]) for k in range(0, len(v), step)])
            except NotImplementedError as error:
                if autodiff != "forward":
                    raise
                raise NotImplementedError(
                    f"`autodiff`='forward' cannot differentiate this model, because torch has no forward mode of one "
                    f"of its operations ({error}); use `autodiff`='reverse'."
                ) from None

    return products, value


def _one_by_one(f: Function, x: Tensor) -> tuple[Function, list[Tensor]]:
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

    return products, [out if graph else out.detach()]


@checked
@dataclass(frozen=True)
class Probes:
    """How the trace of a Jacobian is computed.

    Arguments:
        kind: Estimator: ``"exact"``, D products with the Jacobian for events of D numbers; ``"hutchinson"``, unbiased,
            `n` products; ``"hutch++"``, `n` products, more accurate where few directions carry the trace.
        n: Number of products of an estimated trace, by default 8.
        distribution: Distribution of Hutchinson's probes: ``"orthogonal"`` (default), ``"rademacher"`` or
            ``"gaussian"``.
        autodiff: Mode of differentiation, as in :func:`jacobian_products`. For denoisers that compute gradients
            themselves, such as :class:`MMPS`, ``"forward"`` also needs the forward mode of the network's backward pass,
            which torch lacks for SiLU and others; the error then says so.
        chunk: Number of products in one call; 0 chooses it from their size.

    References:
        | A Stochastic Estimator of the Trace of the Influence Matrix (Hutchinson, 1989)
        | Hutch++: Optimal Stochastic Trace Estimation (Meyer et al., 2021), arXiv:2010.09649
    """

    kind: str = "exact"
    n: int | None = None
    distribution: str | None = None
    autodiff: str = "reverse"
    chunk: int = 0

    def __post_init__(self) -> None:
        check.choice("kind", self.kind, KINDS)
        check.choice("autodiff", self.autodiff, AUTODIFF)
        check.integer("chunk", self.chunk)
        if self.n is not None:
            if self.kind == "exact":
                raise ValueError("`n` has no meaning with `kind`='exact', which takes no probes; drop one of the two.")
            check.integer("n", self.n, at_least=1)
            if self.kind == "hutch++" and self.n < 3:
                raise ValueError(
                    f"`n` must be at least 3 for `kind`='hutch++', which uses two thirds of the products for the "
                    f"range, got {self.n}; use `kind`='hutchinson'."
                )
        if self.distribution is not None:
            check.choice("distribution", self.distribution, DISTRIBUTIONS)
            if self.kind != "hutchinson":
                raise ValueError(
                    f"`distribution` has no meaning with `kind`={self.kind!r}, which draws no probes of choice; drop "
                    f"one of the two."
                )

    def draw(self, x: Tensor, noise: Noise) -> Divergence:
        """The estimator for states like `x`; the probes of row b depend only on the seed and on sample b.

        Arguments:
            x: States, (B, *event).
            noise: Noise of the probes.
        """
        if self.kind == "exact":
            return Divergence(self.kind, None, autodiff=self.autodiff, chunk=self.chunk)
        size = math.prod(x.shape[1:])
        n = DEFAULT_PROBES if self.n is None else self.n
        if self.kind == "hutch++":
            rank = n // 3
            if n - rank >= size:
                raise ValueError(
                    f"`n` = {n} costs no less than an exact trace of events of {size} numbers; use `kind`='exact'."
                )
            draws = torch.stack([noise.like(x, j) for j in range(n - rank)])
            return Divergence(self.kind, draws, rank, size - rank, self.autodiff, self.chunk)
        if self.distribution in (None, "orthogonal"):
            draws = torch.stack([noise.like(x, j) for j in range(min(n, size))])
            probes = _to_rows(size**0.5 * _orthonormal(draws), draws)
            return Divergence(self.kind, probes, 0, size, self.autodiff, self.chunk)
        draws = torch.stack([noise.like(x, j) for j in range(n)])
        probes = draws.sign() if self.distribution == "rademacher" else draws
        return Divergence(self.kind, probes, autodiff=self.autodiff, chunk=self.chunk)


def as_probes(probes: Probes | str) -> Probes:
    """Probes from what users give: :class:`Probes`, or the name of a kind."""
    if isinstance(probes, str):
        return Probes(check.choice("probes", probes, KINDS))
    if not isinstance(probes, Probes):
        raise TypeError(f"`probes` must be Probes or one of {', '.join(KINDS)}, got {type(probes).__name__}.")
    return probes


@dataclass(frozen=True)
class Divergence:
    r"""A trace estimator with its probes, which are the same during a whole solve, so that the integrand is smooth.

    Independent probes have an error of order 1/√K. Orthogonal probes are √D times K columns of a random rotation, drawn
    without replacement from its D columns; the error is of order √((1 − K/D)/K), and 0 at K = D. Hutch++ computes the
    trace on the span of J S, where S are `rank` of the probes, and estimates the rest from orthogonal columns.

    Arguments:
        kind: Estimator: ``"exact"``, ``"hutchinson"`` or ``"hutch++"``.
        probes: Vectors with E[v vᵀ] = I, (K, B, *event); None for the exact trace.
        rank: Number of probes that Hutch++ uses to find the range.
        population: Number of directions from which the samples are drawn; infinite for independent probes.
        autodiff: Mode of differentiation, as in :func:`jacobian_products`.
        chunk: Number of vectors in one call, as in :func:`jacobian_products`.
    """

    kind: str
    probes: Tensor | None
    rank: int = 0
    population: float = math.inf
    autodiff: str = "reverse"
    chunk: int = 0

    def rows(self, index: Tensor) -> Divergence:
        """The estimator of some samples.

        Arguments:
            index: Numbers of the samples, (b,).
        """
        if self.probes is None:
            return self
        return replace(self, probes=self.probes[:, index.to(self.probes.device, non_blocking=True)])

    def products(self, x: Tensor) -> int:
        """Number of Jacobian products that one trace costs."""
        return math.prod(x.shape[1:]) if self.probes is None else len(self.probes) + self.rank

    @property
    def samples(self) -> int:
        """Number of estimates that a trace returns."""
        return 1 if self.probes is None else len(self.probes) - self.rank

    def __call__(self, f: Function, x: Tensor) -> Tensor:
        """Estimates of the trace, (K, B), whose mean is unbiased; without probes K = 1 and the value is exact."""
        return self.with_value(f, x)[0]

    def with_value(self, f: Function, x: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates of the trace, (K, B), and f(x), which needs no further evaluation."""
        multiply, value = _linearize(f, x, self.autodiff, self.chunk)
        return self._estimates(multiply, x), value[0]

    def _estimates(self, multiply: Function, x: Tensor) -> Tensor:
        if self.probes is None:
            return _exact(multiply, x, self.chunk or max(1, _MAX_ENTRIES // max(1, x.numel())))[None]
        if self.rank == 0:
            return _dot(self.probes, multiply(self.probes))
        sketch = multiply(self.probes[: self.rank])
        basis = _to_rows(_orthonormal(torch.cat([sketch, self.probes[self.rank :]])), self.probes)
        terms = _dot(basis, multiply(basis))
        return terms[: self.rank].sum(0) + self.population * terms[self.rank :]

    @property
    def degrees(self) -> float:
        """Degrees of freedom of :meth:`standard_error`; infinite if the trace is exact."""
        exact = self.probes is None or self.population <= self.samples
        return math.inf if exact else self.samples - 1

    def standard_error(self, estimates: Tensor) -> Tensor:
        """Standard error of the mean of estimates (K, B): 0 if it is exact, NaN for a single estimate."""
        K = len(estimates)
        if self.probes is None or self.population <= K:
            return torch.zeros_like(estimates[0])
        if K == 1:
            return torch.full_like(estimates[0], math.nan)
        return estimates.std(0) * math.sqrt(1 / K - 1 / self.population)


def _orthonormal(v: Tensor) -> Tensor:
    """Orthonormal basis of the span of each row's vectors, (K, B, *event) to (B, D, K)."""
    q: Tensor = torch.linalg.qr(v.flatten(2).permute(1, 2, 0))[0]
    return q


def _to_rows(q: Tensor, like: Tensor) -> Tensor:
    return q.permute(2, 0, 1).reshape(-1, *like.shape[1:])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(2).sum(2)


def _exact(multiply: Function, x: Tensor, step: int) -> Tensor:
    size = math.prod(x.shape[1:])
    trace = x.new_zeros(len(x))
    for start in range(0, size, step):
        i = torch.arange(start, min(start + step, size), device=x.device)
        unit = torch.nn.functional.one_hot(i, size).to(x.dtype)
        out = multiply(unit.reshape(len(i), 1, *x.shape[1:]).expand(-1, *x.shape)).flatten(2)
        trace = trace + out[torch.arange(len(i), device=x.device), :, i].sum(0)
    return trace
