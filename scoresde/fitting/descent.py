"""A round of L-BFGS on a sum of losses, of which one at a time is in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def lbfgs_round(parameters: Sequence[Tensor], losses: Callable[[], Iterable[Callable[[], Tensor]]], steps: int) -> int:
    """Run a round of L-BFGS; return its number of iterations.

    A loss or a gradient that is not finite counts as a bad point. Parameters that end so are put back.

    Arguments:
        parameters: Parameters, which require gradients.
        losses: Function that returns the terms of the sum, each a function.
        steps: Largest number of iterations.
    """
    optimiser = torch.optim.LBFGS(
        list(parameters), max_iter=steps, history_size=40, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def closure() -> float:
        total = 0.0
        gradients = [torch.zeros_like(k) for k in parameters]
        for term in losses():
            with torch.enable_grad():
                loss = term()
                parts = torch.autograd.grad(loss, parameters, allow_unused=True)
            total += float(loss.detach())
            for g, p in zip(gradients, parts, strict=True):
                g += 0 if p is None else p
        good = math.isfinite(total) and all(bool(g.isfinite().all()) for g in gradients)
        for k, g in zip(parameters, gradients, strict=True):
            k.grad = g if good else torch.zeros_like(g)
        return total if good else 1e6

    saved = [k.detach().clone() for k in parameters]
    optimiser.step(closure)
    if not all(bool(k.isfinite().all()) for k in parameters):
        with torch.no_grad():
            for k, value in zip(parameters, saved, strict=True):
                k.copy_(value)
    state: dict[str, Any] = next(iter(optimiser.state.values()), {})
    return max(1, int(state.get("n_iter", 1)))
