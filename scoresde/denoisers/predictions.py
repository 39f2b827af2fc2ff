r"""Predictions as linear forms: every parametrisation is :math:`a\,x_0 + b\,\varepsilon` at given α and σ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from scoresde import _checks as check
from scoresde.processes.sde import SDE

PREDICTIONS = ("eps", "score", "x0", "v", "velocity", "F")

Coefficient = float | Tensor


@dataclass(frozen=True)
class Form:
    """Coefficients of scale · prediction = a x0 + b ε at one (α, σ); numbers or tensors (B,)."""

    a: Coefficient
    b: Coefficient
    scale: Coefficient = 1.0


def form_of(
    kind: str, sde: SDE, t: Coefficient, alpha: Coefficient, sigma: Coefficient, sigma_data: float = 1.0
) -> Form:
    """Form of the prediction `kind` at time `t`, where the process has `alpha` and `sigma`."""
    if kind == "eps":
        return Form(0.0, 1.0)
    if kind == "score":
        return Form(0.0, 1.0, -sigma)
    if kind == "x0":
        return Form(1.0, 0.0)
    if kind == "v":
        return Form(-sigma, alpha)
    if kind == "velocity":
        return Form(sde.alpha_dot(t), sde.sigma_dot(t))
    if kind != "F":
        check.choice("want", kind, PREDICTIONS)
    root = (alpha**2 * sigma_data**2 + sigma**2) ** 0.5
    return Form(sigma / (sigma_data * root), -alpha * sigma_data / root)


def conversion(source: Form, target: Form, alpha: Coefficient, sigma: Coefficient) -> tuple[Coefficient, Coefficient]:
    """Coefficients of x and of the output that convert `source` to `target`; an exact zero stays exact."""
    det = alpha * source.b - sigma * source.a
    of_x = (target.a * source.b - target.b * source.a) / (det * target.scale)
    of_out = (target.b * alpha - target.a * sigma) * source.scale / (det * target.scale)
    return of_x, of_out


# Name of a prediction, or a function of (sde, t, α, σ) that returns its form.
Want = str | Callable[[SDE, Coefficient, Coefficient, Coefficient], Form]


def as_form(want: Want, sde: SDE, t: Coefficient, alpha: Coefficient, sigma: Coefficient) -> Form:
    """Form of a prediction that is given by name or by a function."""
    if isinstance(want, str):
        return form_of(want, sde, t, alpha, sigma)
    if not callable(want):
        raise TypeError(f"`want` must be one of {', '.join(map(repr, PREDICTIONS))} or a function, got {want!r}.")
    return want(sde, t, alpha, sigma)
