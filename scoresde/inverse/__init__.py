"""Inverse problems: measurements, exact posteriors, and the methods that approximate them."""

from scoresde.inverse.denoisers import (
    DDNM,
    DPS,
    MMPS,
    MPGD,
    TMPD,
    DiffPIR,
    LinearPosteriorDenoiser,
    PiGDM,
    PosteriorDenoiser,
    dps_scale,
)
from scoresde.inverse.exact import log_evidence, posterior
from scoresde.inverse.likelihoods import Censored, Counts, EntrywiseMeasurement, Laplace, Rounded, StudentT
from scoresde.inverse.measurements import Measurement
from scoresde.inverse.operators import Blur, Downsample, FourierMask, Grey, Linear, Mask, Matrix, Operator
from scoresde.inverse.particles import Particles, twisted_smc
from scoresde.inverse.priors import UniformPrior, as_prior
from scoresde.inverse.replacement import Replacement
from scoresde.inverse.samplers import daps, ddrm, red_diff
from scoresde.inverse.stacked import stack
from scoresde.inverse.tall import TallPosterior
from scoresde.inverse.twists import Likelihood

__all__ = [
    "DDNM",
    "DPS",
    "MMPS",
    "MPGD",
    "TMPD",
    "Blur",
    "Censored",
    "Counts",
    "DiffPIR",
    "Downsample",
    "EntrywiseMeasurement",
    "FourierMask",
    "Grey",
    "Laplace",
    "Likelihood",
    "Linear",
    "LinearPosteriorDenoiser",
    "Mask",
    "Matrix",
    "Measurement",
    "Operator",
    "Particles",
    "PiGDM",
    "PosteriorDenoiser",
    "Replacement",
    "Rounded",
    "StudentT",
    "TallPosterior",
    "UniformPrior",
    "as_prior",
    "daps",
    "ddrm",
    "dps_scale",
    "log_evidence",
    "posterior",
    "red_diff",
    "stack",
    "twisted_smc",
]
