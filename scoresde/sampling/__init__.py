"""From a denoiser to samples: solve, encode, run in parallel, and sample with transitions or Langevin steps."""

from scoresde.denoisers.start import Start
from scoresde.integrators.method import Solution, Watch
from scoresde.sampling.encode import decode, encode
from scoresde.sampling.interpolate import interpolate, slerp
from scoresde.sampling.langevin import LangevinCorrector, langevin
from scoresde.sampling.learned_variance import LearnedVariance, mean_squared_score
from scoresde.sampling.parallel import Parallel
from scoresde.sampling.solve import default_solver, plan_for, sample, solve
from scoresde.sampling.stepper import Gathered, Stepper, gather
from scoresde.sampling.transitions import Transition, transitions

__all__ = [
    "Gathered",
    "LangevinCorrector",
    "LearnedVariance",
    "Parallel",
    "Solution",
    "Start",
    "Stepper",
    "Transition",
    "Watch",
    "decode",
    "default_solver",
    "encode",
    "gather",
    "interpolate",
    "langevin",
    "mean_squared_score",
    "plan_for",
    "sample",
    "slerp",
    "solve",
    "transitions",
]
