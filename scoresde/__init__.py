"""Score-SDE solvers: processes, denoisers, and every sampler as one table of numbers."""

__version__ = "0.1.0"

from scoresde import adapters, data, grids, metrics
from scoresde.data import Standardize
from scoresde.denoiser import AbstractDenoiser, Denoiser, Preconditioning, Rescheduled, Reverse
from scoresde.diagnose import check_denoiser
from scoresde.discrete import Discrete, betas, zero_terminal_snr
from scoresde.grids import karras, uniform_lam, uniform_t
from scoresde.mixture import Empirical, GaussianMixture
from scoresde.noise import Noise
from scoresde.sde import EDM, SDE, VE, VP, Cosine, Flow, Polynomial, Shifted, SubVP, Trig

__all__ = [
    "EDM",
    "SDE",
    "VE",
    "VP",
    "AbstractDenoiser",
    "Cosine",
    "Denoiser",
    "Discrete",
    "Empirical",
    "Flow",
    "GaussianMixture",
    "Noise",
    "Polynomial",
    "Preconditioning",
    "Rescheduled",
    "Reverse",
    "Shifted",
    "Standardize",
    "SubVP",
    "Trig",
    "adapters",
    "betas",
    "check_denoiser",
    "data",
    "grids",
    "karras",
    "metrics",
    "uniform_lam",
    "uniform_t",
    "zero_terminal_snr",
]
