r"""Is this network what it is said to be? A diagnosis from a few evaluations on data.

Noise data, ask the network, and read its output as every prediction, of either sign, at every common time scale. The
reading with the least error :math:`|\hat\varepsilon - \varepsilon|^2` in the noise that was added is what the network
is: the right one is least at every noise level, the wrong ones are off by orders of magnitude at one level or another,
so the levels are averaged by their logarithms and a small batch settles it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.denoiser import PREDICTIONS, Denoiser, _form, _mix
from scoresde.discrete import Discrete
from scoresde.noise import Noise
from scoresde.sde import SDE

_ASKED = "as declared"
# Errors relative to that of the best linear guess. A right reading of a trained network lies below 1 by what the data
# has of structure, and above by its own error; a wrong one lies well above.
_LITTLE, _USELESS = 0.95, 1.0


@dataclass(frozen=True)
class Reading:
    """One way to read a network's output.

    Arguments:
        predicts: As this prediction,
        sign: with this sign,
        time: its time given this way.
        error: Squared error of the noise, in units of that of the best linear guess c x + d: the geometric mean over
            noise levels. 0 is a perfect denoiser, 1 knows nothing of the data.
    """

    predicts: str
    sign: int
    time: str
    error: float

    def __str__(self) -> str:
        parts = [f"predicts={self.predicts!r}"]
        if self.sign < 0:
            parts.append("with the opposite sign")
        if self.time != _ASKED:
            parts.append(f"time={self.time}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`check_denoiser` found; true when nothing is wrong, and readable when printed.

    Arguments:
        ok: Whether the declared reading is about as good as any, and better than a linear guess.
        message: What is likely wrong and how to mend it.
        declared: The declared reading.
        best: The best one.
        readings: All of them, best first.
    """

    ok: bool
    message: str
    declared: Reading
    best: Reading
    readings: tuple[Reading, ...]

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return self.message


def check_denoiser(model: Denoiser, x: Tensor, *, seed: int = 0, margin: float = 0.5, **cond: Any) -> Diagnosis:
    r"""Diagnose a denoiser on data: wrong ``predicts``, sign or time scale, untrained, or data off scale.

    The data must have some structure: of isotropic Gaussian data nobody knows more than a linear guess.

    Arguments:
        model: A network with its process.
        x: A batch of real data, (B, *event), in the scale the network was trained on; 64 samples do,
            more for data of little structure.
        seed: Of the noise.
        margin: The declared reading is called a mistake when its error is this much larger than that of another, as
            a fraction of the latter.
        **cond: Conditions, as the network takes them.

    Returns:
        A :class:`Diagnosis`; ``assert check_denoiser(model, x)`` is a test.

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.3)
        >>> model = ss.Denoiser(lambda x, t: mix.eps(x, t), ss.VP(), predicts="x0")
        >>> print(ss.check_denoiser(model, mix.sample(64, seed=0)))
        The network looks like predicts='eps'; it was declared predicts='x0' ...
    """
    if not isinstance(model, Denoiser):
        raise TypeError(f"`model` must be a Denoiser, a network with its process, got {type(model).__name__}.")
    check.conditions(cond, check_denoiser)
    check.state("x", x)
    if len(x) < 2 or not bool(x.isfinite().all()):
        raise ValueError("`x` must be a finite batch of at least 2 data.")
    check.number("margin", margin, above=0)
    scale = float(x.double().std(correction=0))
    times = _informative_times(model.sde, scale)
    noise = Noise(seed)
    eps = [noise.like(x, i) for i in range(len(times))]
    states = [model.sde.perturb(x, t, e) for t, e in zip(times, eps, strict=True)]
    guess = _geometric_mean([_linear_error(s, e) for s, e in zip(states, eps, strict=True)])
    kinds = PREDICTIONS if model.precondition is not None else PREDICTIONS[:-1]
    to_eps = {kind: [_to_eps(model, kind, t) for t in times] for kind in kinds}
    readings = []
    with torch.no_grad():
        for clock_name, clock in _clocks(model.sde).items():
            outs = _outputs(model, states, times, clock, cond)
            if outs is None:
                continue
            for kind in kinds:
                for sign in (1, -1):
                    errors = [
                        _mean_square(of_x * s + sign * of_out * out - e)
                        for (of_x, of_out), out, s, e in zip(to_eps[kind], outs, states, eps, strict=True)
                    ]
                    readings.append(Reading(kind, sign, clock_name, _geometric_mean(errors) / guess))
    declared = next(r for r in readings if (r.predicts, r.sign, r.time) == (model.predicts, 1, _ASKED))
    least = min(r.error for r in readings)

    def preference(r: Reading) -> tuple[int, float]:
        changes = (r.time != _ASKED) + (r.sign < 0) + (r.predicts != model.predicts)
        return changes, round(math.log(r.error), 2)

    # Of the readings about as good as the best, the one with the fewest changes.
    best = min((r for r in readings if r.error <= least * (1 + margin / 2)), key=preference)
    ok, message = _verdict(model, declared, best, margin, scale)
    return Diagnosis(ok, message, declared, best, tuple(sorted(readings, key=lambda r: r.error)))


