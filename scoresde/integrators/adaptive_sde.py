r"""The reverse SDE with error control for each sample, unbiased: a rejected step keeps its Brownian path.

Whether a step is accepted depends on its noise, so to throw that noise away and draw again keeps the small increments
and loses the large ones. Here the noise of every attempt is an increment of one path, and a
shorter step sees the first part of what the longer one saw. In the data prediction, with
:math:`h = \lambda_t - \lambda_s`, a step is

.. math::
    x^{(1)} &= \tfrac{\sigma_t}{\sigma_s} e^{-\eta^2 h} x_s - \alpha_t\,\mathrm{expm1}(-(1+\eta^2)h)\, d_s
               + \sigma_t e^{-\eta^2\lambda_t}\,(W(c_t) - W(c_s)), \qquad c = e^{2\eta^2\lambda}, \\
    x^{(2)} &= x^{(1)} + \alpha_t \left(1 + \tfrac{\mathrm{expm1}(-(1+\eta^2)h)}{(1+\eta^2)h}\right)
               (D(x^{(1)}, t) - d_s).

The noise is exact for any step; :math:`x^{(2)} - x^{(1)}` is the error that is controlled, and the next step starts
from :math:`x^{(2)}` and :math:`D(x^{(1)}, t)`, so that an attempt costs one evaluation.

References:
    | Variable Step Size Control in the Numerical Solution of Stochastic Differential Equations (Gaines & Lyons, 1997),
      doi:10.1137/S0036139995286515
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.start import device_of
from scoresde.noise.brownian import BrownianPath
from scoresde.noise.keyed import Noise
from scoresde.processes.sde import SDE

_START, _STEPS = 0, 1  # streams of a seed: the start, as in `solve`, and the path

_SAFETY, _LEAST, _MOST = 0.9, 0.2, 3.0

_LATTICE = 2.0**22  # times of steps, to one unit of λ

_EXPONENT = 1.0  # the error of a step goes as h^1.5, one h of the weight and √h of the noise in D; its share as √h


@dataclass(frozen=True)
class AdaptiveRun:
    """What an adaptive solve returns.

    Arguments:
        x: The result, (B, *event).
        nfe: Evaluations spent on each sample, (B,).
        accepted: Steps of each sample, (B,).
        rejected: Attempts of each sample that were repeated with a shorter step, (B,).
        calls: How often the network was called; samples that are done leave its batch.
        seed: The seed of the noise.
    """

    x: Tensor
    nfe: Tensor
    accepted: Tensor
    rejected: Tensor
    calls: int
    seed: int | tuple[int, ...] | None


def adaptive_sde(
    model: AbstractDenoiser,
    shape_or_x: Sequence[int] | Tensor,
    *,
    eta: float = 1.0,
    rtol: float = 0.05,
    atol: float = 0.05,
    first: float = 0.1,
    longest: float = 0.5,
    seed: int | Sequence[int] | Noise | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    denoise: bool = True,
    most: int = 10_000,
    data_std: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    **cond: Any,
) -> AdaptiveRun:
    r"""Solve the reverse SDE with a step for each sample.

    .. math:: \mathrm{error} = \mathrm{rms}\,\frac{x^{(2)} - x^{(1)}}{\mathrm{atol} + \mathrm{rtol}
              \max(|x_s|, |x^{(2)}|)} \le \sqrt h

    Errors of steps add up like noise, so a share of √h each keeps their sum at the tolerance. What is left of bias is
    that of the steps, proportional to the tolerance. Sample i takes the same steps in any batch. Errors are read back
    to the host.

    Arguments:
        model: A denoiser.
        shape_or_x: Shape (B, *event) to start from the prior at `t_start`, or a state at `t_start`.
        eta: 1 for the reverse SDE, or another positive number; 0 for the flow.
        rtol: Relative tolerance of a step.
        atol: Absolute tolerance of a step, in units of the state.
        first: First step, in λ.
        longest: Longest step, in λ: over a much longer one D may change and change back unseen.
        seed: An integer, one for each sample, a :class:`Noise`, or None for a fresh one.
        t_start: Where to start, by default T, or just before it where α vanishes.
        t_end: Where to stop, by default ``sde.t_min``; σ must not vanish there.
        denoise: Return E[x_0 | x] at `t_end`, one more evaluation, instead of x.
        most: Attempts after which it gives up.
        data_std: Standard deviation of the data, for the prior.
        dtype: Of the state, when a shape is given.
        device: Of the state, when a shape is given; by default the model's.
        **cond: Conditions, one row for each sample or the same for all, handed to the network.
    """
    check.conditions(cond, adaptive_sde)
    eta = check.number("eta", eta, at_least=0)
    for name, value in (("rtol", rtol), ("atol", atol)):
        check.number(name, value, at_least=0)
    if rtol + atol == 0:
        raise ValueError("`rtol` and `atol` are both 0, which no step can meet.")
    check.number("longest", longest, above=0)
    check.number("first", first, above=0, at_most=longest)
    sde = model.sde
    start, end = _window(sde, t_start, t_end)
    noise = seed if isinstance(seed, Noise) else Noise(seed)
    if isinstance(shape_or_x, Tensor):
        x = check.state("x", shape_or_x).clone()
    else:
        shape = tuple(check.integer("shape", n) for n in shape_or_x)
        where = device_of(model) if device is None else device
        x = sde.prior(start, std=data_std).sample(shape, noise.fork(_START), dtype=dtype, device=where)
    with torch.no_grad():
        x, accepted, rejected, calls = _solve(
            model, x, eta, rtol, atol, (first, longest), noise.fork(_STEPS), (start, end), most, cond
        )
        nfe = 1 + accepted + rejected
        if denoise:
            x, nfe, calls = model.x0(x, end, **cond), nfe + 1, calls + 1
    return AdaptiveRun(x, nfe, accepted, rejected, calls, noise.seed)


def _window(sde: SDE, t_start: float | None, t_end: float | None) -> tuple[float, float]:
    last = sde.T if sde.alpha(sde.T) > 0 else (1 - 1e-3) * sde.T
    start = last if t_start is None else check.number("t_start", t_start, above=0, at_most=sde.T)
    end = sde.t_min if t_end is None else check.number("t_end", t_end, at_least=0, below=start)
    if sde.alpha(start) == 0 or sde.sigma(end) == 0:
        raise ValueError(
            f"`t_start` = {start:g} and `t_end` = {end:g} must lie where neither α nor σ vanishes, such as {last:g} "
            f"and {sde.t_min:g}; `denoise`=True makes the last step to data."
        )
    return start, end


def _solve(
    model: AbstractDenoiser,
    x: Tensor,
    eta: float,
    rtol: float,
    atol: float,
    steps: tuple[float, float],
    noise: Noise,
    window: tuple[float, float],
    most: int,
    cond: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Every sample from its start to its end; λ, steps and counts on the CPU, in float64."""
    sde, B = model.sde, len(x)
    path = BrownianPath(noise, x.shape, dtype=x.dtype, device=x.device)
    lam_end = sde.lam(window[1])
    lam = torch.full((B,), sde.lam(window[0]), dtype=torch.float64)
    first, longest = steps
    h = torch.full((B,), first, dtype=torch.float64)
    accepted, rejected = torch.zeros(B, dtype=torch.int64), torch.zeros(B, dtype=torch.int64)
    d = model.x0(x, window[0], **cond)
    W = path.unit((2 * eta**2 * lam).exp()) if eta > 0 else torch.zeros_like(x)
    calls = 1
    active = torch.arange(B)
    while len(active):
        if calls > most:
            raise RuntimeError(
                f"{len(active)} of {B} samples have not arrived after {most} attempts; sample {int(active[0])} is at "
                f"lam = {float(lam[active[0]]):.4g} with steps of {float(h[active[0]]):.2g}. Loosen `rtol` and `atol`, "
                f"or give more with `most`."
            )
        lam_s = lam[active]
        # On a lattice, so that rounding does not decide where on its path, which is rough, a sample's step ends.
        lam_t = torch.maximum(((lam_s + h[active]) * _LATTICE).round(), (lam_s * _LATTICE).floor() + 1) / _LATTICE
        lam_t = lam_t.clamp_max(lam_end)
        lam_t = torch.where(lam_end - lam_t < 1e-9 * (1 + abs(lam_end)), lam_end, lam_t)
        t = torch.where(lam_t == lam_end, window[1], sde.t_of_lam(lam_t))
        rows = active.to(x.device)
        x_s, d_s, W_s = x[rows], d[rows], W[rows]
        x_1, of_change, W_t = _step(sde, x_s, d_s, W_s, eta, lam_s, lam_t, t, path, active.tolist())
        d_t = model.x0(x_1, t.to(x), **_rows_of(cond, rows, B))
        calls += 1
        x_2 = x_1 + check.expand(of_change.to(x), x_1) * (d_t - d_s)
        size = atol + rtol * torch.maximum(x_s.abs(), x_2.abs())
        rms = ((x_2 - x_1) / size).reshape(len(active), -1).square().mean(1).sqrt().double().cpu()
        error = rms / (lam_t - lam_s).sqrt()
        good = error <= 1
        factor = (_SAFETY * error.clamp_min(1e-12) ** -_EXPONENT).clamp(_LEAST, _MOST)
        h[active] = (torch.where(error.isfinite(), factor, _LEAST) * (lam_t - lam_s)).clamp_max(longest)
        done = active[good].to(x.device)
        here = good.to(x.device)
        x[done], d[done], W[done] = x_2[here], d_t[here], W_t[here]
        lam[active[good]] = lam_t[good]
        accepted[active[good]] += 1
        rejected[active[~good]] += 1
        active = active[~good | (lam_t < lam_end)]
    return x, accepted, rejected, calls


