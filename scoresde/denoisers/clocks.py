"""Time inputs of networks as objects that a saved model can hold: functions of the time t, each with its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass

from torch import Tensor

from scoresde.processes.named import VE
from scoresde.processes.sde import SDE


@dataclass(frozen=True)
class Affine:
    r"""Labels that are linear in time: :math:`\mathrm{label} = a + b\,t`.

    Arguments:
        a: Label at t = 0.
        b: Slope.
    """

    a: float
    b: float

    def __call__(self, t: Tensor) -> Tensor:
        return self.a + self.b * t

    def then(self, other: Affine) -> Affine:
        """The labels `other` of the labels of this function."""
        return Affine(other.a + other.b * self.a, other.b * self.b)


@dataclass(frozen=True)
class Rescaled:
    """Labels of a β list of N steps, rescaled to 0 … 1000, as in guided diffusion.

    Arguments:
        N: Number of steps.
    """

    N: int

    def __call__(self, t: Tensor) -> Tensor:
        return (t - 1).clamp_min(0) * (1000 / self.N)


@dataclass(frozen=True)
class NearestLevel:
    """Label N − 1 − i of the nearest of N geometric levels σ_i, as in the discrete VE networks of score_sde.

    Arguments:
        ve: Process, with the least and the greatest level.
        N: Number of levels.
    """

    ve: VE
    N: int

    def __call__(self, t: Tensor) -> Tensor:
        ratio = (self.ve.sigma(t) / self.ve.sigma_min).log() / math.log(self.ve.sigma_max / self.ve.sigma_min)
        return ((self.N - 1) * (1 - ratio)).round().clamp(0, self.N - 1)


@dataclass(frozen=True)
class Warp:
    """Label of a time of Würstchen's schedule, whose cosine is evaluated at 1 − (1 − label)^k or label^k.

    Arguments:
        k: Exponent: the first form for k > 1, the second for k < 1.
    """

    k: float

    def __call__(self, t: Tensor) -> Tensor:
        if self.k == 1:
            return t
        return 1 - (1 - t) ** (1 / self.k) if self.k > 1 else t ** (1 / self.k)


@dataclass(frozen=True)
class Angle:
    r"""Label :math:`\tfrac{2}{\pi}\arctan t` of a process whose time is σ, as in Stable Audio."""

    def __call__(self, t: Tensor) -> Tensor:
        return t.atan() * (2 / math.pi)


CLOCKS = {"affine": Affine, "rescaled": Rescaled, "nearest_level": NearestLevel, "warp": Warp, "angle": Angle}
"""Names in files of the classes of this module."""


def to_dict(clock: object) -> dict[str, object] | None:
    """A time input of this module as JSON holds it, by its name in files; None for any other function.

    Arguments:
        clock: Time input.
    """
    for name, kind in CLOCKS.items():
        if type(clock) is kind and is_dataclass(clock):
            values = {f.name: getattr(clock, f.name) for f in fields(clock)}
            return {name: {k: v.to_dict() if isinstance(v, SDE) else v for k, v in values.items()}}
    return None


def from_dict(table: Mapping[str, object]) -> Affine | Rescaled | NearestLevel | Warp | Angle | None:
    """The time input of a dictionary that :func:`to_dict` made, or None if the dictionary has none of their names.

    Arguments:
        table: Dictionary of one name.
    """
    for name, kind in CLOCKS.items():
        values = table.get(name)
        if isinstance(values, Mapping):
            made = {k: SDE.from_dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
            clock: Affine | Rescaled | NearestLevel | Warp | Angle = kind(**made)
            return clock
    return None
