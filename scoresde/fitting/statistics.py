"""Statistics of a model, from which DPM-Solver-v3 makes its prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._numerics import Spline
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.modes import check_ready
from scoresde.noise.keyed import Noise
from scoresde.solvers.entry_statistics import EntryStatistics
from scoresde.solvers.statistics import Statistics, slope_spline

_ROUNDING = 8.0  # f below this multiple of its own rounding error counts as 0

_BEYOND = 2.0  # extension of the table of an exact model beyond t_min, in λ

_STEP = 1e-2  # step in λ of the difference quotient


@checked
def estimate_statistics(
    model: AbstractDenoiser,
    data: Tensor,
    *,
    n: int = 64,
    t_start: float | None = None,
    t_end: float | None = None,
    seed: int = 0,
) -> Statistics:
    r"""Estimate the statistics of a model: l from a trace estimate, s and b from a regression along the flow.

    .. math:: f = \frac{\sigma\varepsilon - l\,x}{\alpha}, \qquad
              l = \tfrac1D E\,\mathrm{tr}(\sigma\nabla_x\varepsilon), \qquad
              (s, b) = \arg\min E\left|\tfrac{df}{d\lambda} - s f - b\right|^2

    The noise and the random directions of the trace are the same at all λ, so that their error varies slowly with λ.
    Where f is within the standard error of l, s is that of Gaussian data, −2 (1 − l).

    Arguments:
        model: Differentiable denoiser; conditions belong to it, as in ``model.given(label=y)``.
        data: Batch of real data, (B, *event); 256 samples are enough.
        n: Number of values of λ.
        t_start: First time of sampling, by default T, or 0.999 T if α(T) = 0.
        t_end: Last positive time of the table, by default ``sde.t_min``; for an exact model two units of λ further.
        seed: Seed of the noise.

    References:
        | DPM-Solver-v3 (Zheng et al., 2023), arXiv:2310.13268, eqs. 5 to 11

    Example:
        >>> import scoresde as ss
        >>> model = ss.GaussianMixture(ss.VP(), [[0.3, -0.5]], std=0.8)
        >>> statistics = estimate_statistics(model, model.sample(64, t=0.0, seed=0), n=8)
        >>> ss.sample(model, (4, 2), ss.solvers.DPMSolverV3(statistics), steps=5, seed=0).shape
        torch.Size([4, 2])
    """
    lam = _knots(model, data, n, t_start, t_end)
    slopes, fits = _estimate(model, data, lam, seed, pooled=True)
    s, b = fits
    return Statistics(*(tuple(v.tolist()) for v in (lam, slopes, s, b)))


@checked
def estimate_entry_statistics(
    model: AbstractDenoiser,
    data: Tensor,
    *,
    n: int = 64,
    t_start: float | None = None,
    t_end: float | None = None,
    seed: int = 0,
) -> EntryStatistics:
    r"""Estimate the statistics of a model for each entry of a state, by the means of :func:`estimate_statistics`.

    They need more data, some thousand samples: the mean is over the samples only.

    Arguments:
        model: Differentiable denoiser; conditions belong to it, as in ``model.given(label=y)``.
        data: Batch of real data, (B, *event).
        n: Number of values of λ.
        t_start: First time of sampling, by default T, or 0.999 T if α(T) = 0.
        t_end: Last positive time of the table, by default ``sde.t_min``; for an exact model two units of λ further.
        seed: Seed of the noise.

    References:
        | DPM-Solver-v3 (Zheng et al., 2023), arXiv:2310.13268, eqs. 5 to 11
    """
    lam = _knots(model, data, n, t_start, t_end)
    slopes, (s, b) = _estimate(model, data, lam, seed, pooled=False)
    return EntryStatistics(lam, slopes, s, b)


def _knots(model: AbstractDenoiser, data: Tensor, n: int, t_start: float | None, t_end: float | None) -> Tensor:
    """Values of λ, evenly from the first to the last time."""
    sde = check_ready(model).sde
    check.state("data", data)
    check.integer("n", n, at_least=2)
    check.window(sde.T, t_start, t_end)
    first = t_start if t_start is not None else sde.T if sde.alpha(sde.T) > 0 else 0.999 * sde.T
    last = sde.lam(sde.t_min) + _BEYOND * model.kind.exact if t_end is None else sde.lam(t_end)
    return torch.linspace(sde.lam(first), last, n, dtype=torch.float64)


def _estimate(
    model: AbstractDenoiser, data: Tensor, lam: Tensor, seed: int, *, pooled: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The values l, (n, *event), or (n,) if entries are pooled; and those of s and b."""
    eps, probe = Noise(seed).like(data, 0), Noise(seed).like(data, 1).sign()
    slopes, errors, finite = [], [], check.Finite("the predictions or their derivatives")
    for t in map(model.sde.t_of_lam, lam.tolist()):
        x = model.sde.perturb(data, t, eps).requires_grad_()
        with torch.enable_grad():
            x0 = model.x0(x, t)
            (jd,) = torch.autograd.grad((x0 * probe).sum(), x)
        finite.add(torch.stack([x0, jd], 1), t)
        trace = model.sde.alpha(t) * (jd * probe).double()
        if pooled:
            trace = trace.flatten(1).mean(1)
        slopes.append(1 - trace.mean(0))
        errors.append(trace.var(0, correction=0) / len(trace))
    finite.require()  # before the regression, whose sums would hide the sample
    curve = torch.stack(slopes).cpu()
    spline = slope_spline(lam, curve)
    fits = [_regress(model, data, lam, spline, errors[i], i, eps, pooled) for i in range(len(lam))]
    s, b = zip(*fits, strict=True)
    return curve, (torch.stack(s).cpu(), torch.stack(b).cpu())


