r"""Means and covariances of two sets of samples, with standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde._doors import checked
from scoresde._numerics import student_quantile
from scoresde.metrics.pairs import as_pair

__all__ = ["Moments", "moments"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Differences of means and covariances of two sets of samples, with their standard errors.

    Arguments:
        mean: Mean of y minus mean of x, (D,).
        mean_se: Standard errors of `mean`, (D,).
        cov: Covariance of y minus covariance of x, (D, D).
        cov_se: Standard errors of `cov`, (D, D).
        degrees: Degrees of freedom of the standard errors: the number of samples of the smaller set minus 1.
    """

    mean: Tensor
    mean_se: Tensor
    cov: Tensor
    cov_se: Tensor
    degrees: float = math.inf

    @property
    def mean_z(self) -> float:
        """Largest difference of means, in standard errors."""
        return _largest_z(self.mean, self.mean_se)

    @property
    def cov_z(self) -> float:
        """Largest difference of covariances, in standard errors."""
        return _largest_z(self.cov, self.cov_se)

    @property
    def max_z(self) -> float:
        """Largest difference of means and covariances, in standard errors."""
        return max(self.mean_z, self.cov_z)

    @property
    def z_floor(self) -> float:
        """95 % quantile of `max_z` under equal distributions, for D + D(D + 1)/2 independent Student t variables.

        Dependence makes the true quantile smaller; heavy tails make it larger.
        """
        d = len(self.mean)
        each = 0.95 ** (1 / (d + d * (d + 1) // 2))
        return student_quantile((1 + each) / 2, self.degrees)

    def __str__(self) -> str:
        return (
            f"means within {self.mean_z:.2f} and covariances within {self.cov_z:.2f} standard errors "
            f"({self.z_floor:.2f} at 95 % if equal)"
        )


@checked
def moments(x: Tensor, y: Tensor) -> Moments:
    r"""Compare means and covariances: "equal within k standard errors" is ``moments(x, y).max_z < k``.

    .. math::
        \mathrm{Var}(\bar x_i) = \frac{c_{ii}}{N}, \qquad
        \mathrm{Var}(\hat c_{ij}) = \frac{m_{ij} - c_{ij}^2}{N} + \frac{c_{ii} c_{jj} + c_{ij}^2}{N (N - 1)}, \qquad
        m_{ij} = E\left[ (x_i - \bar x_i)^2 (x_j - \bar x_j)^2 \right]

    for each set; exact for any distribution, except that c and m are estimated from the samples. The memory is O(D²).

    Arguments:
        x: Samples, (N, *event), with D numbers in each event.
        y: Samples, (M, *event).

    Returns:
        The differences, y minus x, and their standard errors.

    References:
        | The Advanced Theory of Statistics, vol. 1 (Kendall and Stuart, 1977), chapter 13

    Example:
        >>> import torch
        >>> x = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]])
        >>> moments(x, x + 1).mean
        tensor([1.], dtype=torch.float64)
        >>> moments(x, x + 1).cov_z
        0.0
    """
    x, y = as_pair(x, y)
    (mean_x, mean_var_x, cov_x, cov_var_x), (mean_y, mean_var_y, cov_y, cov_var_y) = _moments(x), _moments(y)
    return Moments(
        mean=mean_y - mean_x,
        mean_se=(mean_var_x + mean_var_y).sqrt(),
        cov=cov_y - cov_x,
        cov_se=(cov_var_x + cov_var_y).sqrt(),
        degrees=min(len(x), len(y)) - 1,
    )


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of samples (N, D), each followed by its variance."""
    n = len(x)
    middle = x.amin(0) / 2 + x.amax(0) / 2  # a constant column becomes exactly 0; its mean would round
    x = x - middle
    mean = x.mean(0)
    x = x - mean
    cov = x.T @ x / (n - 1)
    var = cov.diagonal()
    square = x.square()
    leading = (square.T @ square / n - cov.square()).clamp_min(0.0) / n
    return middle + mean, var / n, cov, leading + (var[:, None] * var + cov.square()) / (n * (n - 1))


def _largest_z(difference: Tensor, se: Tensor) -> float:
    """Largest |difference| / se; a difference of 0 counts as 0, also where se = 0."""
    return float(torch.where(difference == 0, 0.0, difference.abs() / se).max())
