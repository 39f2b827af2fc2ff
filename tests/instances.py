"""Every process there is, for tests over lists of instances; adding one is adding a line."""

from __future__ import annotations

import math

import mpmath as mp
import torch

import scoresde as ss


def song_ve(t: torch.Tensor) -> torch.Tensor:
    return 0.01 * (5000.0**t)


# A user's own two functions: nothing but torch expressions. The second is VP, written without closed forms.
TWO_FUNCTIONS = ss.SDE.from_functions(lambda t: torch.exp(-3 * t**2), lambda t: torch.sin(1.2 * t) + t**3)
VP_BY_HAND = ss.SDE.from_functions(
    lambda t: torch.exp(-0.05 * t - 4.975 * t**2), lambda t: torch.sqrt(-torch.expm1(-0.1 * t - 9.95 * t**2))
)
BY_DRIFT = ss.SDE.from_drift(lambda t: -0.05 - 9.95 * t, lambda t: (0.1 + 19.9 * t).sqrt())

SDES: dict[str, ss.SDE] = {
    "VP": ss.VP(),
    "VP narrow": ss.VP(beta_min=0.5, beta_max=5.0, T=2.0),
    "SubVP": ss.SubVP(),
    "VE": ss.VE(),
    "Cosine": ss.Cosine(),
    "Cosine to the end": ss.Cosine(T=1.0),
    "EDM": ss.EDM(),
    "Flow": ss.Flow(),
    "Polynomial": ss.processes.Polynomial(n=2.0),
    "Trig": ss.Trig(),
    "Discrete": ss.Discrete(ss.processes.betas("linear", 1000)),
    "Discrete zero SNR": ss.Discrete(ss.processes.zero_terminal_snr(ss.processes.betas("scaled_linear", 100))),
    "Shifted": ss.processes.Shifted(ss.Flow(), 3.0),
    "Shifted VP": ss.processes.Shifted(ss.VP(), 2.0),
    "two functions": TWO_FUNCTIONS,
    "VP by hand": VP_BY_HAND,
    "VP by drift": BY_DRIFT,
}


def inner_times(sde: ss.SDE, n: int = 101) -> torch.Tensor:
    """Times off the ends and off the steps of a discrete process, dense at data."""
    u = torch.linspace(0, 1, n + 2, dtype=torch.float64)[1:-1]
    t = sde.T * (0.97 * u**2 + 1e-4)
    return t + 0.5 / math.pi * 1e-3 if isinstance(sde, ss.Discrete) else t


# α and σ of the processes in arithmetic of any precision.


def vp(t: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    b = mp.mpf(0.1) * t + (mp.mpf(20.0) - mp.mpf(0.1)) * t**2 / 2
    return mp.exp(-b / 2), mp.sqrt(-mp.expm1(-b))


def sub_vp(t: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    b = mp.mpf(0.1) * t + (mp.mpf(20.0) - mp.mpf(0.1)) * t**2 / 2
    return mp.exp(-b / 2), -mp.expm1(-b)


def ve(t: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    return mp.mpf(1), mp.mpf(0.01) * mp.sqrt((mp.mpf(50.0) / mp.mpf(0.01)) ** (2 * t) - 1)


def cosine(t: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    s = mp.mpf(0.008)
    alpha = mp.cos(mp.pi / 2 * (t + s) / (1 + s)) / mp.cos(mp.pi / 2 * s / (1 + s))
    return alpha, mp.sqrt(1 - alpha**2)


def trig(t: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    return mp.cos(mp.pi * t / 2), mp.sin(mp.pi * t / 2)


def polynomial(t: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    return (1 - t) ** 2, 1 - (1 - t) ** 2


def shifted_vp(t: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    # λ lowered by log 2, on the circle α² + σ² = 1.
    alpha, sigma = vp(t)
    rho = 2 * sigma / alpha
    return 1 / mp.sqrt(1 + rho**2), rho / mp.sqrt(1 + rho**2)


EXACT = {
    "VP": vp,
    "SubVP": sub_vp,
    "VE": ve,
    "Cosine": cosine,
    "EDM": lambda t: (mp.mpf(1), t),
    "Flow": lambda t: (1 - t, t),
    "Polynomial": polynomial,
    "Trig": trig,
    "Shifted VP": shifted_vp,
    "VP by hand": vp,
    "VP by drift": vp,
}
