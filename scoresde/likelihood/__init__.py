"""Log-densities by the probability flow, evidence bounds, bits per dimension, divergences of paths."""

from scoresde._numerics import student_quantile
from scoresde.likelihood.bits import bits_from_nats, dequantized_bits
from scoresde.likelihood.confidence import Uncertain
from scoresde.likelihood.elbo import Bins, Elbo, MonteCarlo, elbo
from scoresde.likelihood.flow import FlowDensity, LogProb, Tolerance, log_prob
from scoresde.likelihood.image_bits import Bits, bits_per_dim
from scoresde.likelihood.path_kl import Estimate, denoiser_error, path_kl
from scoresde.likelihood.trace import Divergence, Probes, jacobian_products

__all__ = [
    "Bins",
    "Bits",
    "Divergence",
    "Elbo",
    "Estimate",
    "FlowDensity",
    "LogProb",
    "MonteCarlo",
    "Probes",
    "Tolerance",
    "Uncertain",
    "bits_from_nats",
    "bits_per_dim",
    "denoiser_error",
    "dequantized_bits",
    "elbo",
    "jacobian_products",
    "log_prob",
    "path_kl",
    "student_quantile",
]
