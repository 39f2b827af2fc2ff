r"""The interpreter of plans: one loop over the rows.

.. math:: x_r = \sum_k a_{rk} x_k + \sum_k b_{rk} d_k + \sum_k c_{rk} z_k
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.noise.brownian import PathNoise
from scoresde.noise.keyed import Ahead, Noise
from scoresde.plan.rows import Line, Weight, nonzero
from scoresde.plan.table import Plan

Denoise = Callable[[Tensor, Any], Tensor]

Hook = Callable[[int, Any, Tensor], Tensor]


class Step(NamedTuple):
    """State of a run at a node.

    Arguments:
        node: Index of the node; −1 for a last row that is not a node.
        t: Time of the node.
        x: State, (B, *event).
        x0: Denoised state, or None where the network is not evaluated.
        nfe: Number of function evaluations so far.
    """

    node: int
    t: Any
    x: Tensor
    x0: Tensor | None
    nfe: int


def run(
    plan: Plan,
    denoise: Denoise,
    x: Tensor,
    noise: Noise | None = None,
    *,
    hook: Hook | None = None,
    callback: Callable[[Step], None] | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Run a plan and return its last state; :func:`steps` also yields the states at the nodes.

    Arguments:
        plan: Plan to run.
        denoise: Denoiser D(x, t), a function of a state (B, *event) and a time.
        x: Initial state, (B, *event).
        noise: Source of the normals; required if the plan is stochastic.
        hook: Function ``(node, t, x) -> x``, called at every node before the network is evaluated.
        callback: Function of a :class:`Step`, called at every node after the evaluation.
        overwrite: Whether to reuse the memory of a state that no later row uses, which saves allocations. `denoise`
            must then return new memory, and no function may store a reference to its input.
    """
    loop = _loop(plan, denoise, x, noise, hook, overwrite, callback is not None)
    del x  # otherwise this reference holds the memory of the initial state
    while True:
        try:
            step = next(loop)
        except StopIteration as end:
            result: Tensor = end.value
            return result
        assert callback is not None
        callback(step)
        del step


def steps(
    plan: Plan,
    denoise: Denoise,
    x: Tensor,
    noise: Noise | None = None,
    *,
    hook: Hook | None = None,
    overwrite: bool = False,
) -> Generator[Step, None, Tensor]:
    """Run a plan and yield a :class:`Step` at every node; the last one holds the result, which is also returned.

    A state is freed once no later row uses it. The loop copies no tensor to the host.
    """
    return _loop(plan, denoise, x, noise, hook, overwrite, True)


def _loop(
    plan: Plan, denoise: Denoise, x: Tensor, noise: Noise | None, hook: Hook | None, overwrite: bool, watched: bool
) -> Generator[Step, None, Tensor]:
    if plan.stochastic and noise is None:
        raise ValueError(f"the plan draws {plan.draws} normals; give it a `noise`, as in Noise(seed).")
    source: Noise | Ahead | PathNoise | None = noise
    if plan.stochastic and isinstance(noise, Noise) and noise.path:
        source = PathNoise(noise, plan.spans)
    elif plan.stochastic and type(noise) is Noise:  # a subclass of Noise is evaluated draw by draw
        source = Ahead(noise, plan.draws)
    saved: list[Any] = [None] * (2 * len(plan.rows))  # x_r at 2r, d_r at 2r + 1
    overwrite = overwrite and not torch.is_grad_enabled()
    nfe, shape = 0, x.shape
    for r, line in enumerate(plan.program):
        if r:
            combine = _add_numbers if line.plain else _add_tensors
            x = combine(line, saved, source, x, overwrite and line.reuse)
            for k in line.drop:
                saved[k] = None
        if hook is not None and line.node is not None:
            x = hook(line.node, line.t, x)
            if not isinstance(x, Tensor):
                raise TypeError(f"`hook` must return a state, got {type(x).__name__}; end it with `return x`.")
            if x.shape != shape:
                raise ValueError(f"`hook` must return a state of shape {tuple(shape)}, got {tuple(x.shape)}.")
        x0 = None
        if line.evaluates:
            x0 = denoise(x, _moved(line.t, x) if isinstance(line.t, Tensor) else line.t)
            nfe += 1
            if line.keep_d:
                saved[2 * r + 1] = x0
        if line.keep_x:
            saved[2 * r] = x
        if watched and line.shown:
            yield Step(-1 if line.node is None else line.node, line.t, x, x0, nfe)
    return x


def _add_numbers(
    line: Line, saved: list[Any], noise: Noise | Ahead | PathNoise | None, like: Tensor, in_place: bool
) -> Tensor:
    """Compute Σ a x + Σ b d + Σ c z + one, in place on a new tensor or on the first state."""
    terms = line.terms
    out: Any = None
    if terms:
        (k, w), terms = terms[0], terms[1:]
        out = saved[k]
        if line.lerp:
            (k, w), terms = terms[0], terms[1:]
            out = out.lerp_(saved[k], w) if in_place else torch.lerp(out, saved[k], w)
        else:
            out = out.mul_(w) if in_place else out * w
    for k, w in terms:
        out.add_(saved[k], alpha=w)
    for k, w in line.draws:
        z = noise.like(like, k)  # type: ignore[union-attr]
        out = z * w if out is None else out.add_(z, alpha=w)
    if line.one:
        out.add_(line.one)
    return out  # type: ignore[no-any-return]


def _add_tensors(
    line: Line, saved: list[Any], noise: Noise | Ahead | PathNoise | None, like: Tensor, in_place: bool
) -> Tensor:
    """Compute the same sum if a weight is a tensor: one number per sample, or a weight that requires grad."""
    out: Any = None
    for k, w in line.terms:
        out = _add(out, saved[k], w)
    for k, w in line.draws:
        assert noise is not None
        out = _add(out, noise.like(like, k), w)
    if nonzero(line.one):
        out = out + (check.expand(_moved(line.one, out), out, "weight") if isinstance(line.one, Tensor) else line.one)
    return out  # type: ignore[no-any-return]


def _moved(w: Any, x: Tensor) -> Any:
    """Move one number per sample to the device and dtype of `x`."""
    return w.to(x) if isinstance(w, Tensor) and w.ndim and w.device != x.device else w


def _add(out: Tensor | None, term: Tensor, w: Weight) -> Tensor:
    if isinstance(w, Tensor):
        scaled = check.expand(_moved(w, term), term, "weight") * term
        return scaled if out is None else out + scaled
    return term * w if out is None else out.add_(term, alpha=w)
