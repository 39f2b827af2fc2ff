r"""Calibration of posterior samples."""

from __future__ import annotations

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.metrics.pairs import stream_of
from scoresde.noise.streams import Stream

__all__ = ["ranks"]


@checked
def ranks(truth: Tensor, samples: Tensor, seed: int = 0) -> Tensor:
    r"""Rank of each true value among M posterior samples, as a fraction in (0, 1).

    .. math:: r = \frac{\#\{m : s_m < \theta\} + u\,(1 + \#\{m : s_m = \theta\})}{M + 1}, \qquad u \sim U(0, 1)

    If the samples come from the posterior of a parameter θ that was drawn from the prior, r is uniform, exactly and for
    every M. ``ss.plots.calibration`` draws the distribution of the ranks.

    Arguments:
        truth: True parameters, (N, *event).
        samples: Posterior samples of each, (N, M, *event).
        seed: Seed of u.

    References:
        | Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018),
          arXiv:1804.06788

    Example:
        >>> import torch
        >>> samples = torch.arange(9.0).reshape(1, 9, 1)
        >>> float(ranks(torch.tensor([[8.5]]), samples)) > 0.9
        True
    """
    if samples.ndim < 2 or samples.shape[:1] + samples.shape[2:] != truth.shape or samples.shape[1] == 0:
        raise ValueError(
            f"`samples` must have shape (N, M, *event) for a `truth` of shape (N, *event), "
            f"got {tuple(samples.shape)} for {tuple(truth.shape)}."
        )
    for name, value in (("truth", truth), ("samples", samples)):
        if not bool(check.state(name, value).isfinite().all()):
            raise ValueError(f"`{name}` must be finite; remove the other values.")
    u = stream_of(seed, Stream.ORDERS).uniform(tuple(truth.shape), draw=0, dtype=torch.float64).to(truth.device)
    below, equal = (samples < truth[:, None]).sum(1), (samples == truth[:, None]).sum(1)
    return (below + u * (1 + equal)) / (samples.shape[1] + 1)
