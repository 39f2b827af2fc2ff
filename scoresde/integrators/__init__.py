"""Integration that a table cannot hold: error control, reversible solves, torchdiffeq and torchsde."""

from scoresde.integrators.adaptive import Adaptive, SolverError, Stats, flow, integrate
from scoresde.integrators.adaptive_sde import adaptive_sde
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
)
from scoresde.integrators.reversible import Reversible, Twin
from scoresde.integrators.via_torchdiffeq import torchdiffeq_solve
from scoresde.integrators.via_torchsde import ReverseSDE, torchsde_sample

__all__ = [
    "DPM12",
    "DPM23",
    "Adams",
    "Adaptive",
    "BogackiShampine",
    "DPMPair",
    "DormandPrince",
    "EmbeddedRungeKutta",
    "Frame",
    "Pair",
    "ReverseSDE",
    "Reversible",
    "SolverError",
    "Stats",
    "Twin",
    "adaptive_sde",
    "flow",
    "integrate",
    "torchdiffeq_solve",
    "torchsde_sample",
]
