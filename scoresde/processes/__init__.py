"""Diffusion processes: α(t) and σ(t), and everything that follows from them."""

from scoresde.processes.derived import FromDrift, FromFunctions, Shifted
from scoresde.processes.discrete import Discrete, betas, zero_terminal_snr
from scoresde.processes.named import EDM, VE, VP, Cosine, Flow, Polynomial, SubVP, Trig
from scoresde.processes.sde import SDE, Prior, derivative

__all__ = [
    "EDM",
    "SDE",
    "VE",
    "VP",
    "Cosine",
    "Discrete",
    "Flow",
    "FromDrift",
    "FromFunctions",
    "Polynomial",
    "Prior",
    "Shifted",
    "SubVP",
    "Trig",
    "betas",
    "derivative",
    "zero_terminal_snr",
]
