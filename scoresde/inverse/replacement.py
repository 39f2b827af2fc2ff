"""Inpainting by replacement: known entries are overwritten during the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.inverse.measurements import Measurement
from scoresde.inverse.operators import Mask
from scoresde.noise.keyed import Noise
from scoresde.noise.streams import Stream
from scoresde.processes.sde import SDE


@checked
@dataclass(frozen=True, eq=False)
class Replacement:
    r"""Inpainting by replacement: a hook that sets the known entries to a noised measurement at every node.

    It is given to a run as ``watch=ss.Watch(hook=...)``.

    .. math:: x_t \leftarrow m\,(\alpha_t y + \sigma_t z) + (1 - m)\,x_t

    At σ = 0 the known entries equal y, with every solver. The unknown entries depend on the known ones only through
    the noisy state, so the two parts may disagree; the grid of ``grids.repaint`` repeats steps to reduce this error.

    Arguments:
        sde: The process.
        measurement: Measurement with a :class:`Mask`; `std` is not used.
        seed: Seed of z, or a :class:`Noise`.
        fresh: Draw a new z at every node; False uses the same z at all nodes.

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          arXiv:2011.13456, appendix I.2

    Example:
        >>> import torch, scoresde as ss
        >>> prior = ss.GaussianMixture(ss.VP(), torch.zeros(1, 2), std=1.0)
        >>> seen = ss.inverse.Measurement(ss.inverse.Mask(torch.tensor([True, False])), torch.tensor([[0.5]]), std=0)
        >>> hook = ss.inverse.Replacement(prior.sde, seen, seed=1)
        >>> x = ss.sample(prior, (3, 2), steps=10, seed=0, watch=ss.Watch(hook=hook))
        >>> x[:, 0]
        tensor([0.5000, 0.5000, 0.5000])
    """

    sde: SDE
    measurement: Measurement
    seed: int | Sequence[int] | Noise | None = None
    fresh: bool = True
    _noise: Noise = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.measurement.operator, Mask):
            raise TypeError(
                f"`measurement` must have a Mask as its operator, got {type(self.measurement.operator).__name__}; use "
                f"DDNM for other linear operators."
            )
        noise = self.seed if isinstance(self.seed, Noise) else Noise(self.seed)
        object.__setattr__(self, "_noise", noise.fork(Stream.STEPS))

    def bind(self, model: AbstractDenoiser) -> Replacement:
        """This hook, if it is on the process of `model`; :func:`solve` calls this method.

        Arguments:
            model: Denoiser that is solved.
        """
        if self.sde != model.sde:
            raise ValueError(
                f"`hook` is a Replacement on {self.sde!r}, but the model is on {model.sde!r}: it would set entries to "
                f"the wrong noise level; make it with Replacement(model.sde, ...)."
            )
        return self

    def __call__(self, node: int, t: float | Tensor, x: Tensor) -> Tensor:
        """Replace the known entries of the state."""
        mask = self.measurement.operator
        assert isinstance(mask, Mask)
        alpha, sigma = (check.expand(fn(t), x) for fn in (self.sde.alpha, self.sde.sigma))
        known = mask.adjoint(self.measurement.data(x)).expand_as(x)
        z = self._noise.like(x, node if self.fresh else 0)
        return torch.where(mask.mask, alpha * known + sigma * z, x)
