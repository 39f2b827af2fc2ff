"""Integration that a table cannot hold: error control, reversible solves, torchdiffeq and torchsde."""

from scoresde.integrators.adaptive import Adaptive, flow
from scoresde.integrators.adaptive_sde import AdaptiveSDE
from scoresde.integrators.control import Control
from scoresde.integrators.dense import Path
from scoresde.integrators.embedded import (
    DPM12,
    DPM23,
    Adams,
    BogackiShampine,
    DormandPrince,
    DPMPair,
    EmbeddedRungeKutta,
    Frame,
    Pair,
    Scheme,
)
from scoresde.integrators.loop import Accepted, Equation, SolverError, integrate
from scoresde.integrators.method import Method, Problem, Stats
from scoresde.integrators.reversible import Reversible
from scoresde.integrators.via_torchdiffeq import TorchDiffEq
from scoresde.integrators.via_torchsde import ReverseSDE, TorchSDE

__all__ = [
    "DPM12",
    "DPM23",
    "Accepted",
    "Adams",
    "Adaptive",
    "AdaptiveSDE",
    "BogackiShampine",
    "Control",
    "DPMPair",
    "DormandPrince",
    "EmbeddedRungeKutta",
    "Equation",
    "Frame",
    "Method",
    "Pair",
    "Path",
    "Problem",
    "ReverseSDE",
    "Reversible",
    "Scheme",
    "SolverError",
    "Stats",
    "TorchDiffEq",
    "TorchSDE",
    "flow",
    "integrate",
]
