r"""Detection of a wrong prediction type, sign or time input of a network, from a few evaluations on data.

The check adds noise to data, evaluates the network, and interprets its output as every prediction, with either sign and
every common time input. The interpretation with the smallest error :math:`|\hat\varepsilon - \varepsilon|^2` is taken
as the right one. A wrong interpretation has a much larger error at some noise level. The errors of the noise levels are
therefore averaged geometrically, and a small batch is enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import Condition, Given
from scoresde.denoisers.network import Denoiser
from scoresde.denoisers.predictions import PREDICTIONS, conversion, form_of
from scoresde.noise.keyed import Noise
from scoresde.processes.discrete import Discrete
from scoresde.processes.sde import SDE

_DECLARED = "as declared"
TIE = 1.05  # ratio of two errors that are about equal

# Errors relative to the best linear guess. For the right interpretation of a trained network the error is below 1 if
# the data has structure; for a wrong interpretation the error is well above 1.
_LITTLE, _USELESS = 0.95, 1.0


@dataclass(frozen=True)
class Reading:
    """One interpretation of a network's output, and its error.

    Arguments:
        predicts: Prediction type of the output.
        sign: Sign of the output, 1 or −1.
        time: Time input of the network.
        error: Squared error of the noise relative to the best linear guess c x + d, as a geometric mean over noise
            levels. 0 is perfect; 1 is no better than the linear guess.
    """

    predicts: str
    sign: int
    time: str
    error: float

    def __str__(self) -> str:
        parts = [f"predicts={self.predicts!r}"]
        if self.sign < 0:
            parts.append("with the opposite sign")
        if self.time != _DECLARED:
            parts.append(f"time={self.time}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Diagnosis:
    """Result of :func:`check_denoiser`: it is true if no mistake was detected, and prints its message.

    Arguments:
        ok: Whether the declared interpretation is about as good as the best one, and better than a linear guess.
        message: Likely mistake and its fix.
        declared: Declared interpretation.
        best: Best interpretation.
        readings: All interpretations, best first.
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


@checked
def check_denoiser(model: Denoiser | Given, x: Tensor, *, seed: int = 0, margin: float = 0.5) -> Diagnosis:
    r"""Detect a wrong ``predicts``, sign, time input or data scale of a denoiser, or an untrained network.

    The data must have some structure, because for isotropic Gaussian data the linear guess is optimal.

    Arguments:
        model: Network with its process; conditions are fixed by ``model.given(label=y)``.
        x: Batch of real data, (B, *event), in the scale of the training data; 64 samples are usually enough.
        seed: Seed of the noise.
        margin: Relative excess over the error of the best interpretation that makes the declaration a mistake.

    Returns:
        A :class:`Diagnosis`. Use ``assert check_denoiser(model, x)`` as a test.

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.3)
        >>> model = ss.Denoiser(lambda x, t: mix.eps(x, t), ss.VP(), predicts="x0")
        >>> print(ss.check_denoiser(model, mix.sample(64, seed=0)))
        The network looks like predicts='eps'; it was declared predicts='x0' ...
    """
    cond = model.conditions if isinstance(model, Given) else {}
    while isinstance(model, Given):
        model = model.model  # type: ignore[assignment]
    if not isinstance(model, Denoiser):
        raise TypeError(f"`model` must be a Denoiser, Denoiser(net, sde, predicts=...), got {type(model).__name__}.")
    check.state("x", x)
    if len(x) < 2 or not bool(x.isfinite().all()):
        raise ValueError("`x` must be a finite batch of at least 2 samples.")
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
    declared = next(r for r in readings if (r.predicts, r.sign, r.time) == (model.predicts, 1, _DECLARED))
    smallest = min(r.error for r in readings)

    def preference(r: Reading) -> tuple[int, float]:
        changes = (r.time != _DECLARED) + (r.sign < 0) + (r.predicts != model.predicts)
        return changes, round(math.log(r.error), 2)

    # Among the interpretations about as good as the best, choose the one with the fewest changes.
    best = min((r for r in readings if r.error <= smallest * (1 + margin / 2)), key=preference)
    ours = f"lambda t: {1000 / model.sde.T:g} * t"  # of a factor of 999 or of 1000, both seem right: 1000 is usual
    if best.time == f"lambda t: {999 / model.sde.T:g} * t":
        twin = next((r for r in readings if (r.predicts, r.sign, r.time) == (best.predicts, best.sign, ours)), best)
        best = twin if twin.error <= TIE * best.error else best
    ok, message = _verdict(model, declared, best, margin, scale)
    return Diagnosis(ok, message, declared, best, tuple(sorted(readings, key=lambda r: r.error)))