def _verdict(model: Denoiser, declared: Reading, best: Reading, margin: float, scale: float) -> tuple[bool, str]:
    sigma_data = model.precondition.sigma_data if model.precondition is not None else 1.0
    note = ""
    if not sigma_data / 3 <= scale <= 3 * sigma_data:
        note = (
            f" The data has standard deviation {scale:.3g} where {sigma_data:.3g} is assumed: is it in the scale that "
            f"the network was trained on? `Standardize.fit` sets it."
        )
    if math.isinf(best.error):
        return False, f"The network returns values that are not finite.{note}"
    if declared.error <= min(best.error * (1 + margin), _USELESS):
        if declared.error > _LITTLE:
            note = " That is little: it is barely trained, or the data has little structure." + note
        return True, f"The denoiser is what it says: its error is {declared.error:.3g} of that of a linear guess.{note}"
    if best.error > _LITTLE:
        return False, (
            f"The network knows no more of the noise than a linear guess, under any reading: it is untrained, misses "
            f"its conditions, or the data is not what it was trained on. As declared, {declared}, its error is "
            f"{declared.error:.3g} of that of a linear guess; if it is trained, it looks most like {best} "
            f"({best.error:.3g}).{note}"
        )
    return False, (
        f"The network looks like {best}; it was declared {declared} (so read, its error is {best.error:.2g} of that of "
        f"a linear guess, against {declared.error:.2g} as declared).{note}"
    )


def _informative_times(sde: SDE, scale: float) -> list[float]:
    """Times where signal and noise are of a size, as far as the process has them."""
    hi, lo = sde.lam(sde.t_min), max(sde.lam(sde.T), -12.0)
    centre = -math.log(scale) if scale > 0 else 0.0
    lams = [min(max(centre + d, lo + 0.01 * (hi - lo)), hi) for d in (1.0, 0.0, -0.7, -1.4, -2.0)]
    return [sde.t_of_lam(lam) for lam in lams]


def _clocks(sde: SDE) -> dict[str, Callable[[float], float] | None]:
    """Time inputs that networks of this field are given."""
    T = sde.T
    clocks: dict[str, Callable[[float], float] | None] = {_ASKED: None, "'t'": lambda t: t}
    if isinstance(sde, Discrete):
        clocks["'index'"] = sde.index_of_t
    if T != 1:
        clocks[f"lambda t: t / {T:g}"] = lambda t: t / T
    return clocks | {
        f"lambda t: {999 / T:g} * t": lambda t: 999 / T * t,
        f"lambda t: {1000 / T:g} * t": lambda t: 1000 / T * t,
        f"lambda t: {T:g} - t": lambda t: T - t,
        "'sigma'": sde.sigma,
        "'log_sigma'": sde.log_sigma,
        "lambda t: -sde.lam(t) / 4": lambda t: -sde.lam(t) / 4,
    }


def _outputs(
    model: Denoiser,
    states: list[Tensor],
    times: list[float],
    clock: Callable[[float], float] | None,
    cond: dict[str, Any],
) -> list[Tensor] | None:
    """The network's outputs with its time given by `clock`; None where it refuses such labels."""
    if clock is None:
        return [model.output(x, t, **cond)[0] for x, t in zip(states, times, strict=True)]
    probe = Denoiser(
        model.net,
        model.sde,
        predicts=model.predicts,
        precondition=model.precondition,
        time=lambda t: torch.as_tensor(clock(float(t))),
        learned_variance=model.learned_variance,
    )
    try:
        return [probe.output(x, t, **cond)[0] for x, t in zip(states, times, strict=True)]
    except (IndexError, RuntimeError, ValueError):  # an embedding of integers, say: it was not trained on these
        return None


def _linear_error(x: Tensor, eps: Tensor) -> float:
    """Mean squared error of the best guess c x + d of the noise, c and d numbers."""
    a, b = x.double() - x.double().mean(), eps.double() - eps.double().mean()
    return float(b.square().mean() - (a * b).mean() ** 2 / a.square().mean())


def _to_eps(model: Denoiser, kind: str, t: float) -> tuple[float, float]:
    """Coefficients of the state and of an output, read as `kind`, in the noise."""
    alpha, sigma = model.sde.alpha(t), model.sde.sigma(t)
    have, want = (_form(k, model.sde, t, alpha, sigma, model._sigma_data) for k in (kind, "eps"))
    return _mix(have, want, alpha, sigma)


def _mean_square(x: Tensor) -> float:
    out = float(x.double().square().mean())
    return out if math.isfinite(out) else math.inf


def _geometric_mean(errors: list[float]) -> float:
    return math.exp(sum(math.log(max(e, 1e-30)) for e in errors) / len(errors))
