"""Operators that are not linear, linearised at a state, for methods with a formula for linear ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scoresde.inverse.operators import Linear, Operator


class Linearized(Linear):
    """Derivative of an operator at one state for each row, J = ∂A/∂x; products with J and Jᵀ, without its matrix.

    Arguments:
        inner: Operator A.
        x0: States, (B, *event).
    """

    per_sample = ("inner", "at")

    at: Tensor

    def __init__(self, inner: Operator, x0: Tensor) -> None:
        nn.Module.__init__(self)
        self.inner, self.at = inner, x0.detach()
        self.event, self.out = inner.event, inner.out

    def evaluate(self, x: Tensor) -> Tensor:
        # The derivative of y ↦ Jᵀ y, which is linear, is J: two reverse passes, and no rule of forward mode.
        zero = torch.zeros(len(self.at), *self.out, dtype=x.dtype, device=x.device)
        tangent: Tensor = torch.func.vjp(self.transpose, zero)[1](x)[0]
        return tangent

    def transpose(self, y: Tensor) -> Tensor:
        product: Tensor = torch.func.vjp(self.inner.evaluate, self.at)[1](y)[0]
        return product
