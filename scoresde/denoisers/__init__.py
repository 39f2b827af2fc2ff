"""Denoisers: a network with its process, exact models, and denoisers made from denoisers."""

from scoresde.denoisers.base import AbstractDenoiser, Given, Wrapped
from scoresde.denoisers.diagnose import Diagnosis, check_denoiser
from scoresde.denoisers.gaussian import Gaussian
from scoresde.denoisers.mixture import Empirical, GaussianMixture
from scoresde.denoisers.network import Denoiser, Preconditioning
from scoresde.denoisers.reverse import Rescheduled, Reverse

__all__ = [
    "AbstractDenoiser",
    "Denoiser",
    "Diagnosis",
    "Empirical",
    "Gaussian",
    "GaussianMixture",
    "Given",
    "Preconditioning",
    "Rescheduled",
    "Reverse",
    "Wrapped",
    "check_denoiser",
]
