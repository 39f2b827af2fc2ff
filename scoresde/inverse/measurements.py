r"""Measurements :math:`y = A(x_0)` + noise, Gaussian or Poisson, and their likelihoods."""

from __future__ import annotations

import math
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.inverse.operators import Linear, Operator, module_rows

_Measurement = TypeVar("_Measurement", bound="Measurement")


@checked
class Measurement(nn.Module):
    r"""Measurement with Gaussian noise, :math:`y = A(x_0) + \mathrm{std}\cdot n`, where n is standard normal.

    Arguments:
        operator: Operator A; most methods need a :class:`Linear` one.
        y: Observed values: (1, *out), one measurement for all samples, or (B, *out), one for each.
        std: Standard deviation of the noise; 0 for an exact measurement, which some methods do not accept.

    Example:
        >>> import torch, scoresde as ss
        >>> ss.inverse.Measurement(ss.inverse.Downsample(2, (3, 8, 8)), torch.zeros(5, 3, 4, 4), std=0.1)
        Measurement(Downsample(2, event=(3, 8, 8), dims=2), y=(5, 3, 4, 4), std=0.1)
    """

    per_sample: ClassVar[tuple[str, ...]] = ("operator", "y")
    """Names of attributes that hold one entry for each sample; :meth:`rows` selects them."""

    operator: Operator
    y: Tensor

    def __init__(self, operator: Operator, y: Tensor, std: float) -> None:
        super().__init__()
        if not isinstance(operator, Operator):
            raise TypeError(
                f"`operator` must be an Operator such as Mask(mask), got {type(operator).__name__}; wrap your own "
                f"function as Linear(forward, event) or Operator(forward, event)."
            )
        self.operator = operator
        self.register_buffer("y", operator.as_output(y))
        self.std = check.number("std", std, at_least=0)

    def extra_repr(self) -> str:
        return f"{self.operator!r}, y={tuple(self.y.shape)}, std={self.std:g}"

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
        if not isinstance(self.operator, Linear):
            raise TypeError(
                f"`operator` must be Linear for this method, got {type(self.operator).__name__}; DPS and "
                f"ClassifierGuidance accept any differentiable operator."
            )
        return self.operator

    def residual(self, x0: Tensor) -> Tensor:
        """y − A x0, (B, *out)."""
        check.state("x0", x0)
        return self.data(x0) - self.operator(x0)

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
        r"""log N(y; A x0, std² I) in nats, (B, *event) to (B,); needs std > 0."""
        std = self.require_noise("log_prob")
        z = (self.residual(x0) / std).flatten(1)
        return -0.5 * z.square().sum(1) - self.operator.entries * (math.log(std) + 0.5 * math.log(2 * math.pi))

    def require_likelihood(self, who: str) -> None:
        """Raise an error if y has no likelihood; `who` is the method named in the message."""
        self.require_noise(who)

    def require_noise(self, who: str) -> float:
        """Return `std`; raise an error if it is 0. `who` is the method named in the message."""
        if self.std == 0:
            raise ValueError(
                f"`std` must be greater than 0 for {who}, which divides by it, got 0; give the noise level of y, such "
                f"as 1e-3. For an exact measurement use DDNM, ddrm or Replacement."
            )
        return self.std


@checked
class Counts(Measurement):
    r"""Measurement with Poisson noise, :math:`y \sim \mathrm{Poisson}(A(x_0))`, such as photon counts.

    .. math:: \log p(y \mid x_0) = \sum_j y_j\log\mu_j - \mu_j - \log y_j!, \qquad \mu = A(x_0)

    The operator returns the expected counts; for data in [−1, 1] it may be ``Operator(lambda x: 50 * (x + 1), event)``.
    For :math:`\mu < \varepsilon` the tangent at ε replaces log μ, so the gradient is finite for μ ≤ 0 too.
    :class:`DPS` and ``guidance.ClassifierGuidance`` accept counts; methods that need
    Gaussian noise raise an error.

    Arguments:
        operator: Operator A, linear or not, that returns the expected counts μ.
        y: Counts, (1, *out) or (B, *out), at least 0.
        floor: Threshold ε below which log μ is linear.
    """

    def __init__(self, operator: Operator, y: Tensor, floor: float = 1e-2) -> None:
        super().__init__(operator, y, 0.0)
        self.floor = check.number("floor", floor, above=0)
        if bool((y < 0).any()):
            raise ValueError(f"`y` must be counts, at least 0, got {float(y.min()):g}.")

    def extra_repr(self) -> str:
        return f"{self.operator!r}, y={tuple(self.y.shape)}, floor={self.floor:g}"

    @property
    def linear(self) -> Linear:
        raise TypeError(
            "this method needs Gaussian noise, Measurement(operator, y, std), got Counts; DPS and ClassifierGuidance "
            "accept Counts."
        )

    def log_prob(self, x0: Tensor) -> Tensor:
        """log Poisson(y; A(x0)) in nats, (B, *event) to (B,)."""
        check.state("x0", x0)
        y, mu = self.data(x0), self.operator(x0)
        inside = mu.clamp_min(self.floor)
        log_mu = inside.log() + (mu - inside) / self.floor
        return (y * log_mu - mu - (y + 1).lgamma()).flatten(1).sum(1)

    def require_likelihood(self, who: str) -> None:
        pass  # the Poisson likelihood always exists

    def require_noise(self, who: str) -> float:
        raise TypeError(f"{who} needs Gaussian noise, Measurement(operator, y, std), got Counts.")


def check_measurement(measurement: Measurement) -> Measurement:
    """Return `measurement`; raise an error unless it is one."""
    if not isinstance(measurement, Measurement):
        raise TypeError(f"`measurement` must be Measurement(operator, y, std), got {type(measurement).__name__}.")
    return measurement
