"""From a denoiser to samples: solve, encode, run in parallel, and sample with transitions or Langevin steps."""

from scoresde.denoisers.start import Start
from scoresde.integrators.method import Solution, Watch
from scoresde.sampling.capture import Captured, capture
from scoresde.sampling.defaults import Recommendation, default_grid, default_solver, recommend
from scoresde.sampling.encode import decode, encode
from scoresde.sampling.interpolate import interpolate, slerp
from scoresde.sampling.langevin import LangevinCorrector, langevin
from scoresde.sampling.learned_variance import LearnedVariance, mean_squared_score
from scoresde.sampling.parallel import Parallel
from scoresde.sampling.profile import Profile, profile
from scoresde.sampling.solve import plan_for, sample, solve
from scoresde.sampling.stepper import Gathered, Stepper, gather
from scoresde.sampling.transitions import Transition, transitions

__all__ = [
    "Captured",
    "Gathered",
    "LangevinCorrector",
    "LearnedVariance",
    "Parallel",
    "Profile",
    "Recommendation",
    "Solution",
    "Start",
    "Stepper",
    "Transition",
    "Watch",
    "capture",
    "decode",
    "default_grid",
    "default_solver",
    "encode",
    "gather",
    "interpolate",
    "langevin",
    "mean_squared_score",
    "plan_for",
    "profile",
    "recommend",
    "sample",
    "slerp",
    "solve",
    "transitions",
]
