r"""Is this network what it is said to be? A diagnosis from a few evaluations on data.

Noise data, ask the network, and read its output as every prediction, of either sign, at every common time scale: the
reading that explains the added noise best, :math:`R^2 = 1 - |\hat\varepsilon - \varepsilon|^2/|\varepsilon|^2`, is what
the network is. A wrong reading is off by orders of magnitude, so a small batch settles it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.denoiser import PREDICTIONS, AbstractDenoiser, Denoiser, _want
from scoresde.noise import Noise
from scoresde.sde import SDE

_ASKED = "as declared"


@dataclass(frozen=True)
class Reading:
    """One way to read a network's output: as this prediction, with this sign, its time given this way."""

    predicts: str
    sign: int
    time: str
    explained: float

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
        ok: Whether the declared reading explains the noise about as well as any.
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


def check_denoiser(model: Denoiser, x: Tensor, *, seed: int = 0, margin: float = 0.1, **cond: Any) -> Diagnosis:
    r"""Diagnose a denoiser on data: wrong ``predicts``, sign or time scale, untrained, or data off scale.

    Arguments:
        model: A network with its process.
        x: A batch of real data, (B, *event), in the scale the network was trained on; 16 samples do.
        seed: Of the noise.
        margin: How much better (in R² of the noise) another reading must be to be called a mistake.
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
    check.state("x", x)
    if len(x) < 2 or not bool(x.isfinite().all()):
        raise ValueError("`x` must be a finite batch of at least 2 data.")
    scale = float((x - x.mean()).square().mean().sqrt())
    times = _informative_times(model.sde, scale)
    noise = Noise(seed)
    eps = [noise.like(x, i) for i in range(len(times))]
    states = [model.sde.perturb(x, t, e) for t, e in zip(times, eps, strict=True)]
    readings = []
    with torch.no_grad():
        for clock_name, clock in _clocks(model.sde).items():
            outs = _outputs(model, states, times, clock, cond)
            for kind in PREDICTIONS if model.precondition is not None else PREDICTIONS[:-1]:
                for sign in (1, -1):
                    r2 = [
                        _explained(model, kind, sign * out, s, t, e)
                        for out, s, t, e in zip(outs, states, times, eps, strict=True)
                    ]
                    readings.append(Reading(kind, sign, clock_name, sum(r2) / len(r2)))
    declared = next(r for r in readings if (r.predicts, r.sign, r.time) == (model.predicts, 1, _ASKED))
    top = max(r.explained for r in readings)

    def preference(r: Reading) -> tuple[int, float]:
        changes = (r.time != _ASKED) + (r.sign < 0) + (r.predicts != model.predicts)
        return changes, -r.explained

    # Of the readings as good as the best, the one with the fewest changes.
    best = min((r for r in readings if r.explained > top - margin / 2), key=preference)
    ok, message = _verdict(model, declared, best, margin, scale)
    return Diagnosis(ok, message, declared, best, tuple(sorted(readings, key=lambda r: -r.explained)))


def _verdict(model: Denoiser, declared: Reading, best: Reading, margin: float, scale: float) -> tuple[bool, str]:
    sigma_data = model.precondition.sigma_data if model.precondition is not None else 1.0
    note = ""
    if not sigma_data / 3 <= scale <= 3 * sigma_data:
        note = (
            f" The data has standard deviation {scale:.3g} where {sigma_data:.3g} is assumed: is it in the scale that the "
            f"network was trained on? `Standardize.fit` sets it."
        )
    if best.explained < 0.3:
        return False, (
            f"The network explains little of the noise under any reading (at best {best.explained:.2f}, as {best}): it is "
            f"untrained, misses its conditions, or the data is not what it was trained on.{note}"
        )
    if declared.explained >= best.explained - margin:
        return True, f"The denoiser is what it says: it explains {declared.explained:.2f} of the noise.{note}"
    return False, (
        f"The network looks like {best}; it was declared {declared} "
        f"(it explains {best.explained:.2f} of the noise, against {declared.explained:.2f} as declared).{note}"
    )


def _informative_times(sde: SDE, scale: float) -> list[float]:
    """Times where signal and noise are of a size, as far as the process has them."""
    hi, lo = sde.lam(sde.t_min), max(sde.lam(sde.T), -12.0)
    centre = -math.log(scale) if scale > 0 else 0.0
    lams = [min(max(centre + d, lo + 0.01 * (hi - lo)), hi) for d in (1.0, 0.0, -0.7, -1.4, -2.0)]
    return [sde.t_of_lam(lam) for lam in lams]


def _clocks(sde: SDE) -> dict[str, Callable[[float], float] | None]:
    """Time inputs that networks of this field are given."""
    return {
        _ASKED: None,
        "'t'": lambda t: t,
        "lambda t: t / T": lambda t: t / sde.T,
        "lambda t: 999 * t": lambda t: 999 * t / sde.T,
        "lambda t: 1000 * t": lambda t: 1000 * t / sde.T,
        "lambda t: t - 1": lambda t: t - 1,
        "lambda t: T - t": lambda t: sde.T - t,
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
) -> list[Tensor]:
    probe = model
    if clock is not None:
        probe = Denoiser(
            model.net,
            model.sde,
            predicts=model.predicts,
            precondition=model.precondition,
            time=lambda t: torch.as_tensor(clock(float(t))),
            learned_variance=model.learned_variance,
        )
    return [probe.output(x, t, **cond)[0] for x, t in zip(states, times, strict=True)]


def _explained(model: Denoiser, kind: str, out: Tensor, x: Tensor, t: float, eps: Tensor) -> float:
    """R² of the noise when the output is read as `kind`, cut off at −1."""
    hat = AbstractDenoiser._convert(model, kind, out, _want("eps"), x, t, model._sigma_data)
    r2 = 1 - float((hat - eps).square().mean() / eps.square().mean())
    return max(r2, -1.0) if math.isfinite(r2) else -1.0
