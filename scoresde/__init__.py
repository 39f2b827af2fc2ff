"""Score-SDE solvers: processes, denoisers, and every sampler as one table of numbers."""

__version__ = "0.1.0"

from scoresde import adapters, data, grids, metrics, verify
from scoresde.data import Standardize
from scoresde.denoiser import AbstractDenoiser, Denoiser, Preconditioning, Rescheduled, Reverse
from scoresde.diagnose import check_denoiser
from scoresde.discrete import Discrete, betas, zero_terminal_snr
from scoresde.fit import fit
from scoresde.gaussian import Gaussian
from scoresde.grids import karras, uniform_lam, uniform_t
from scoresde.mixture import Empirical, GaussianMixture
from scoresde.noise import Noise
from scoresde.plan import Plan, Row
from scoresde.sampling import Solution, decode, encode, sample, solve
from scoresde.sde import EDM, SDE, VE, VP, Cosine, Flow, Polynomial, Shifted, SubVP, Trig
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
from scoresde.tape import Tape

__all__ = [
    "DDIM",
    "DEIS",
    "DPM2",
    "EDM",
    "ETDRK4",
    "IPNDM",
    "LMS",
    "PLMS",
    "PNDM",
    "RES",
    "SDE",
    "VE",
    "VP",
    "AbstractDenoiser",
    "AcceleratedDDIM",
    "Cosine",
    "DEISRungeKutta",
    "DPMSolver",
    "DPMSolverPP",
    "DPMSolverV3",
    "Denoiser",
    "Discrete",
    "EDMHeun",
    "Empirical",
    "Euler",
    "Flow",
    "Gaussian",
    "GaussianMixture",
    "Heun",
    "Midpoint",
    "Noise",
    "Plan",
    "Polynomial",
    "Preconditioning",
    "Rescheduled",
    "Reverse",
    "Row",
    "RungeKutta4",
    "Shifted",
    "Solution",
    "Standardize",
    "Statistics",
    "SubVP",
    "Tape",
    "Trig",
    "UniPC",
    "VelocityAB",
    "adapters",
    "analytic_first_step",
    "betas",
    "check_denoiser",
    "data",
    "decode",
    "encode",
    "fit",
    "grids",
    "karras",
    "metrics",
    "sample",
    "solve",
    "uniform_lam",
    "uniform_t",
    "verify",
    "with_corrector",
    "zero_terminal_snr",
]
