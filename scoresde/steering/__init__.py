"""Steering: sequential Monte Carlo towards any potential."""

from scoresde.steering.compositions import Composition, mixture, power, product, sample_composition
from scoresde.steering.particles import Steered
from scoresde.steering.potentials import Potential, Reward, Smoothed
from scoresde.steering.resampling import (
    Resampling,
    effective_size,
    multinomial,
    residual,
    stratified,
    systematic,
)
from scoresde.steering.steer import steer

__all__ = [
    "Composition",
    "Potential",
    "Resampling",
    "Reward",
    "Smoothed",
    "Steered",
    "effective_size",
    "mixture",
    "multinomial",
    "power",
    "product",
    "residual",
    "sample_composition",
    "steer",
    "stratified",
    "systematic",
]
