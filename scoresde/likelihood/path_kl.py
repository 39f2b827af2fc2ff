"""Error of a denoiser against another, and the Kullback–Leibler divergence of two reverse processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser, check_model
from scoresde.denoisers.modes import check_ready
from scoresde.likelihood.confidence import Uncertain
from scoresde.likelihood.elbo import Steps, squared_norm
from scoresde.noise.keyed import Noise
from scoresde.noise.streams import Stream
from scoresde.processes.sde import SDE


@dataclass(frozen=True)
class Estimate(Uncertain):
    """A mean over samples and its standard error.

    Arguments:
        value: Mean over samples.
        standard_error: Standard error of `value`, from the scatter over samples.
        nfe: Number of evaluations of each model for each sample.
        degrees: Degrees of freedom of `standard_error`: the number of samples minus 1.
    """

    value: Tensor
    standard_error: Tensor
    nfe: int
    degrees: float = math.nan


@checked
def denoiser_error(
    model: AbstractDenoiser,
    exact: AbstractDenoiser,
    data: Tensor,
    ts: Sequence[float] | Tensor,
    *,
    prediction: str = "eps",
    seed: int | Sequence[int] | Noise | None = None,
) -> Estimate:
    """Mean squared difference per entry between the predictions of two denoisers on noised data, at given times.

    Arguments:
        model: Denoiser.
        exact: Denoiser to compare with, on the same process, such as the exact one.
        data: Data, (B, *event), B ≥ 2.
        ts: Times.
        prediction: Prediction to compare: ``"eps"``, ``"x0"``, ``"score"``, ``"v"`` or ``"velocity"``.
        seed: Seed of the noise.

    Returns:
        An :class:`Estimate` with an entry for each time.
    """
    check.choice("prediction", prediction, ("eps", "x0", "score", "v", "velocity"))
    _same_process(model, exact)
    noise = (seed if isinstance(seed, Noise) else Noise(seed)).fork(Stream.DIFFUSED)
    means, errors, finite = [], [], check.Finite("the differences of the predictions")
    with torch.no_grad():
        for i, t in enumerate(float(t) for t in ts):
            x_t = model.sde.perturb(data, t, noise.like(data, i))
            a, b = getattr(model, prediction)(x_t, t), getattr(exact, prediction)(x_t, t)
            each = squared_norm(a - b) / math.prod(data.shape[1:])
            finite.add(each, t)
            means.append(each.mean())
            errors.append(each.std() / len(data) ** 0.5)
    finite.warn()
    return Estimate(torch.stack(means), torch.stack(errors), len(means), len(data) - 1)


@checked
def path_kl(
    model: AbstractDenoiser,
    other: AbstractDenoiser,
    data: Tensor,
    *,
    eta: float = 1.0,
    n_times: int = 32,
    data_std: float = 1.0,
    t_min: float | None = None,
    seed: int | Sequence[int] | Noise | None = None,
) -> Estimate:
    r"""KL divergence between the paths of the reverse SDEs of two models, from T to t_min, in nats.

    .. math:: \mathrm{KL} = \frac{(1+\eta^2)^2}{8\eta^2}\int g^2\,E|s_a - s_b|^2\,dt
              = \frac{(1+\eta^2)^2}{4\eta^2}\int e^{2\lambda}\,E|d_a - d_b|^2\,d\lambda

    The expectation is over noised data, which is the law of `model`'s paths if its score is that of `data`. The result
    is an upper bound on the KL divergence between the samples.

    Arguments:
        model: Denoiser a.
        other: Denoiser b on the same process.
        data: Data, (B, *event), B ≥ 2.
        eta: Stochasticity η > 0 of the SDEs.
        n_times: Number of times for each datum, uniform in :math:`\tfrac12\log(1 + s^2e^{2\lambda})`.
        data_std: Standard deviation s of the data, for the choice of times.
        t_min: End of the paths, by default that of the process.
        seed: Seed of times and noise.

    References:
        | Maximum Likelihood Training of Score-Based Diffusion Models (Song et al., 2021), arXiv:2101.09258, theorem 1
    """
    check.number("eta", eta, above=0)
    check.integer("n_times", n_times, at_least=1)
    sde = _same_process(model, other)
    noise = seed if isinstance(seed, Noise) else Noise(seed)
    source = noise.fork(Stream.DIFFUSED)
    steps = Steps.of(sde, "continuous", t_min, check.number("data_std", data_std, above=0))
    total, finite = data.new_zeros(len(data)), check.Finite("the differences of the predictions")
    with torch.no_grad():
        for i, (_, t, weight, _) in enumerate(steps.draw(n_times, 1, noise.fork(Stream.TIMES), data)):
            x_t = sde.perturb(data, t, source.like(data, i))
            gap = squared_norm(model.x0(x_t, t) - other.x0(x_t, t))
            finite.add(gap, t)
            total = total + weight * gap
    finite.warn()
    total = (1 + eta**2) ** 2 / (4 * eta**2) * total
    return Estimate(total.mean(), total.std() / len(data) ** 0.5, n_times, len(data) - 1)


def _same_process(a: AbstractDenoiser, b: AbstractDenoiser) -> SDE:
    if check_ready(a).sde != check_ready(check_model(b, "other")).sde:
        raise ValueError(f"the models have different processes, {a.sde!r} and {b.sde!r}; use Rescheduled for one.")
    return a.sde
