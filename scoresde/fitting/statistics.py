"""Statistics of a model, from which DPM-Solver-v3 makes its prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.modes import check_ready
from scoresde.noise.keyed import Noise
from scoresde.solvers.statistics import Statistics, interpolate

_RIDGE = 1e-3  # relative to the variance of the data

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

    Arguments:
        model: Differentiable denoiser; conditions belong to it, as in ``model.given(label=y)``.
        data: Batch of real data, (B, *event); 256 samples are enough.
        n: Number of values of λ.
        t_start: First time of sampling, by default T, or 0.999 T if α(T) = 0.
        t_end: Last positive time of sampling, by default ``sde.t_min``.
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
    sde = check_ready(model).sde
    check.state("data", data)
    check.integer("n", n, at_least=2)
    check.window(sde.T, t_start, t_end)
    first = t_start if t_start is not None else sde.T if sde.alpha(sde.T) > 0 else 0.999 * sde.T
    lam = torch.linspace(sde.lam(first), sde.lam(sde.t_min if t_end is None else t_end), n, dtype=torch.float64)
    noise, slopes, finite = Noise(seed), [], check.Finite("the predictions or their derivatives")
    for i, t in enumerate(map(sde.t_of_lam, lam.tolist())):
        x = sde.perturb(data, t, noise.like(data, 2 * i)).requires_grad_()
        with torch.enable_grad():
            probe = noise.like(data, 2 * i + 1).sign()
            x0 = model.x0(x, t)
            (jd,) = torch.autograd.grad((x0 * probe).sum(), x)
        finite.add(torch.stack([x0, jd], 1), t)
        slopes.append(1 - sde.alpha(t) * float((jd * probe).mean()))
    finite.require()  # before the regression, whose sums would hide the sample
    curve = torch.tensor(slopes, dtype=torch.float64)
    fits = [_regress(model, data, lam, curve, i, noise.like(data, 2 * i)) for i in range(n)]
    s, b = zip(*fits, strict=True)
    return Statistics(tuple(lam.tolist()), tuple(slopes), tuple(s), tuple(b))


def _regress(
    model: AbstractDenoiser, data: Tensor, lam: Tensor, curve: Tensor, i: int, eps: Tensor
) -> tuple[float, float]:
    """Regress df/dλ at λ_i on f by a central difference along the flow; return s and b."""
    sde, at = model.sde, float(lam[i])
    lo, hi = max(at - _STEP, float(lam[0])), min(at + _STEP, float(lam[-1]))
    t, values = sde.t_of_lam(at), []
    with torch.no_grad():
        x = sde.perturb(data, t, eps)
        for u in map(sde.t_of_lam, (lo, at, hi)):
            y = _flow_step(model, x, t, u)
            l_u = float(interpolate(lam, curve, torch.tensor([sde.lam(u)], dtype=torch.float64)))
            values.append(((1 - l_u) * y - sde.alpha(u) * model.x0(y, u)).double() / sde.alpha(u))
    slope, f = ((values[2] - values[0]) / (hi - lo)).reshape(-1), values[1].reshape(-1)
    centred = f - f.mean()
    # If f is almost constant, the regression is ill-conditioned and s has little effect; the ridge bounds s.
    s = float((centred * slope).mean() / (centred.square().mean() + _RIDGE * data.double().var()))
    return s, float(slope.mean()) - s * float(f.mean())


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
