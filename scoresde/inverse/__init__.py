"""Inverse problems: measurements, exact posteriors, and the methods that approximate them."""

from scoresde.inverse.denoisers import (
    DDNM,
    DPS,
    MMPS,
    TMPD,
    DiffPIR,
    LinearPosteriorDenoiser,
    PiGDM,
    PosteriorDenoiser,
    dps_scale,
)
from scoresde.inverse.exact import log_evidence, posterior
from scoresde.inverse.measurements import Counts, Measurement
from scoresde.inverse.operators import Blur, Downsample, FourierMask, Grey, Linear, Mask, Matrix, Operator
from scoresde.inverse.particles import Particles, twisted_smc
from scoresde.inverse.replacement import Replacement
from scoresde.inverse.samplers import daps, ddrm, red_diff

__all__ = [
    "DDNM",
    "DPS",
    "MMPS",
    "TMPD",
    "Blur",
    "Counts",
    "DiffPIR",
    "Downsample",
    "FourierMask",
    "Grey",
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
    "daps",
    "ddrm",
    "dps_scale",
    "log_evidence",
    "posterior",
    "red_diff",
    "twisted_smc",
]
