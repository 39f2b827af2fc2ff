r"""The likelihood of a measurement as a potential for steering, and its twist."""

from __future__ import annotations

import math

from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.inverse.likelihoods import EntrywiseMeasurement
from scoresde.inverse.measurements import Measurement
from scoresde.inverse.operators import Linear, ScaledIsometry
from scoresde.inverse.stacked import Seen, check_measurement
from scoresde.processes.sde import SDE
from scoresde.steering.potentials import Potential, Smoothed, spread


@checked
class Likelihood(Potential):
    r"""Likelihood of a measurement as a potential: particles become samples of p(x₀ | y), and Z is the evidence p(y).

    The twist takes x₀ given x_t as N(D, r² I):

    .. math:: \log\int p(y \mid x_0)\,N(x_0; D, r^2 I)\,dx_0, \qquad r^2 = \frac{\sigma^2 s^2}{\alpha^2 s^2 + \sigma^2}

    in closed form, N(y; A D, Σ + r² A Aᵀ), for Gaussian noise and a linear operator. It is a product over the entries
    for other noise with such a form and A Aᵀ = g I, and an average over points as in ``steering.Smoothed`` for any
    other likelihood or operator. The target is the exact posterior in all cases.

    Arguments:
        measurement: Measurement of any kind, with one y for each problem; or a list of several.
        data_std: Standard deviation s of the data; ``math.inf`` gives r = σ/α.
        points: Number of points of the average, where it has no closed form; even.

    Example:
        >>> import torch, scoresde as ss
        >>> prior = ss.GaussianMixture(ss.VP(), torch.zeros(1, 2), std=1.0)
        >>> square = ss.inverse.Operator(lambda x: x.square().sum(1, keepdim=True), (2,))
        >>> seen = ss.inverse.Likelihood(ss.inverse.Measurement(square, torch.tensor([[4.0]]), std=0.5))
        >>> run = ss.steering.steer(prior, seen, (1, 2), particles=500, seed=0)
        >>> bool((run.mean(lambda x: x.norm(dim=1)) - 1.96).abs() < 0.1)
        True
    """

    def __init__(self, measurement: Seen, data_std: float = 1.0, points: int = 16) -> None:
        self.measurement: Measurement = check_measurement(measurement)
        self.measurement.require_likelihood("Likelihood")
        self.data_std = data_std if data_std == math.inf else check.number("data_std", data_std, above=0)
        self.points = check.integer("points", points, at_least=2)
        operator = self.measurement.operator
        gaussian = self.measurement.gaussian
        self._linear = isinstance(operator, Linear) and gaussian
        seen = self.measurement
        self._isometry = isinstance(operator, ScaledIsometry) and isinstance(seen, EntrywiseMeasurement) and seen.smooth
        if self._linear:
            self._white = self.measurement.whitened()
            self._std = self._white.require_noise("Likelihood")
            self._spectrum = self._white.linear.spectrum()

    def __repr__(self) -> str:
        return f"Likelihood({self.measurement!r}, data_std={self.data_std:g})"

    def log_value(self, x0: Tensor) -> Tensor:
        return self.measurement.log_prob(x0)

    def twist(self, x: Tensor, x0: Tensor, t: float | Tensor, sde: SDE) -> Tensor:
        if self._linear:
            return self._closed(x0, check.expand(self._variance(sde, t), x0))
        if self._isometry:
            A, seen = self.measurement.operator, self.measurement
            variance = check.expand(self._variance(sde, t), x0)
            v = variance * A.gram  # type: ignore[operator]
            v = v.reshape(-1, *[1] * len(A.out)) if isinstance(v, Tensor) and v.ndim else v
            assert isinstance(seen, EntrywiseMeasurement)
            return seen.smoothed(A(x0), v)
        width = self.data_std if math.isfinite(self.data_std) else 1e6
        return Smoothed(self, self.points, width).twist(x, x0, t, sde)

    def rows(self, index: Tensor) -> Likelihood:
        measurement = self.measurement.rows(index)
        if measurement is self.measurement:
            return self
        return Likelihood(measurement, self.data_std, self.points)

    def _variance(self, sde: SDE, t: float | Tensor) -> float | Tensor:
        if self.data_std == math.inf:
            return (sde.sigma(t) / sde.alpha(t)) ** 2
        return spread(sde, t, self.data_std) ** 2

    def _closed(self, x0: Tensor, variance: float | Tensor) -> Tensor:
        """log N(y; A x0, std² + variance A Aᵀ) in nats, (B,), in the singular coordinates of A."""
        white, d = self._white, self._spectrum[0].to(x0)
        unseen = math.prod(white.linear.out) - d.shape[-1]  # dimensions of y outside the range of A
        r = white.residual(x0)
        seen = self._spectrum[3](r)
        v = variance.reshape(-1, 1) if isinstance(variance, Tensor) and variance.ndim else variance
        total = self._std**2 + v * d**2
        energy = (seen**2 / total + (2 * math.pi * total).log()).sum(1)
        if unseen:
            outside = (r.flatten(1).square().sum(1) - seen.square().sum(1)).clamp_min(0)
            energy = energy + outside / self._std**2 + unseen * math.log(2 * math.pi * self._std**2)
        out: Tensor = -0.5 * energy + white.log_volume.to(energy)
        return out


def likelihood_of(measurement: Measurement, data_std: float, who: str) -> Likelihood:
    """The likelihood of one measurement for all particles; raises an error if there are several.

    Arguments:
        measurement: Measurement.
        data_std: Standard deviation of the data.
        who: Name of the method in messages.
    """
    measurement.require_likelihood(who)
    rows = max(len(measurement.y), measurement.operator.samples)
    if rows != 1:
        raise ValueError(
            f"`y` must be one measurement, (1, *out), for all particles, got {rows} rows; `steering.steer` with a "
            f"Likelihood takes one for each problem."
        )
    return Likelihood(measurement, data_std)