def _step(
    sde: SDE,
    x: Tensor,
    d: Tensor,
    W_s: Tensor,
    eta: float,
    lam_s: Tensor,
    lam_t: Tensor,
    t: Tensor,
    path: BrownianPath,
    rows: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """First-order step of some samples, the weight of what D changes by, and the path at its end."""
    h = lam_t - lam_s
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    kept = (1 + eta**2) * h
    phi = torch.exp(lam_s - lam_t - eta**2 * h) * alpha / sde.alpha(sde.t_of_lam(lam_s))
    of_d = -alpha * torch.expm1(-kept)
    of_change = alpha * (1 + torch.expm1(-kept) / kept)
    x_1 = sum(check.expand(w.to(x), x) * v for w, v in ((phi, x), (of_d, d)))
    assert isinstance(x_1, Tensor)
    if eta == 0:
        return x_1, of_change, W_s
    c_s, c_t = ((2 * eta**2 * lam).exp() for lam in (lam_s, lam_t))
    W_t = path.unit(c_t, rows)
    std = sigma * (-torch.expm1(-2 * eta**2 * h)).sqrt()
    return x_1 + check.expand(std.to(x), x) * path.between(c_s, c_t, W_s, W_t), of_change, W_t


def _rows_of(cond: dict[str, Any], rows: Tensor, B: int) -> dict[str, Any]:
    """Conditions of the samples that are still under way."""

    def some(leaf: Any) -> Any:
        return leaf[rows] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == B > 1 else leaf

    return {name: torch.utils._pytree.tree_map(some, tree) for name, tree in cond.items()}
