"""Train and sample diffusion models with any noise schedule and over 50 solvers, tested against closed-form answers."""

from importlib import import_module as _import_module
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING as _TYPE_CHECKING

__version__ = "0.2.0"

from scoresde import (
    analysis,
    data,
    denoisers,
    fitting,
    grids,
    guidance,
    integrators,
    interop,
    inverse,
    likelihood,
    metrics,
    noise,
    plan,
    plots,
    policies,
    processes,
    sampling,
    solvers,
    steering,
    training,
)
from scoresde._names import hint as _hint
from scoresde._names import meant as _meant
from scoresde.denoisers import Denoiser, Gaussian, GaussianMixture, Preconditioning, check_denoiser
from scoresde.fitting import fit
from scoresde.guidance import ClassifierFree
from scoresde.integrators import Adaptive, SolverError
from scoresde.interop import load
from scoresde.likelihood import bits_per_dim, elbo, log_prob
from scoresde.noise import Noise
from scoresde.plan import Plan
from scoresde.processes import EDM, SDE, VE, VP, Cosine, Discrete, Flow, SubVP, Trig
from scoresde.sampling import Solution, Start, Watch, decode, encode, sample, solve
from scoresde.solvers import DDIM, DDPM, DPMSolverPP, EDMHeun, EulerMaruyama, SDEDPMSolverPP, UniPC, VelocityAB
from scoresde.training import DSM, EMA, Trainer

if _TYPE_CHECKING:
    from scoresde import nn

__all__ = [
    "DDIM",
    "DDPM",
    "DSM",
    "EDM",
    "EMA",
    "SDE",
    "VE",
    "VP",
    "Adaptive",
    "ClassifierFree",
    "Cosine",
    "DPMSolverPP",
    "Denoiser",
    "Discrete",
    "EDMHeun",
    "EulerMaruyama",
    "Flow",
    "Gaussian",
    "GaussianMixture",
    "Noise",
    "Plan",
    "Preconditioning",
    "SDEDPMSolverPP",
    "Solution",
    "SolverError",
    "Start",
    "SubVP",
    "Trainer",
    "Trig",
    "UniPC",
    "VelocityAB",
    "Watch",
    "analysis",
    "bits_per_dim",
    "check_denoiser",
    "data",
    "decode",
    "denoisers",
    "elbo",
    "encode",
    "fit",
    "fitting",
    "grids",
    "guidance",
    "integrators",
    "interop",
    "inverse",
    "likelihood",
    "load",
    "log_prob",
    "metrics",
    "nn",
    "noise",
    "plan",
    "plots",
    "policies",
    "processes",
    "sample",
    "sampling",
    "solve",
    "solvers",
    "steering",
    "training",
]


def __getattr__(name: str) -> _ModuleType:
    """Import `scoresde.nn` at its first use: sampling does not need it."""
    if name == "nn":
        return _import_module("scoresde.nn")
    homes = [home for home in __all__ if name in getattr(globals().get(home), "__all__", ())]
    same = [known for known in __all__ if known.lower() == name.lower()]
    hint = f"; it is scoresde.{homes[0]}.{name}" if homes else _hint(f"ss.{same[0]}" if same else _meant(name))
    raise AttributeError(f"module 'scoresde' has no attribute {name!r}{hint}", name=name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
