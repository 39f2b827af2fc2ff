"""Streams of a seed: independent sources of normals, one for each purpose of a run."""

from __future__ import annotations

from enum import IntEnum


class Stream(IntEnum):
    """Number of a stream, for :meth:`scoresde.noise.keyed.Noise.fork`.

    Streams of different functions share small numbers: a seed that gives the start of one function gives the start of
    every other one. Sets of samples that must not depend on a sampler's noise have large numbers.
    """

    START = 0  # initial states of samplers and likelihoods
    STEPS = 1  # normals of a plan's rows, increments of SDE integrators, noise of posterior samplers
    PROBES = 2  # probes of stochastic traces
    CHOICES = 3  # resampling of particles
    FINAL = 4
