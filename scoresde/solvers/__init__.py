"""Solvers: each writes a plan for a process and a grid.

Published solvers by name are in ``deterministic`` and ``stochastic``; each is a setting of a class in ``multistep``
(UniPC and its corrector, DPM-Solver(++), DEIS, SA-Solver), ``single_step``, ``runge_kutta``, ``exponential``,
``ancestral`` or ``reverse_sde``. Those made for reinforcement learning are in ``exploring``. All weights of exponential
solvers, also those of correctors, are computed in ``quadrature``.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import NoReturn as _NoReturn

from scoresde._names import hint as _hint
from scoresde._names import meant as _meant
from scoresde.solvers.ancestral import Ancestral, Churn, Consistency, Posterior, Restart, TwoStage
from scoresde.solvers.anchored import AnchoredResidual, residual_prediction
from scoresde.solvers.deterministic import (
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
    Mixed,
    PublishedThree,
    RungeKutta4,
    UniPC,
    VelocityAB,
    with_corrector,
)
from scoresde.solvers.entry_statistics import EntryMultistep, EntryStatistics, load_statistics
from scoresde.solvers.exploring import CPS, FlowSDE, GivenDiffusion, Preserving, ReverseEuler
from scoresde.solvers.exponential import KROGSTAD4, ExponentialRungeKutta, ExponentialTableau
from scoresde.solvers.interpolants import (
    DATA,
    LAM,
    LOG1P_RHO,
    NOISE,
    RHO,
    TAU,
    TIME,
    VELOCITY,
    Prediction,
    V,
    Variable,
    edm_prediction,
)
from scoresde.solvers.langevin import AnnealedLangevin
from scoresde.solvers.multistep import Multistep
from scoresde.solvers.pndm import PNDM, NoiseCombination
from scoresde.solvers.quadrature import Point
from scoresde.solvers.reverse_sde import ExtendedReverse, ReverseSDE, SongPredictor
from scoresde.solvers.rule import EtaWithin, Solver
from scoresde.solvers.runge_kutta import (
    EULER,
    HEUN,
    HEUN3,
    KUTTA3,
    MIDPOINT,
    RALSTON,
    RALSTON3,
    RK4,
    SSP3,
    RungeKutta,
    Tableau,
)
from scoresde.solvers.single_step import SingleStep
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
from scoresde.solvers.tape import Leg, Tape
from scoresde.solvers.universal import Universal

__all__ = [
    "CPS",
    "DATA",
    "DDIM",
    "DDPM",
    "DEIS",
    "DPM2",
    "DPMPPSDE",
    "ERSDE",
    "ETDRK4",
    "EULER",
    "HEUN",
    "HEUN3",
    "IPNDM",
    "KROGSTAD4",
    "KUTTA3",
    "LAM",
    "LMS",
    "LOG1P_RHO",
    "MIDPOINT",
    "NOISE",
    "PLMS",
    "PNDM",
    "RALSTON",
    "RALSTON3",
    "RES",
    "RHO",
    "RK4",
    "SEEDS",
    "SSP3",
    "TAU",
    "TIME",
    "VELOCITY",
    "AcceleratedDDIM",
    "Ancestral",
    "AnchoredResidual",
    "AnnealedLangevin",
    "Churn",
    "Consistency",
    "ConsistencySampling",
    "DEISRungeKutta",
    "DPM2Ancestral",
    "DPMPP2SAncestral",
    "DPMSolver",
    "DPMSolverPP",
    "DPMSolverV3",
    "EDMHeun",
    "EDMStochastic",
    "EntryMultistep",
    "EntryStatistics",
    "EtaWithin",
    "Euler",
    "EulerAncestral",
    "EulerMaruyama",
    "ExponentialRungeKutta",
    "ExponentialTableau",
    "ExtendedReverse",
    "FlowSDE",
    "GivenDiffusion",
    "Heun",
    "Leg",
    "Midpoint",
    "Mixed",
    "Multistep",
    "NoiseCombination",
    "Point",
    "Posterior",
    "Prediction",
    "Preserving",
    "PublishedThree",
    "Restart",
    "ReverseDiffusion",
    "ReverseEuler",
    "ReverseSDE",
    "RungeKutta",
    "RungeKutta4",
    "SASolver",
    "SDEDPMSolver",
    "SDEDPMSolverPP",
    "SingleStep",
    "Solver",
    "SongPredictor",
    "Statistics",
    "StochasticHeun",
    "Tableau",
    "Tape",
    "TwoStage",
    "UniPC",
    "Universal",
    "V",
    "Variable",
    "VelocityAB",
    "edm_prediction",
    "load_statistics",
    "residual_prediction",
    "with_corrector",
]


if not _TYPE_CHECKING:  # a type checker shall see that there is no such attribute

    def __getattr__(name: str) -> _NoReturn:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_hint(_meant(name))}", name=name)


def __dir__() -> list[str]:
    return __all__
