"""Every process there is, for tests over lists of instances; adding one is adding a line."""

from __future__ import annotations

import math

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
    "Polynomial": ss.Polynomial(n=2.0),
    "Trig": ss.Trig(),
    "Discrete": ss.Discrete(ss.betas("linear", 1000)),
    "Discrete zero SNR": ss.Discrete(ss.zero_terminal_snr(ss.betas("scaled_linear", 100))),
    "Shifted": ss.Shifted(ss.Flow(), 3.0),
    "Shifted VP": ss.Shifted(ss.VP(), 2.0),
    "two functions": TWO_FUNCTIONS,
    "VP by hand": VP_BY_HAND,
    "VP by drift": BY_DRIFT,
}


def inner_times(sde: ss.SDE, n: int = 101) -> torch.Tensor:
    """Times off the ends and off the steps of a discrete process, dense at data."""
    u = torch.linspace(0, 1, n + 2, dtype=torch.float64)[1:-1]
    t = sde.T * (0.97 * u**2 + 1e-4)
    return t + 0.5 / math.pi * 1e-3 if isinstance(sde, ss.Discrete) else t
