"""Several measurements of one state as one measurement."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from scoresde._doors import checked
from scoresde.inverse.measurements import Measurement
from scoresde.inverse.operators import Linear, Operator
from scoresde.noise.keyed import Noise


class _Stacked(Operator):
    """The outputs of several operators, flattened, one after another.

    Arguments:
        parts: Operators on states of one shape.
    """

    def __init__(self, parts: Sequence[Operator]) -> None:
        nn.Module.__init__(self)
        self.parts = nn.ModuleList(parts)
        self.sizes = [math.prod(part.out) for part in parts]
        self.event, self.out = parts[0].event, (sum(self.sizes),)
        if any(part.per_sample for part in parts):
            self.per_sample = ("parts",)

    @property
    def operators(self) -> list[Operator]:
        """The operators."""
        return [part for part in self.parts if isinstance(part, Operator)]

    def rows(self, index: Tensor) -> _Stacked:
        parts = [part.rows(index) for part in self.operators]
        if all(a is b for a, b in zip(parts, self.operators, strict=True)):
            return self
        twin = copy.copy(self)
        twin._modules = {"parts": nn.ModuleList(parts)}
        twin.__dict__.pop("_svd", None)
        return twin

    @property
    def entries(self) -> int | Tensor:
        return sum((part.entries for part in self.operators), start=0)

    @property
    def known_entries(self) -> Tensor | None:
        known = [part.known_entries for part in self.operators]
        rows = max((len(k) for k in known if k is not None), default=0)
        if not rows:
            return None
        whole = [
            torch.ones(1, n, dtype=torch.bool) if k is None else k.flatten(1)
            for k, n in zip(known, self.sizes, strict=True)
        ]
        return torch.cat([k.expand(rows, -1) for k in whole], 1)

    def extra_repr(self) -> str:
        return ", ".join(map(repr, self.operators))

    def evaluate(self, x: Tensor) -> Tensor:
        return torch.cat([part.evaluate(x).flatten(1) for part in self.operators], 1)


class _StackedLinear(_Stacked, Linear):
    """:class:`_Stacked` for linear operators."""

    def transpose(self, y: Tensor) -> Tensor:
        pieces = zip(self.operators, y.split(self.sizes, 1), strict=True)
        return sum(
            (part.transpose(piece.reshape(-1, *part.out)) for part, piece in pieces if isinstance(part, Linear)),
            start=y.new_zeros(len(y), *self.event),
        )

    @property
    def device(self) -> torch.device:
        return next((part.device for part in self.operators if isinstance(part, Linear)), torch.device("cpu"))


class _Several(Measurement):
    """Independent measurements of one state, at least one of which has noise that is not Gaussian.

    Arguments:
        parts: Measurements.
    """

    per_sample: ClassVar[tuple[str, ...]] = ()
    gaussian = False

    def __init__(self, parts: Sequence[Measurement]) -> None:
        operator = stacked_operator([part.operator for part in parts])
        super().__init__(operator, _rows_of([part.y for part in parts]), 0.0)
        self.parts = nn.ModuleList(parts)

    @property
    def measurements(self) -> list[Measurement]:
        """The measurements."""
        return [part for part in self.parts if isinstance(part, Measurement)]

    def rows(self, index: Tensor) -> _Several:
        parts = [part.rows(index) for part in self.measurements]
        same = all(a is b for a, b in zip(parts, self.measurements, strict=True))
        return self if same else _Several(parts)

    def extra_repr(self) -> str:
        return ", ".join(map(repr, self.measurements))

    @property
    def linear(self) -> Linear:
        return self._refused().linear

    def whitened(self) -> Measurement:
        return self._refused().whitened()

    def log_prob(self, x0: Tensor) -> Tensor:
        return torch.stack([part.log_prob(x0) for part in self.measurements]).sum(0)

    def draw(self, u: Tensor, noise: Noise) -> Tensor:
        sizes = [math.prod(part.operator.out) for part in self.measurements]
        pieces = zip(self.measurements, u.split(sizes, 1), strict=True)
        drawn = [
            part.draw(piece.reshape(-1, *part.operator.out), noise.fork(k)) for k, (part, piece) in enumerate(pieces)
        ]
        return torch.cat([y.flatten(1) for y in drawn], 1)

    def require_likelihood(self, who: str) -> None:
        for part in self.measurements:
            part.require_likelihood(who)

    def require_noise(self, who: str) -> float:
        return self._refused().require_noise(who)

    def _refused(self) -> Measurement:
        """The first measurement whose noise is not Gaussian, which raises the error of a method for Gaussian noise."""
        return next(part for part in self.measurements if type(part) is not Measurement)


@checked
def stack(measurements: Sequence[Measurement]) -> Measurement:
    """One measurement from several independent ones of the same state.

    All methods that take a measurement also take a list of them, and call this function. If all have Gaussian noise,
    the result is a :class:`Measurement` with the flattened outputs one after another, and works with every method.
    Otherwise its log-likelihood is the sum, and it works where each of the measurements does.

    Arguments:
        measurements: Measurements on states of one shape, each with one y or with one for each sample.

    Example:
        >>> import torch, scoresde as ss
        >>> first, mean = ss.inverse.Mask(torch.tensor([True, False])), ss.inverse.Matrix(torch.full((1, 2), 0.5))
        >>> prior = ss.GaussianMixture(ss.VP(), torch.zeros(1, 2), std=1.0)
        >>> a = ss.inverse.Measurement(first, torch.tensor([[1.0]]), std=0.1)
        >>> b = ss.inverse.Measurement(mean, torch.tensor([[0.0]]), std=0.2)
        >>> both = ss.inverse.posterior(prior, [a, b]).mean()
        >>> torch.allclose(both, ss.inverse.posterior(ss.inverse.posterior(prior, a), b).mean())
        True
    """
    parts = [check_measurement(part) for part in measurements]
    if not parts:
        raise ValueError("`measurements` must hold at least one measurement, got none.")
    if len(parts) == 1:
        return parts[0]
    events = {part.operator.event for part in parts}
    if len(events) > 1:
        raise ValueError(f"`measurements` must be of states of one shape, got {sorted(events)}.")
    if any(type(part) is not Measurement for part in parts):
        return _Several(parts)
    operator = stacked_operator([part.operator for part in parts])
    y = _rows_of([part.y for part in parts])
    stds = {part.std for part in parts if part.covariance is None}
    if len(stds) == 1 and all(part.covariance is None for part in parts):
        joint = Measurement(operator, y, *stds)
    elif all(part.covariance is None or part.covariance.matrix is None for part in parts):
        joint = Measurement(operator, y, _rows_of([_stds(part) for part in parts]))
    else:
        joint = Measurement(operator, y, cov=_block_diagonal([_matrix(part) for part in parts]))
    joint.log_volume = sum((part.log_volume for part in parts), start=joint.log_volume)
    return joint


def stacked_operator(parts: Sequence[Operator]) -> Operator:
    """The outputs of several operators, flattened; linear if all are."""
    return (_StackedLinear if all(isinstance(part, Linear) for part in parts) else _Stacked)(parts)


Seen = Measurement | Sequence[Measurement]
"""A measurement, or several of one state."""


def check_measurement(measurement: Seen) -> Measurement:
    """Return a measurement, stacked if there are several; raise an error unless there is one."""
    if isinstance(measurement, Sequence) and not isinstance(measurement, str):
        for part in measurement:
            check_measurement(part)
        return stack(measurement)
    if not isinstance(measurement, Measurement):
        raise TypeError(f"`measurement` must be Measurement(operator, y, std), got {type(measurement).__name__}.")
    return measurement


def _rows_of(values: Sequence[Tensor]) -> Tensor:
    """Tensors (1 or B, ...), flattened and side by side."""
    rows = max(map(len, values))
    for value in values:
        if len(value) not in (1, rows):
            raise ValueError(f"measurements must have one row or as many as the others, got {len(value)} and {rows}.")
    return torch.cat([value.flatten(1).expand(rows, -1).to(torch.result_type(value, values[0])) for value in values], 1)


def _stds(part: Measurement) -> Tensor:
    size = math.prod(part.operator.out)
    if part.covariance is None:
        return torch.full((1, size), part.require_noise("measurements with different noise"), dtype=torch.float64)
    return part.covariance.std.flatten(1)


def _matrix(part: Measurement) -> Tensor:
    """Covariance of the noise, (1 or B, M, M)."""
    if part.covariance is not None and part.covariance.matrix is not None:
        return part.covariance.matrix
    stds = _stds(part)
    if not bool(stds.isfinite().all()):
        raise ValueError(
            "an infinite `std` and a full `cov` do not go together in one list; give the entries that were measured to "
            "a Mask or Matrix."
        )
    return torch.diag_embed(stds**2)


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    rows, size = max(map(len, blocks)), sum(block.shape[1] for block in blocks)
    whole = blocks[0].new_zeros(rows, size, size)
    first = 0
    for block in blocks:
        last = first + block.shape[1]
        whole[:, first:last, first:last] = block
        first = last
    return whole
