"""Score-SDE solvers: processes, denoisers, and every sampler as one table of numbers."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from scoresde import (
    adapters,
    analysis,
    data,
    grids,
    guidance,
    inverse,
    metrics,
    optimal,
    pairs,
    parallel,
    training,
    verify,
)
from scoresde.adaptive import Adaptive, SolverError
from scoresde.bounds import bits_per_dim, denoiser_error, dequantize, dequantized_bits, elbo, path_kl
from scoresde.data import Standardize
from scoresde.denoiser import AbstractDenoiser, Denoiser, Preconditioning, Rescheduled, Reverse
from scoresde.diagnose import check_denoiser
from scoresde.discrete import Discrete, betas, zero_terminal_snr
from scoresde.fitting import fit
from scoresde.gaussian import Gaussian
from scoresde.grids import karras, uniform_lam, uniform_t
from scoresde.guidance import ClassifierFree
from scoresde.langevin import AnnealedLangevin, LangevinCorrector
from scoresde.latent import interpolate, slerp
from scoresde.likelihood import log_prob, sample_with_log_prob
from scoresde.mixture import Empirical, GaussianMixture
from scoresde.noise import Noise
from scoresde.paths import BrownianPath
from scoresde.plan import Plan, Row
from scoresde.policy import transitions
from scoresde.reversible import Reversible
from scoresde.sampling import Solution, decode, encode, sample, solve
from scoresde.sde import EDM, SDE, VE, VP, Cosine, Flow, Polynomial, Shifted, SubVP, Trig
from scoresde.solvers.ancestral import Ancestral, Restart
from scoresde.solvers.catalogue import (
    DDIM,
    DEIS,
    DPM2,
    ETDRK4,
    IPNDM,
    LMS,
    PLMS,
    RES,
    AcceleratedDDIM,
    DEISRungeKutta,
    DPMSolver,
    DPMSolverPP,
    DPMSolverV3,
    EDMHeun,
    Euler,
    Heun,
    Midpoint,
    RungeKutta4,
    UniPC,
    VelocityAB,
    analytic_first_step,
    with_corrector,
)
from scoresde.solvers.combinations import PNDM
from scoresde.solvers.statistics import Statistics
from scoresde.solvers.stochastic import (
    DDPM,
    DPMPPSDE,
    ERSDE,
    SEEDS,
    ConsistencySampling,
    DPM2Ancestral,
    DPMPP2SAncestral,
    EDMStochastic,
    EulerAncestral,
    EulerMaruyama,
    ReverseDiffusion,
    SASolver,
    SDEDPMSolver,
    SDEDPMSolverPP,
    StochasticHeun,
)
from scoresde.tape import Tape
from scoresde.training import DSM, EMA, Trainer
from scoresde.variances import mean_squared_score, sample_learned_variance

if TYPE_CHECKING:
    from scoresde import backends, nn

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "DPM2",
    "DPMPPSDE",
    "DSM",
    "EDM",
    "EMA",
    "ERSDE",
    "ETDRK4",
    "IPNDM",
    "LMS",
    "PLMS",
    "PNDM",
    "RES",
    "SDE",
    "SEEDS",
    "VE",
    "VP",
    "AbstractDenoiser",
    "AcceleratedDDIM",
    "Adaptive",
    "Ancestral",
    "AnnealedLangevin",
    "BrownianPath",
    "ClassifierFree",
    "ConsistencySampling",
    "Cosine",
    "DEISRungeKutta",
    "DPM2Ancestral",
    "DPMPP2SAncestral",
    "DPMSolver",
    "DPMSolverPP",
    "DPMSolverV3",
    "Denoiser",
    "Discrete",
    "EDMHeun",
    "EDMStochastic",
    "Empirical",
    "Euler",
    "EulerAncestral",
    "EulerMaruyama",
    "Flow",
    "Gaussian",
    "GaussianMixture",
    "Heun",
    "LangevinCorrector",
    "Midpoint",
    "Noise",
    "Plan",
    "Polynomial",
    "Preconditioning",
    "Rescheduled",
    "Restart",
    "Reverse",
    "ReverseDiffusion",
    "Reversible",
    "Row",
    "RungeKutta4",
    "SASolver",
    "SDEDPMSolver",
    "SDEDPMSolverPP",
    "Shifted",
    "Solution",
    "SolverError",
    "Standardize",
    "Statistics",
    "StochasticHeun",
    "SubVP",
    "Tape",
    "Trainer",
    "Trig",
    "UniPC",
    "VelocityAB",
    "adapters",
    "analysis",
    "analytic_first_step",
    "backends",
    "betas",
    "bits_per_dim",
    "check_denoiser",
    "data",
    "decode",
    "denoiser_error",
    "dequantize",
    "dequantized_bits",
    "elbo",
    "encode",
    "fit",
    "grids",
    "guidance",
    "interpolate",
    "inverse",
    "karras",
    "log_prob",
    "mean_squared_score",
    "metrics",
    "nn",
    "optimal",
    "pairs",
    "parallel",
    "path_kl",
    "sample",
    "sample_learned_variance",
    "sample_with_log_prob",
    "slerp",
    "solve",
    "training",
    "transitions",
    "uniform_lam",
    "uniform_t",
    "verify",
    "with_corrector",
    "zero_terminal_snr",
]


def __getattr__(name: str) -> Any:
    """Networks and others' integrators are loaded when they are first asked for: sampling needs none of them."""
    if name in ("backends", "nn"):
        return importlib.import_module(f"scoresde.{name}")
    raise AttributeError(f"module 'scoresde' has no attribute {name!r}")
