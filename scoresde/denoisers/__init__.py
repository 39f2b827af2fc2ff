"""Denoisers: a network with its process, exact models, and denoisers made from denoisers."""

from scoresde.denoisers.base import AbstractDenoiser, Counter, Given, Kind, Shared, Wrapped, expand_conditions
from scoresde.denoisers.card import Card
from scoresde.denoisers.diagnose import Diagnosis, check_denoiser
from scoresde.denoisers.gaussian import Gaussian
from scoresde.denoisers.mixture import Empirical, GaussianMixture
from scoresde.denoisers.network import Denoiser, Preconditioning, log_variance
from scoresde.denoisers.reverse import Rescheduled, Reverse

__all__ = [
    "AbstractDenoiser",
    "Card",
    "Counter",
    "Denoiser",
    "Diagnosis",
    "Empirical",
    "Gaussian",
    "GaussianMixture",
    "Given",
    "Kind",
    "Preconditioning",
    "Rescheduled",
    "Reverse",
    "Shared",
    "Wrapped",
    "check_denoiser",
    "expand_conditions",
    "log_variance",
]
