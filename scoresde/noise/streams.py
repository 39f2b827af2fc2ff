"""Streams of a seed: independent sources of numbers, one for each purpose of a function."""

from __future__ import annotations

from enum import IntEnum


class Stream(IntEnum):
    """Number of a stream, for :meth:`scoresde.noise.keyed.Noise.fork`.

    Functions that are not used together share small numbers, so that one seed gives the same initial states to all
    samplers, integrators and likelihoods. Names with equal numbers are aliases. Sets of samples that must not depend on
    the noise of a sampler with the same seed have large numbers.
    """

    # samplers, integrators and likelihoods
    START = 0  # initial states
    STEPS = 1  # normals of a plan's rows, increments of SDE integrators, noise of posterior samplers
    PROBES = 2  # probe vectors of stochastic traces

    # particle filters
    CHOICES = 2  # resampling of particles at every step
    FINAL = 3  # resampling of the final particles

    # variational bounds and divergences between path measures
    DIFFUSED = 3  # noise of the diffused data
    TIMES = 4  # diffusion times
    DECODER = 5  # noise of the data given the state of the last time
    DEQUANTIZE = 6  # positions of dequantized data inside their bins

    # metrics
    DIRECTIONS = 0  # directions of sliced distances
    ORDERS = 1  # orders of permutation tests
    CLASSIFIER = 2  # weights, folds and batches of the two-sample classifier

    # Brownian paths
    SPINE = 0  # chain of values at powers of 16; the cells between them use the numbers from 1 on

    # sets of samples
    GAUSSIAN = 0x67617573  # samples of a Gaussian
    MIXTURE = 0x6D6978  # samples of a mixture or of an empirical distribution
    FITTED = 0x666974  # initial states of the trajectories that a table is fitted to
    FITTED_NOISE = 0x666975  # noise of these trajectories
    FITTED_SHIFTS = 0x666976  # directions in which initial states are shifted to measure how far trajectories part
    MEASUREMENT = 0x6D6561  # noise of simulated measurements
    GRIDS = 0x6F7074  # samples that a grid is computed from