def _mean(v: Tensor, pooled: bool) -> Tensor:
    """Mean over the samples, and over the entries too if they are pooled."""
    return v.mean() if pooled else v.mean(0)


def _regress(
    model: AbstractDenoiser, data: Tensor, lam: Tensor, l_of: Spline, error: Tensor, i: int, eps: Tensor, pooled: bool
) -> tuple[Tensor, Tensor]:
    """Regress df/dλ at λ_i on f by differences of second order along the flow; return s and b.

    The regression is a ridge towards s = −2 (1 − l), the value of Gaussian data. Its strength is the variance that f
    has from the standard error of l, `error` is its square, and from rounding. Where f is not larger than this, as in
    data with symmetries at high noise, s would be a quotient of two errors.
    """
    sde, at = model.sde, float(lam[i])
    # Differences in the middle, and one-sided at the ends, since the flow is not defined beyond T.
    steps, factors = {0: ((0, 1, 2), (-1.5, 2.0, -0.5)), len(lam) - 1: ((0, -1, -2), (1.5, -2.0, 0.5))}.get(
        i, ((0, -1, 1), (0.0, -0.5, 0.5))
    )
    t, values, size = sde.t_of_lam(at), [], None
    with torch.no_grad():
        x = sde.perturb(data, t, eps)
        for k in steps:
            u = sde.t_of_lam(at + k * _STEP)
            y = _flow_step(model, x, t, u)
            d, place = model.x0(y, u).double(), y.double() / sde.alpha(u)
            l_u = l_of(torch.tensor(sde.lam(u), dtype=torch.float64)).to(place.device)
            values.append((1 - l_u) * place - d)
            size = ((1 - l_u) * place).square() + d.square() if size is None else size
    assert size is not None
    f, slope = values[0], sum(w * v for w, v in zip(factors, values, strict=True)) / _STEP
    assert isinstance(slope, Tensor)
    f_mean, slope_mean = _mean(f, pooled), _mean(slope, pooled)
    centred = f - f_mean
    line = x.double() / sde.alpha(t)
    ridge = error * _mean((line - _mean(line, pooled)).square(), pooled)
    ridge = ridge + (_ROUNDING * torch.finfo(data.dtype).eps) ** 2 * _mean(size, pooled)
    gaussian = -2 * (1 - l_of(lam[i])).to(f.device)
    s = (_mean(centred * slope, pooled) + ridge * gaussian) / (_mean(centred.square(), pooled) + ridge)
    return s, slope_mean - s * f_mean


def _flow_step(model: AbstractDenoiser, x: Tensor, s: float, t: float) -> Tensor:
    """Second-order step along the flow: DDIM with the data prediction at the midpoint in λ."""
    if s == t:
        return x
    sde = model.sde

    def ddim(d: Tensor, end: float) -> Tensor:
        ratio = sde.sigma(end) / sde.sigma(s)
        return ratio * x + (sde.alpha(end) - ratio * sde.alpha(s)) * d

    mid = sde.t_of_lam((sde.lam(s) + sde.lam(t)) / 2)
    return ddim(model.x0(ddim(model.x0(x, s), mid), mid), t)
