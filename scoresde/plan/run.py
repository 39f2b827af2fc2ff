r"""The interpreter of plans: one loop over the rows.

.. math:: x_r = \sum_k a_{rk} x_k + \sum_k b_{rk} d_k + \sum_k c_{rk} z_k + e_r

:func:`run` returns the last state, :func:`steps` yields the states at the nodes, and :func:`updates` yields every new
state before the run continues from it. :func:`pauses` stops at every evaluation instead of making it, for loops that
call the network themselves (:mod:`scoresde.plan.paused`). On unit vectors the loop computes the matrices of a plan
(:func:`unroll`); on a linear denoiser it computes exact moments (:mod:`scoresde.analysis.moments`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.noise.brownian import PathNoise
from scoresde.noise.keyed import Ahead, Laid, Noise
from scoresde.plan.folding import Outputs
from scoresde.plan.fused import Fused
from scoresde.plan.rows import Line, Terms, Weight, nonzero, with_ones
from scoresde.plan.table import Plan

Denoise = Callable[[Tensor, Weight], Tensor]

_FACTORS = 1 << 12  # weights that are stored as tensors

Hook = Callable[[int, Weight, Tensor], Tensor]


class Normals(Protocol):
    """A source of standard normals, such as :class:`Noise`."""

    def like(self, x: Tensor, draw: int) -> Tensor:
        """Draw number `draw`, with the shape, dtype and device of `x`."""


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
    t: Weight
    x: Tensor
    x0: Tensor | None
    nfe: int


@dataclass
class Update:
    """New state of a row, before the network is evaluated there.

    Arguments:
        row: Index of the row.
        t: Time of the state.
        mean: Sum of the row without its normals, (B, *event).
        draws: Pairs (draw, weight) of the normals of the row.
        x: State with its normals, (B, *event); the mean if the run has no source of normals. The run continues from
            this attribute: set it to continue from another state.
    """

    row: int
    t: Weight
    mean: Tensor
    draws: Terms
    x: Tensor


class Pause(NamedTuple):
    """A run that waits for an evaluation of the network.

    Arguments:
        row: Index of the row.
        t: Time of the state.
        x: State to evaluate, (B, *event).
        stored: Earlier states and evaluations that later rows use, by index: x_r at 2r, and at 2r + 1 the denoised
            state d_r or a sum d_r + c x_r, see :mod:`scoresde.plan.folding`.
    """

    row: int
    t: Weight
    x: Tensor
    stored: dict[int, Tensor]


@checked
def run(
    plan: Plan,
    denoise: Denoise | Outputs,
    x: Tensor,
    noise: Noise | Normals | None = None,
    *,
    ones: Tensor | None = None,
    hook: Hook | None = None,
    callback: Callable[[Step], None] | None = None,
    overwrite: bool = False,
    fused: bool = False,
) -> Tensor:
    """Run a plan and return its last state.

    Arguments:
        plan: Plan to run.
        denoise: Denoiser D(x, t), a function of a state (B, *event) and a time, or the outputs of its network that
            ``model.outputs_at(plan.evaluation_times, x)`` prepared.
        x: Initial state, (B, *event).
        noise: Source of the normals; required if the plan is stochastic.
        ones: Vector that the constants of the rows multiply, a tensor that broadcasts to the shape of `x`; by default
            a constant is added to every element.
        hook: Function ``(node, t, x) -> x``, called at every node before the network is evaluated.
        callback: Function of a :class:`Step`, called at every node after the evaluation.
        overwrite: Whether to reuse the memory of a state that no later row uses, which saves allocations. `denoise`
            must then return new memory, and may not store a reference to its input. States that the hook or the
            callback receives are not overwritten, so both may store them.
        fused: Whether to compute each row with one kernel of Triton, which draws the normals too: for float32 states on
            CUDA. It needs the extra ``scoresde[triton]``. Other states, and rows that a gradient follows, are added
            term by term.
    """
    _check_noise(plan, noise)
    watch = None if callback is None else "nodes"
    loop = _loop(plan, denoise, x, noise, ones, hook, overwrite, watch, fused=fused)
    del x  # otherwise this reference holds the memory of the initial state
    while True:
        try:
            step = next(loop)
        except StopIteration as end:
            result: Tensor = end.value
            return result
        assert callback is not None and isinstance(step, Step)
        before = check.writes(step.x)
        callback(step)
        check.refuse_writes(step.x, before, "`callback`", callback, copy="step.x")
        del step


@checked
def steps(
    plan: Plan,
    denoise: Denoise,
    x: Tensor,
    noise: Noise | Normals | None = None,
    *,
    ones: Tensor | None = None,
    hook: Hook | None = None,
    overwrite: bool = False,
) -> Generator[Step, None, Tensor]:
    """Run a plan and yield a :class:`Step` at every node; the last one holds the result, which is also returned.

    A state is freed once no later row uses it. The loop copies no tensor to the host.

    Arguments:
        plan: Plan to run.
        denoise: Denoiser D(x, t), a function of a state (B, *event) and a time.
        x: Initial state, (B, *event).
        noise: Source of the normals; required if the plan is stochastic.
        ones: Vector that the constants of the rows multiply, as in :func:`run`.
        hook: Function ``(node, t, x) -> x``, called at every node before the network is evaluated.
        overwrite: Whether to reuse the memory of states, as in :func:`run`.

    Example:
        >>> import torch, scoresde as ss
        >>> plan = ss.DDIM().plan(ss.VP(), [1.0, 0.5, 0.0])
        >>> [(step.node, step.t, step.nfe) for step in steps(plan, lambda x, t: 0.5 * x, torch.ones(1, 1))]
        [(0, 1.0, 1), (1, 0.5, 2), (2, 0.0, 2)]
    """
    _check_noise(plan, noise)
    return cast("Generator[Step, None, Tensor]", _loop(plan, denoise, x, noise, ones, hook, overwrite, "nodes"))


@checked
def updates(
    plan: Plan, denoise: Denoise, x: Tensor, noise: Noise | Normals | None = None, *, ones: Tensor | None = None
) -> Generator[Update, None, Tensor]:
    """Run a plan and yield an :class:`Update` for every row after the start; return the result.

    The run continues from ``Update.x``, which the caller may set to another state. As in :func:`steps`, a state is
    freed once no later row uses it.

    Arguments:
        plan: Plan to run.
        denoise: Denoiser D(x, t), a function of a state (B, *event) and a time.
        x: Initial state, (B, *event).
        noise: Source of the normals; without it every row has its mean as its state.
        ones: Vector that the constants of the rows multiply, as in :func:`run`.

    Example:
        >>> import torch, scoresde as ss
        >>> plan = ss.DDIM().plan(ss.VP(), [1.0, 0.5, 0.0])
        >>> for update in updates(plan, lambda x, t: x, torch.ones(1, 2)):
        ...     update.x = torch.full((1, 2), float(update.row))
        >>> update.x
        tensor([[2., 2.]])
    """
    return cast("Generator[Update, None, Tensor]", _loop(plan, denoise, x, noise, ones, None, False, "updates"))


@checked
def pauses(
    plan: Plan,
    x: Tensor,
    noise: Noise | Normals | None = None,
    *,
    row: int = 0,
    stored: Mapping[int, Tensor] | None = None,
) -> Generator[Pause, Tensor, Tensor]:
    """Run a plan from a row on; yield a :class:`Pause` at every evaluation, and receive the denoised state by ``send``.

    Arguments:
        plan: Plan to run.
        x: State of the row, (B, *event).
        noise: Source of the normals; required if the plan is stochastic.
        row: Row to continue from, by default the start.
        stored: Earlier states of the run, as in the :class:`Pause` of this row; none at the start.
    """
    _check_noise(plan, noise)
    loop = _loop(plan, None, x, noise, None, None, False, None, row, stored)
    return cast("Generator[Pause, Tensor, Tensor]", loop)


def _check_noise(plan: Plan, noise: Noise | Normals | None) -> None:
    if plan.stochastic and noise is None:
        raise ValueError(f"the plan draws {plan.draws} normals; give it a `noise`, as in Noise(seed).")


def normals_of(plan: Plan, noise: Noise | Normals | None, x: Tensor | None = None) -> Normals | None:
    """The normals of a plan: increments of Brownian paths, several draws in one call, or `noise` itself.

    Arguments:
        plan: Plan to run.
        noise: Source of the normals.
        x: State; if it is given, seeds and indices of samples are moved to its device.
    """
    if plan.stochastic and isinstance(noise, Noise) and noise.path:
        return PathNoise(noise, plan.spans)
    if plan.stochastic and type(noise) in (Noise, Laid):  # another subclass of Noise is evaluated draw by draw
        assert isinstance(noise, Noise)
        if x is not None and (noise.indices is not None or isinstance(noise.seed, tuple)) and type(noise) is Noise:
            noise = Laid(noise, len(x), x.device)
        return Ahead(noise, plan.draws)
    return noise


def _loop(
    plan: Plan,
    denoise: Denoise | Outputs | None,
    x: Tensor,
    noise: Noise | Normals | None,
    ones: Tensor | None,
    hook: Hook | None,
    overwrite: bool,
    watch: str | None,
    first: int = 0,
    stored: Mapping[int, Tensor] | None = None,
    fused: bool = False,
) -> Generator[Step | Update | Pause, Tensor | None, Tensor]:
    """The loop, from row `first` on; without `denoise` it pauses at every evaluation."""
    source = normals_of(plan, noise, x)
    saved: list[Tensor] = [None] * (2 * len(plan.rows))  # type: ignore[list-item]  # x_r at 2r, d_r at 2r + 1
    for k, value in (stored or {}).items():
        saved[k] = value
    # The mean of an update is that of its denoised states, to the bit, so that a caller can compute it again.
    outputs = None if watch == "updates" else outputs_at(plan, denoise, x)
    program = plan.program if outputs is None else plan.program_of(outputs.p, outputs.q)
    if ones is not None:
        program = with_ones(program, len(saved))
        saved.append(ones.expand_as(x))
    overwrite = overwrite and not torch.is_grad_enabled()
    nodes, updated = watch == "nodes", watch == "updates"
    kept = nodes or hook is not None  # callers may keep the states that they see
    nfe, shape = 0, x.shape
    traced = torch.compiler.is_compiling()  # then torch does not count writes
    quick = x.is_cpu and not traced and type(x) is Tensor and x.dtype in (torch.float32, torch.float64)
    kernel = Fused(x, source) if fused and not traced else None
    for r, line in enumerate(program[first:], first):
        if r > first:
            if updated:
                x = yield from _update(r, line, saved, source, x)
            else:
                reuse = overwrite and line.reuse and not (kept and program[line.terms[0][0] // 2].shown)
                new = kernel.sum_of(line, saved, source, x, reuse) if kernel is not None and line.plain else None
                if new is not None:
                    x = new
                elif line.plain:
                    x = _add_numbers(line, saved, source, x, reuse, quick)
                else:
                    x = _add_tensors(line, saved, source, x, reuse)
            for k in line.drop:
                saved[k] = None  # type: ignore[call-overload]
        if hook is not None and line.node is not None:
            x = _hooked(hook, line.node, line.t, x, shape)
        out = x0 = None
        if line.evaluates:
            before = -1 if traced or x.is_inference() else x._version
            if outputs is not None:
                out = outputs.evaluate(x, nfe)
                if nodes and line.shown:
                    x0 = torch.add(x * outputs.p[nfe], out, alpha=outputs.q[nfe])
            else:
                t = line.t if plan.plain else _moved(line.t, x)
                if denoise is None:
                    pause = Pause(r, t, x, {k: v for k, v in enumerate(saved) if v is not None})
                    out = cast(Tensor, (yield pause))
                    check.refuse_writes(x, before, "the code in a pause", None)
                else:
                    out = denoise(x, t)  # type: ignore[operator]  # Outputs were handled above
                x0 = out
            if before >= 0 and x._version != before:
                check.refuse_writes(x, before, "`denoise`", denoise)
            nfe += 1
            if line.keep_d:
                saved[2 * r + 1] = torch.add(out, x, alpha=line.mix) if line.mix else out
        if line.keep_x:
            saved[2 * r] = x
        if nodes and line.shown:
            before = check.writes(x)
            yield Step(-1 if line.node is None else line.node, line.t, check.protected(x), x0, nfe)
            check.refuse_writes(x, before, "the code between two steps", None, copy="step.x")
    return x


def outputs_at(plan: Plan, denoise: object, x: Tensor) -> Outputs | None:
    """The denoiser of a run as a linear function of a network's output, or None for any other function.

    Arguments:
        plan: Plan to run.
        denoise: A denoiser, its method `x0`, or a function.
        x: Initial state, (B, *event).
    """
    if isinstance(denoise, Outputs):
        return denoise
    owner = denoise
    if getattr(denoise, "__name__", "") == "x0":
        owner = getattr(denoise, "__self__", None)
    prepare = getattr(owner, "outputs_at", None)
    return prepare(plan.evaluation_times, x) if prepare is not None and plan.plain else None


def _hooked(hook: Hook, node: int, t: Weight, x: Tensor, shape: torch.Size) -> Tensor:
    """The state that a hook returns, checked."""
    given = check.protected(x)
    before = check.writes(given)
    out = hook(node, t, given)
    check.refuse_writes(given, before, "`hook`", hook)
    if not isinstance(out, Tensor):
        raise TypeError(f"`hook` must return a state, got {type(out).__name__}; end it with `return x`.")
    if out.shape != shape:
        raise ValueError(f"`hook` must return a state of shape {tuple(shape)}, got {tuple(out.shape)}.")
    return out


def _update(
    r: int, line: Line, saved: list[Tensor], source: Normals | None, like: Tensor
) -> Generator[Update, None, Tensor]:
    """Yield the new state of a row; return the state to continue from."""
    if line.terms:
        combine = _add_numbers if line.plain else _add_tensors
        mean = combine(line._replace(draws=()), saved, None, like, False)
    else:
        mean = torch.zeros_like(like) + _expanded(line.one, like)
    x = mean
    for k, w in line.draws if source is not None else ():
        z = source.like(like, k)  # type: ignore[union-attr]
        x = x + _expanded(w, z) * z if isinstance(w, Tensor) else x.add(z, alpha=w)
    update = Update(r, line.t, mean, line.draws, x)
    yield update
    return update.x


@lru_cache(maxsize=_FACTORS)
def _factor(w: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(w, dtype=dtype, device="cpu")


def _add_numbers(
    line: Line, saved: list[Tensor], noise: Normals | None, like: Tensor, in_place: bool, quick: bool = False
) -> Tensor:
    """Compute Σ a x + Σ b d + Σ c z + one, in place on a new tensor or on the first state.

    If it is `quick`, for states on a CPU, the first weight is a tensor: torch multiplies by it in half the time.
    """
    out: Any = None  # a tensor after the first term
    if line.terms:
        k, w = line.terms[0]
        out = saved[k]
        if line.lerp:
            k, w = line.terms[1]
            out = out.lerp_(saved[k], w) if in_place else torch.lerp(out, saved[k], w)
        else:
            factor = _factor(w, like.dtype) if quick else w
            out = out.mul_(factor) if in_place else out * factor
        for k, w in line.tail:
            out.add_(saved[k], alpha=w)
    for k, w in line.draws:
        z = noise.like(like, k)  # type: ignore[union-attr]
        out = z * w if out is None else out.add_(z, alpha=w)
    if out is None:  # all weights are 0
        out = torch.zeros_like(like)
    if line.one:
        out.add_(line.one)
    return out  # type: ignore[no-any-return]


def _add_tensors(line: Line, saved: list[Tensor], noise: Normals | None, like: Tensor, in_place: bool) -> Tensor:
    """Compute the same sum if a weight is a tensor: one number per sample, or a weight that requires grad."""
    out: Any = None  # a tensor after the first term
    for k, w in line.terms:
        out = _add(out, saved[k], w)
    for k, w in line.draws:
        assert noise is not None
        out = _add(out, noise.like(like, k), w)
    if nonzero(line.one):
        out = out + _expanded(line.one, out)
    return out  # type: ignore[no-any-return]


def _moved(w: Weight, x: Tensor) -> Weight:
    """Move one number per sample to the device and dtype of `x`."""
    return w.to(x) if isinstance(w, Tensor) and w.ndim and w.device != x.device else w


def _expanded(w: Weight, x: Tensor) -> Weight:
    """A weight that broadcasts with the state `x`, on its device."""
    return check.expand(_moved(w, x), x, "weight")


def _add(out: Tensor | None, term: Tensor, w: Weight) -> Tensor:
    if isinstance(w, Tensor):
        scaled = _expanded(w, term) * term
        return scaled if out is None else out + scaled
    return term * w if out is None else out.add_(term, alpha=w)
