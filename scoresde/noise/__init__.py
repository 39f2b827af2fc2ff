"""Where randomness comes from: normals keyed by seed, sample and draw, and Brownian paths."""

from scoresde.noise.brownian import BrownianPath, Span
from scoresde.noise.keyed import Noise
from scoresde.noise.streams import Stream

__all__ = [
    "BrownianPath",
    "Noise",
    "Span",
    "Stream",
]
