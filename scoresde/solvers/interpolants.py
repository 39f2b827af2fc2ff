"""What a solver interpolates: a prediction, as a polynomial in a variable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.solvers.naming import show


def _constant(name: str) -> str:
    """Name of the constant: ``DATA`` for "data"; a call such as ``edm_prediction(0.5)`` stays as it is."""
    return name.upper() if name.isidentifier() else name


@checked
@dataclass(frozen=True)
class Prediction:
    r"""A linear prediction f = p x + q d to interpolate.

    Arguments:
        name: Name for printing.
        scale: Function N(α, σ), homogeneous of degree 1: the equation of x/N has no linear term if η = 0.
        p: Weight p(α, σ) of the state.
        q: Weight q(α, σ) of the data prediction; it depends on α/σ only.
        clock: Function c(λ) in which the kernel is constant if η = 0; finite wherever the prediction is defined.
        lam_of_clock: Inverse of `clock`.
        slope: Derivative dc/dλ as a function of c.
        needs_signal: Whether the prediction determines the data only where α > 0, default False.
        offset: Function B(λ), None by default: f − B is interpolated and B is integrated exactly.
    """

    name: str
    scale: Callable[[Tensor, Tensor], Tensor]
    p: Callable[[Tensor, Tensor], Tensor]
    q: Callable[[Tensor, Tensor], Tensor]
    clock: Callable[[Tensor], Tensor]
    lam_of_clock: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    needs_signal: bool = False
    offset: Callable[[Tensor], Tensor] | None = None

    def __repr__(self) -> str:
        return _constant(self.name)


DATA = Prediction(
    "data",
    scale=lambda alpha, sigma: sigma,
    p=lambda alpha, sigma: torch.zeros_like(sigma),
    q=lambda alpha, sigma: torch.ones_like(sigma),
    clock=lambda lam: lam.exp(),
    lam_of_clock=lambda c: c.log(),
    slope=lambda c: c,
)
"""The data prediction, d: DPM-Solver++; EDM calls it the denoiser."""

NOISE = Prediction(
    "noise",
    scale=lambda alpha, sigma: alpha,
    p=lambda alpha, sigma: 1 / sigma,
    q=lambda alpha, sigma: -alpha / sigma,
    clock=lambda lam: (-lam).exp(),
    lam_of_clock=lambda c: -c.log(),
    slope=lambda c: -c,
    needs_signal=True,
)
"""ε = (x − α d)/σ: DDIM, DPM-Solver, DEIS."""

VELOCITY = Prediction(
    "velocity",
    scale=lambda alpha, sigma: alpha + sigma,
    p=lambda alpha, sigma: 1 / sigma,
    q=lambda alpha, sigma: -(alpha + sigma) / sigma,
    clock=lambda lam: (-lam).sigmoid(),
    lam_of_clock=lambda c: torch.log1p(-c) - c.log(),
    slope=lambda c: -c * (1 - c),
)
"""ε − d, the velocity of x/(α + σ) in τ = σ/(α + σ): the flow-matching velocity, on any process."""

V = Prediction(
    "v",
    scale=lambda alpha, sigma: (alpha**2 + sigma**2).sqrt(),
    p=lambda alpha, sigma: alpha / (sigma * (alpha**2 + sigma**2).sqrt()),
    q=lambda alpha, sigma: -((alpha**2 + sigma**2).sqrt()) / sigma,
    clock=lambda lam: (-lam).exp().atan(),
    lam_of_clock=lambda c: -c.tan().log(),
    slope=lambda c: -c.sin() * c.cos(),
)
"""(α ε − σ d)/√(α² + σ²), the velocity in the angle atan(σ/α)."""


@checked
def edm_prediction(sigma_data: float) -> Prediction:
    """Make a prediction of EDM's network output F, with `sigma_data` as in :class:`Preconditioning`."""
    s = check.number("sigma_data", sigma_data, above=0)

    def root(alpha: Tensor, sigma: Tensor) -> Tensor:
        return (sigma**2 + s**2 * alpha**2).sqrt()

    return Prediction(
        f"edm_prediction({show(sigma_data)})",
        scale=root,
        p=lambda alpha, sigma: -alpha * s / (sigma * root(alpha, sigma)),
        q=lambda alpha, sigma: root(alpha, sigma) / (sigma * s),
        clock=lambda lam: ((-lam).exp() / s).atan(),
        lam_of_clock=lambda c: -(s * c.tan()).log(),
        slope=lambda c: -c.sin() * c.cos(),
    )


@checked
@dataclass(frozen=True)
class Variable:
    """A variable u in which predictions are interpolated.

    Arguments:
        name: Name for printing.
        of: Function u(λ, t) of two tensors; it may ignore one of them.
        uses_t: Whether `of` uses t, default False.
        infinite: Whether u is infinite where σ = 0, so that no extrapolation to σ = 0 exists; default False.
    """

    name: str
    of: Callable[[Tensor, Tensor], Tensor]
    uses_t: bool = False
    infinite: bool = False

    def __repr__(self) -> str:
        return _constant(self.name)


LAM = Variable("lam", lambda lam, t: lam, infinite=True)
"""λ = log(α/σ): the DPM-Solver family."""

RHO = Variable("rho", lambda lam, t: (-lam).exp())
"""ρ = σ/α: DEIS ρAB, linear multistep, EDM."""

TAU = Variable("tau", lambda lam, t: (-lam).sigmoid())
"""τ = σ/(α + σ): flow time."""

TIME = Variable("time", lambda lam, t: t, uses_t=True)
"""The time t of the process: DEIS tAB."""
