"""Where randomness comes from: normals keyed by seed, sample and draw, and Brownian paths."""

from scoresde.noise.brownian import BrownianPath, Span
from scoresde.noise.keyed import Noise

__all__ = [
    "BrownianPath",
    "Noise",
    "Span",
]
