r"""Measurements: an operator, what it saw, and with how much noise. Knows no diffusion."""

from __future__ import annotations

import math

from torch import Tensor, nn

from scoresde import _checks as check
from scoresde.inverse.operators import Linear, Operator


class Measurement(nn.Module):
    r"""What was seen: :math:`y = A x_0 + \mathrm{std}\cdot n`, n standard normal.

    Arguments:
        operator: A, an :class:`Operator`; most methods need a :class:`Linear` one.
        y: (1, *out), one measurement for all samples, or (B, *out), one for each.
        std: Standard deviation of the noise; 0 for an exact measurement, which some methods do not take.
    """

    y: Tensor

    def __init__(self, operator: Operator, y: Tensor, std: float) -> None:
        super().__init__()
        if not isinstance(operator, Operator):
            raise TypeError(
                f"`operator` must be an operator such as Mask(mask), or Linear(forward, event) for a function of "
                f"yours, got {type(operator).__name__}."
            )
        self.operator = operator
        self.register_buffer("y", operator._check_y(y))
        self.std = check.number("std", std, least=0)

    @property
    def linear(self) -> Linear:
        """The operator, if it is linear."""
        if not isinstance(self.operator, Linear):
            raise TypeError(
                "this method needs a linear operator, with an adjoint; DPS and ClassifierGuidance take any function."
            )
        return self.operator

    def residual(self, x0: Tensor) -> Tensor:
        """y − A x0, (B, *out)."""
        return self.data(x0) - self.operator(x0)

    def data(self, x: Tensor) -> Tensor:
        """y beside a state: (1, *out) or (B, *out), in its dtype."""
        if len(self.y) not in (1, len(x)):
            raise ValueError(
                f"`y` has {len(self.y)} rows and the state has {len(x)}; give one measurement for all samples, or one "
                f"for each: a part of a batch needs its part of `y`."
            )
        return self.y.to(x)

    def log_prob(self, x0: Tensor) -> Tensor:
        r"""log N(y; A x0, std² I) in nats, (B, *event) to (B,); needs std > 0."""
        std = self.noisy("log_prob")
        z = (self.residual(x0) / std).flatten(1)
        return -0.5 * z.square().sum(1) - z.shape[1] * (math.log(std) + 0.5 * math.log(2 * math.pi))

    def likely(self, who: str) -> None:
        """Refuse a measurement without a density."""
        self.noisy(who)

    def noisy(self, who: str) -> float:
        """The standard deviation, which must be positive."""
        if self.std == 0:
            raise ValueError(
                f"`std` must be greater than 0 for {who}, which divides by it, got 0: say how well y is known, such as "
                f"1e-3; for an exact measurement there are DDNM, DDRM and Replacement."
            )
        return self.std


class Counts(Measurement):
    r"""Counts of what comes in one by one: :math:`y \sim \mathrm{Poisson}(A(x_0))`, as of photons.

    .. math:: \log p(y \mid x_0) = \sum_j y_j\log\mu_j - \mu_j - \log y_j!, \qquad \mu = A(x_0)

    The operator holds the gain and what makes rates positive, as in ``Operator(lambda x: 50 * (x + 1), event)`` for
    data in [−1, 1]. Where a state has :math:`\mu < \varepsilon` the logarithm is continued by its tangent at ε, so that
    its gradient leads back. For :class:`~scoresde.inverse.denoisers.DPS` and ``guidance.ClassifierGuidance``; methods
    that need Gaussian noise refuse it.

    Arguments:
        operator: A, linear or not: the expected counts.
        y: Counts, (1, *out) or (B, *out), at least 0.
        least: ε, the smallest rate that is told from none.
    """

    def __init__(self, operator: Operator, y: Tensor, least: float = 1e-2) -> None:
        super().__init__(operator, y, 0.0)
        self.least = check.number("least", least, above=0)
        if bool((y < 0).any()):
            raise ValueError(f"`y` must be counts, at least 0, got {float(y.min()):g}.")

    @property
    def linear(self) -> Linear:
        """Refused: what asks for it takes the noise for Gaussian."""
        raise TypeError(
            "this method needs Gaussian noise, Measurement(operator, y, std); DPS and ClassifierGuidance take Counts."
        )

    def log_prob(self, x0: Tensor) -> Tensor:
        """log Poisson(y; A(x0)) in nats, (B, *event) to (B,)."""
        y, mu = self.data(x0), self.operator(x0)
        inside = mu.clamp_min(self.least)
        log_mu = inside.log() + (mu - inside) / self.least
        return (y * log_mu - mu - (y + 1).lgamma()).flatten(1).sum(1)

    def likely(self, who: str) -> None:
        """Counts have a density."""

    def noisy(self, who: str) -> float:
        """Refused: no standard deviation says it all."""
        raise TypeError(f"{who} needs Gaussian noise, Measurement(operator, y, std); Counts have none.")