def _verdict(model: Denoiser, declared: Reading, best: Reading, margin: float, scale: float) -> tuple[bool, str]:
    sigma_data = model.precondition.sigma_data if model.precondition is not None else 1.0
    note = ""
    if not sigma_data / 3 <= scale <= 3 * sigma_data:
        note = (
            f" The data has standard deviation {scale:.3g} where {sigma_data:.3g} is assumed; give it the scale of the "
            f"training data, for example with `Standardize.fit`."
        )
    if math.isinf(best.error):
        return False, f"The network returns values that are not finite.{note}"
    if declared.error <= min(best.error * (1 + margin), _USELESS):
        if declared.error > _LITTLE:
            note = " This is close to 1: the network is barely trained, or the data has little structure." + note
        return True, f"The declaration is right: the error is {declared.error:.3g} of that of a linear guess.{note}"
    if best.error > _LITTLE:
        return False, (
            f"The network is hardly better than a linear guess under every interpretation: it is untrained, lacks its "
            f"conditions, or the data differs from the training data. As declared, {declared}, its error is "
            f"{declared.error:.3g} of that of a linear guess. If it is trained, the likely interpretation is {best} "
            f"({best.error:.3g}).{note}"
        )
    return False, (
        f"The network looks like {best}; it was declared {declared} (its error is {best.error:.2g} of that of a linear "
        f"guess, against {declared.error:.2g} as declared).{note}"
    )


def _informative_times(sde: SDE, scale: float) -> list[float]:
    """Times where signal and noise have similar size, limited to the range of the process."""
    hi, lo = sde.lam(sde.t_min), max(sde.lam(sde.T), -12.0)
    centre = -math.log(scale) if scale > 0 else 0.0
    lams = [min(max(centre + d, lo + 0.01 * (hi - lo)), hi) for d in (1.0, 0.0, -0.7, -1.4, -2.0)]
    return [sde.t_of_lam(lam) for lam in lams]


def _clocks(sde: SDE) -> dict[str, Callable[[float], float] | None]:
    """Common time inputs of networks, by name; None is the declared one."""
    T = sde.T
    clocks: dict[str, Callable[[float], float] | None] = {_DECLARED: None, "'t'": lambda t: t}
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
    cond: dict[str, Condition],
) -> list[Tensor] | None:
    """Outputs of the network with the time input `clock`; None if the network raises an error for it."""
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
    except (IndexError, RuntimeError, ValueError):  # for example, an embedding accepts integers only
        return None


def _linear_error(x: Tensor, eps: Tensor) -> float:
    """Mean squared error of the best linear guess c x + d of the noise, with numbers c and d."""
    a, b = x.double() - x.double().mean(), eps.double() - eps.double().mean()
    return float(b.square().mean() - (a * b).mean() ** 2 / a.square().mean())


def _to_eps(model: Denoiser, kind: str, t: float) -> tuple[float, float]:
    """Coefficients of the state and of an output of type `kind` that give the noise."""
    alpha, sigma = model.sde.alpha(t), model.sde.sigma(t)
    source, target = (form_of(k, model.sde, t, alpha, sigma, model.data_scale) for k in (kind, "eps"))
    return cast(tuple[float, float], conversion(source, target, alpha, sigma))


def _mean_square(x: Tensor) -> float:
    out = float(x.double().square().mean())
    return out if math.isfinite(out) else math.inf


def _geometric_mean(errors: list[float]) -> float:
    return math.exp(sum(math.log(max(e, 1e-30)) for e in errors) / len(errors))
