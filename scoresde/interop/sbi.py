r"""Score and flow-matching estimators of the package sbi as denoisers, and their posteriors under our solvers.

sbi's estimators are of a parameter θ given an observation x_o. Their processes, in our terms, are

=========================  =====================================  ========================================
estimator                  θ_t = α θ + σ ε                        process of the denoiser
=========================  =====================================  ========================================
``VPScoreEstimator``       α = exp(−B/2), σ² = 1 − exp(−B)        :class:`VP`, same β (default 0.01 … 10)
``SubVPScoreEstimator``    α = exp(−B/2), σ = 1 − exp(−B)         :class:`SubVP`, same β
``VEScoreEstimator``       α = 1, σ = σ_min (σ_max/σ_min)^t       :class:`EDM`, whose time is σ
``FlowMatchingEstimator``  α = 1 − t, σ = t + s, a constant s     :class:`Flow`, whose time is (t + s)/(1 + s)
=========================  =====================================  ========================================

The last is divided by 1 + s, which makes α + σ = 1; the velocity stays the same. Samples are then those at σ = 0, while
sbi's own end at its smallest time, with the noise of that time.

References:
    | Sequential Neural Score Estimation (Sharrock et al., 2024), arXiv:2210.04872
    | Flow Matching for Scalable Simulation-Based Inference (Wildberger et al., 2023), arXiv:2305.17161
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from scoresde._doors import checked
from scoresde.data import Standardize
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.card import Card
from scoresde.denoisers.gaussian import Gaussian
from scoresde.denoisers.network import Denoiser
from scoresde.integrators.method import Method
from scoresde.likelihood.flow import Tolerance
from scoresde.plan.table import Plan
from scoresde.processes.named import EDM, VP, Flow, SubVP
from scoresde.processes.sde import SDE
from scoresde.solvers.rule import Solver

if TYPE_CHECKING:
    from scoresde.interop.sbi_sampling import SolverPosterior


@checked
def from_sbi(estimator: object, x_o: Tensor | Sequence[float] | None = None) -> AbstractDenoiser:
    """Denoiser of θ from an estimator of sbi's NPSE or FMPE.

    The z-scoring of θ and of x that sbi put into the estimator stays there. An estimator with composed standardisation
    works on z = (θ − shift)/scale; the card of the denoiser has this map as ``scale``. The card also has sbi's base
    distribution as ``gaussian``: use it as the start, since sbi's default VP process keeps a signal of 8 % at T.

    Arguments:
        estimator: Estimator, such as that which ``inference.train()`` returns, or sbi's posterior with one.
        x_o: Observation, of the estimator's ``condition_shape``. Without it the denoiser has the condition ``x_o``, one
            row for each sample.

    Returns:
        A :class:`Denoiser`, whose condition is fixed if `x_o` is given.
    """
    own = cast(Any, estimator_of(estimator))
    model = _denoiser(own)
    shape = tuple(own.input_shape)
    scale = None
    if own.compose_enabled:
        shift = own.from_z(torch.zeros(1, *shape, device=own.mean_base.device))[0]
        scale = Standardize(shift, own.from_z(torch.ones_like(shift)[None])[0] - shift)
    mean, std = (torch.broadcast_to(v, (1, *shape))[0].double() for v in (own.mean_0, own.std_0))
    model.card = Card(
        event=shape, conditions=("x_o",), scale=scale, gaussian=Gaussian(model.sde, mean, std.square()).to(mean.device)
    )
    return model if x_o is None else model.given(shared={"x_o": observation(own, x_o)})


@checked
def sbi_posterior(
    estimator: object,
    prior: torch.distributions.Distribution | None = None,
    solver: Solver | Plan | Method | None = None,
    *,
    nfe: int | None = None,
    grid: Tensor | Sequence[float] | None = None,
    tolerance: Tolerance | None = None,
) -> SolverPosterior:
    """Posterior for sbi's analysis tools that samples with a solver of this library.

    Arguments:
        estimator: Estimator of NPSE or FMPE, or the posterior that sbi built from one.
        prior: Prior, by default that of the given posterior.
        solver: Solver, plan or method, as in ``ss.sample``; by default ``VelocityAB(3)``. (The default of ``ss.sample``
            for scores assumes a data prediction with an error of 1/α at high noise; sbi's networks have none.)
        nfe: Number of function evaluations of a solver, by default 20.
        grid: Times from noise to data, (N + 1,), instead of `nfe`.
        tolerance: Steps of ``log_prob``.
    """
    from scoresde.interop.sbi_sampling import SolverPosterior

    own, given = estimator_of(estimator), getattr(estimator, "prior", None)
    prior = prior if prior is not None else given
    if prior is None:
        raise ValueError("`prior` must be given with an estimator; only sbi's posteriors hold their prior.")
    made = SolverPosterior(own, prior, solver, nfe=nfe, grid=grid, tolerance=tolerance)
    observed = getattr(estimator, "default_x", None)
    if observed is not None:
        made.set_default_x(observed)
    return made


def estimator_of(source: object) -> nn.Module:
    """The vector field estimator in a posterior, or the estimator itself; an error for anything else.

    Arguments:
        source: Estimator or posterior of sbi.
    """
    from sbi.neural_nets.estimators.base import ConditionalVectorFieldEstimator

    own = cast(nn.Module, getattr(source, "vector_field_estimator", source))
    known = isinstance(own, ConditionalVectorFieldEstimator)
    if not known:
        raise TypeError(
            f"`estimator` must be a score or flow-matching estimator of sbi (NPSE or FMPE), or a posterior of one, got "
            f"{type(own).__name__}; other estimators of sbi are no diffusion models."
        )
    return own


def observation(estimator: nn.Module, x_o: Tensor | Sequence[float]) -> Tensor:
    """One observation as the row (1, *condition_shape) that an estimator needs.

    Arguments:
        estimator: Estimator of sbi.
        x_o: Observation.
    """
    own = cast(Any, estimator)
    shape, row = tuple(own.condition_shape), torch.as_tensor(x_o, dtype=torch.float32, device=own.mean_base.device)
    if tuple(row.shape) not in (shape, (1, *shape)):
        raise ValueError(
            f"`x_o` must be one observation of shape {shape}, got {tuple(row.shape)}. For one observation of each "
            f"sample use from_sbi(estimator).given(x_o=rows). For one θ behind several independent observations use "
            f"ss.inverse.TallPosterior(from_sbi(estimator), {{'x_o': rows}}, prior)."
        )
    return row.reshape(1, *shape)


class Estimator(nn.Module):
    """An estimator of sbi as a network of this library, ``net(θ, time, x_o=...)``.

    Arguments:
        estimator: Estimator of sbi.
        flow: Whether it returns the velocity of flow matching.
    """

    def __init__(self, estimator: nn.Module, flow: bool) -> None:
        super().__init__()
        self.estimator = estimator
        self.scale = 1 + cast(Any, estimator).noise_scale if flow else None

    def forward(self, x: Tensor, time: Tensor, *, x_o: Tensor) -> Tensor:
        """Score, or velocity, at states `x`, (B, *event), and sbi's times (B,), given `x_o`, (1 or B, *condition)."""
        own = cast(Any, self.estimator)
        out: Tensor
        if self.scale is None:
            out = own.score(input=x, condition=x_o.to(x), t=time)
        else:
            out = own(input=self.scale * x, condition=x_o.to(x), time=time)
        return out


def _denoiser(estimator: nn.Module) -> Denoiser:
    """The network with sbi's process and prediction."""
    from sbi.neural_nets.estimators import flowmatching_estimator as flow
    from sbi.neural_nets.estimators import score_estimator as score

    own = cast(Any, estimator)
    if isinstance(own, flow.FlowMatchingEstimator):
        s = float(own.noise_scale)
        sde: SDE = Flow(t_min=max(s / (1 + s), 1e-5))
        return Denoiser(Estimator(own, True), sde, predicts="velocity", time=partial(_flow_time, s))
    if not isinstance(own, score.ConditionalScoreEstimator):
        raise TypeError(
            f"`estimator` must be a ConditionalScoreEstimator or FlowMatchingEstimator, got {type(own).__name__}, "
            f"whose process is not known; make a Denoiser of its network by hand."
        )
    time = None
    known = [
        base
        for base in (score.VPScoreEstimator, score.SubVPScoreEstimator, score.VEScoreEstimator)
        if type(own).mean_t_fn is base.mean_t_fn and type(own).std_fn is base.std_fn
    ]
    if known == [score.VEScoreEstimator]:
        low, rate = float(own.sigma_min), math.log(own.sigma_max / own.sigma_min)
        first, last = (low * math.exp(rate * t) for t in (own.t_min, own.t_max))
        sde, time = EDM(T=last, t_min=first), partial(_ve_time, low, rate)
    elif known:
        kind = VP if known == [score.VPScoreEstimator] else SubVP
        sde = kind(float(own.beta_min), float(own.beta_max), T=float(own.t_max), t_min=float(own.t_min))
    else:
        alpha, sigma = (partial(_flat, fn) for fn in (own.mean_t_fn, own.std_fn))
        sde = SDE.from_functions(alpha, sigma, T=float(own.t_max), t_min=float(own.t_min))
    return Denoiser(Estimator(own, False), sde, predicts="score", time=time)


def _flow_time(s: float, t: Tensor) -> Tensor:
    """sbi's time of the time t of :class:`Flow`; 0 where the noise is less than sbi's smallest."""
    return ((1 + s) * t - s).clamp_min(0)


def _ve_time(low: float, rate: float, sigma: Tensor) -> Tensor:
    """sbi's time of a noise level σ."""
    return (sigma / low).log() / rate


def _flat(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """A function of sbi, which adds axes to its result, as an elementwise function."""
    return function(t.reshape(-1)).reshape(t.shape)
