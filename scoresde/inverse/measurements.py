r"""Measurements :math:`y = A(x_0)` + Gaussian noise; the base class of all measurements."""

from __future__ import annotations

import math
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.inverse.covariance import Covariance, as_covariance, whitened_operator
from scoresde.inverse.operators import Linear, Operator, linear_operator, module_rows
from scoresde.noise.keyed import Noise, as_noise
from scoresde.noise.streams import Stream

_Measurement = TypeVar("_Measurement", bound="Measurement")


@checked
class Measurement(nn.Module):
    r"""Measurement with Gaussian noise, :math:`y = A(x_0) + n`.

    The noise n has one standard deviation, one for each entry, or a full covariance Σ. Entries of infinite `std` were
    not measured: they have no effect, whatever their value in `y`. So an infinite `std` for some samples is a mask that
    differs from sample to sample, for every operator.

    Arguments:
        operator: Operator A; most methods need a :class:`Linear` one.
        y: Observed values: (1, *out), one measurement for all samples, or (B, *out), one for each.
        std: Standard deviation of the noise: a number, or a tensor that broadcasts to (*out) or to (B, *out). The
            number 0 stands for an exact measurement, which some methods do not accept.
        cov: Covariance of the noise of the flattened y instead of `std`: (M, M), or (B, M, M).

    Example:
        >>> import torch, scoresde as ss
        >>> ss.inverse.Measurement(ss.inverse.Downsample(2, (3, 8, 8)), torch.zeros(5, 3, 4, 4), std=0.1)
        Measurement(Downsample(2, event=(3, 8, 8), dims=2), y=(5, 3, 4, 4), std=0.1)
        >>> both = ss.inverse.Mask(torch.tensor([True, True]))
        >>> seen = ss.inverse.Measurement(both, torch.tensor([[0.5, -1.0]]), std=torch.tensor([0.1, torch.inf]))
        >>> seen.log_prob(torch.tensor([[0.5, 7.0], [0.5, 8.0]]))  # the second entry has no effect
        tensor([1.3836, 1.3836])
    """

    per_sample: ClassVar[tuple[str, ...]] = ("operator", "y", "covariance", "log_volume")
    """Names of attributes that hold one entry for each sample; :meth:`rows` selects them."""

    gaussian: ClassVar[bool] = True
    """Whether the noise is Gaussian."""

    operator: Operator
    y: Tensor
    covariance: Covariance | None
    log_volume: Tensor

    def __init__(
        self, operator: Operator, y: Tensor, std: float | Tensor | None = None, *, cov: Tensor | None = None
    ) -> None:
        super().__init__()
        if not isinstance(operator, Operator):
            raise TypeError(
                f"`operator` must be an Operator such as Mask(mask), got {type(operator).__name__}; wrap your own "
                f"function as Linear(forward, event) or Operator(forward, event)."
            )
        if (std is None) == (cov is None):
            raise ValueError("give the noise in one way: `std`, a number or a tensor, or `cov`, a full covariance.")
        self.operator = operator
        self.register_buffer("y", operator.as_output(y))
        self._std = 0.0
        if cov is None and not (isinstance(std, Tensor) and std.numel() != 1):
            self._std = check.number("std", std.item() if isinstance(std, Tensor) else std, at_least=0)
            self.covariance = None
        else:
            self.covariance = as_covariance(operator, std if isinstance(std, Tensor) else None, cov)
            if not self.covariance.shared and len(self.covariance.std) not in (1, len(y)) and len(y) > 1:
                raise ValueError(
                    f"the noise has {len(self.covariance.std)} rows and `y` has {len(y)}; give one for each y."
                )
        self._require_numbers()
        self.register_buffer("log_volume", torch.zeros(1, dtype=torch.float64))

    @property
    def std(self) -> float | Tensor:
        """Standard deviation of the noise: a number, or (1, *out) or (B, *out)."""
        return self._std if self.covariance is None else self.covariance.std.reshape(-1, *self.operator.out)

    def _require_numbers(self) -> None:
        """Raise an error for an entry of y that is not finite and counts as measured."""
        known, y = self.operator.known_entries, self.y
        bad = ~y.isfinite() if known is None else ~y.isfinite() & known.to(y.device)
        if self.covariance is not None and self.covariance.matrix is None:
            bad = bad & self.covariance.std.isfinite().reshape(-1, *self.operator.out).to(y.device)
        if y.device.type != "meta" and bool(bad.any()):
            first = tuple(int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"`y` is not finite in {int(bad.sum())} entries, the first is y{list(first)}; where an entry was not "
                f"measured, give it std=inf, as in torch.where(y.isnan(), torch.inf, std), or leave it out with Mask."
            )

    def extra_repr(self) -> str:
        noise = f"std={self._std:g}"
        if self.covariance is not None:
            matrix = self.covariance.matrix
            noise = f"std={tuple(self.covariance.std.shape)}" if matrix is None else f"cov={tuple(matrix.shape)}"
        return f"{self.operator!r}, y={tuple(self.y.shape)}, {noise}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    @checked
    def rows(self: _Measurement, index: Tensor) -> _Measurement:
        """This measurement for some samples of the batch.

        Arguments:
            index: Numbers of the samples, an integer tensor (b,); a number may occur more than once.
        """
        return module_rows(self, self.per_sample, index)

    @property
    def linear(self) -> Linear:
        """The operator; a TypeError if it is not linear."""
        return linear_operator(self.operator)

    def residual(self, x0: Tensor) -> Tensor:
        """y − A x0, (B, *out); 0 for entries that were not measured."""
        check.state("x0", x0)
        r = self.data(x0) - self.operator(x0)
        if self.covariance is None or self.covariance.matrix is not None:
            return r
        return torch.where(self.covariance.std.isfinite().to(r.device), r, 0.0)

    def data(self, x: Tensor) -> Tensor:
        """y with the dtype and device of `x`, (1, *out) or (B, *out); checks the number of rows."""
        check.state("x", x)
        if len(self.y) not in (1, len(x)):
            raise ValueError(
                f"`y` has {len(self.y)} rows and the state has {len(x)}; give one measurement for all samples or one "
                f"for each sample. If you split the batch, split `y` as well, as in `measurement.rows(index)`."
            )
        return self.y.to(x)

    def log_prob(self, x0: Tensor) -> Tensor:
        r"""log p(y | x0) in nats, (B, *event) to (B,); here log N(y; A x0, Σ), which needs std > 0."""
        self.require_likelihood("log_prob")
        noise, half, count = self.covariance, 0.5 * math.log(2 * math.pi), self.operator.entries
        if noise is None:
            z = (self.residual(x0) / self._std).flatten(1)
            volume: float | Tensor = -math.log(self._std) * _as_float(count)
        else:
            z = noise.whiten(self.residual(x0))
            volume = noise.log_volume()
            count = count if noise.matrix is not None else noise.measured.sum(1)
        constant = volume - half * _as_float(count) + self.log_volume
        return -0.5 * z.square().sum(1) + constant.to(z)

    @checked
    def simulate(self, x0: Tensor, seed: int | Noise | None = None) -> Tensor:
        """Draw y given x0, (B, *event) to (B, *out).

        Arguments:
            x0: States, (B, *event).
            seed: Seed of the noise, or a :class:`Noise`.
        """
        check.state("x0", x0)
        noise = as_noise(seed).fork(Stream.MEASUREMENT)
        return self.draw(self.operator(x0), noise)

    def draw(self, u: Tensor, noise: Noise) -> Tensor:
        """Draw y given u = A(x0), (B, *out) to (B, *out)."""
        z = noise.like(u, 0)
        if self.covariance is None:
            return u + self._std * z
        return u + self.covariance.color(z.flatten(1)).reshape(u.shape)

    def whitened(self) -> Measurement:
        r"""The same likelihood with noise of one `std`, a number: the measurement itself if it has one, else W y.

        Methods for linear operators and Gaussian noise use it, so that they need one formula. Its operator is W A with
        :math:`W \Sigma W^T = I`, and its `std` is 1.
        """
        if self.covariance is None:
            self.linear  # noqa: B018  # raises for nonlinear operators
            return self
        if bool((self.covariance.scale == 0).any()):
            raise ValueError(
                "`std` is 0 for some entries of y and not for others, which this method does not accept: it divides by "
                "`std`; give these entries a small one, such as 1e-3, or use `posterior` for a mixture."
            )
        operator, index = whitened_operator(self.linear, self.covariance)
        y = torch.where(self.covariance.std.isfinite(), self.y, 0.0) if self.covariance.matrix is None else self.y
        twin = Measurement(operator, self.covariance.whiten(y.double())[:, index], 1.0)
        twin.log_volume = self.covariance.log_volume() + self.log_volume
        return twin

    def require_likelihood(self, who: str) -> None:
        """Raise an error if y has no likelihood; `who` is the method named in the message."""
        self.require_noise(who)

    def require_noise(self, who: str) -> float:
        """Return `std` of :meth:`whitened`; raise an error if an entry of `std` is 0. `who` is the method named."""
        if self.covariance is None and self._std == 0:
            raise ValueError(
                f"`std` must be greater than 0 for {who}, which divides by it, got 0; give the noise level of y, such "
                f"as 1e-3. For an exact measurement use DDNM, ddrm or Replacement."
            )
        if self.covariance is not None and bool((self.covariance.scale == 0).any()):
            raise ValueError(
                f"`std` must be greater than 0 for {who}, which divides by it, got 0 for some entries; give them the "
                f"noise level of y, such as 1e-3."
            )
        return self._std if self.covariance is None else 1.0


def _as_float(count: int | Tensor) -> float | Tensor:
    return count.double() if isinstance(count, Tensor) else float(count)
