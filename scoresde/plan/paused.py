"""Runs that stop at every evaluation, for loops that call the network themselves: servers, robots, agents.

A :class:`Paused` is a frozen value: :func:`tell` returns the next one and changes nothing, so that a run can be kept,
copied, sent to another process or continued twice. The arithmetic is that of :func:`scoresde.plan.run.run`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.noise.keyed import Noise
from scoresde.plan.rows import Weight
from scoresde.plan.run import Normals, normals_of, pauses
from scoresde.plan.table import Plan

_MASK = 0xFFFFFFFF


@checked
@dataclass(frozen=True, eq=False)
class Paused:
    """A run of a plan that waits for an evaluation of the network, or that is done.

    Arguments:
        plan: Plan of the run.
        x: State to evaluate, (B, *event); the result if the run is done.
        row: Row of the state.
        done: Whether `x` is the result.
        nfe: Number of evaluations that were received.
        stored: Earlier states and evaluations that later rows use, by index: x_r at 2r, and at 2r + 1 the denoised
            state d_r or a sum d_r + c x_r, see :mod:`scoresde.plan.folding`.
        noise: Source of the normals, as it was given.
        source: The same source, prepared for the plan.
    """

    plan: Plan = field(repr=False)
    x: Tensor = field(repr=False)
    row: int
    done: bool
    nfe: int
    stored: Mapping[int, Tensor] = field(default_factory=dict, repr=False)
    noise: Noise | Normals | None = None
    source: Normals | None = field(default=None, repr=False)

    @property
    def t(self) -> Weight:
        """Time of the state: a number, or one number for each sample."""
        t = self.plan.rows[self.row].t
        return t.to(self.x) if isinstance(t, Tensor) and t.ndim and t.device != self.x.device else t

    def state_dict(self) -> dict[str, Tensor]:
        """The run as tensors alone, which ``torch.save`` and safetensors can write; :func:`resume` continues it.

        The plan is not in it, only its fingerprint: save the plan with :meth:`Plan.save`.
        """
        numbers = torch.tensor([self.row, self.nfe, self.done], dtype=torch.int64)
        tensors = {"x": self.x, "row_nfe_done": numbers, "plan": fingerprint(self.plan), **_of_noise(self.noise)}
        tensors |= {f"stored.{k}": value for k, value in self.stored.items()}
        return {name: value.detach().contiguous() for name, value in tensors.items()}


@checked
def begin(plan: Plan, x: Tensor, noise: Noise | Normals | None = None) -> Paused:
    """Start a run and stop at its first evaluation.

    Arguments:
        plan: Plan to run.
        x: Initial state, (B, *event).
        noise: Source of the normals; required if the plan is stochastic.

    Example:
        >>> import torch, scoresde as ss
        >>> from scoresde.plan import begin, tell
        >>> run = begin(ss.DDIM().plan(ss.VP(), [1.0, 0.5, 0.0]), torch.ones(1, 2))
        >>> while not run.done:
        ...     run = tell(run, 0.5 * run.x)
        >>> torch.equal(run.x, ss.plan.run(run.plan, lambda x, t: 0.5 * x, torch.ones(1, 2)))
        True
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"`plan` must be a Plan, as solver.plan(sde, times) returns it, got {type(plan).__name__}.")
    loop = pauses(plan, check.state("x", x), noise)
    source = normals_of(plan, noise)
    try:
        pause = next(loop)
    except StopIteration as end:  # a plan without evaluations
        return Paused(plan, end.value, len(plan) - 1, True, 0, {}, noise, source)
    return Paused(plan, pause.x, pause.row, False, 0, pause.stored, noise, source)


@checked
def tell(run: Paused, x0: Tensor) -> Paused:
    """Continue a run to its next evaluation, or to its end.

    Arguments:
        run: The run, which stays as it is.
        x0: Denoised state D(x, t) at ``run.x`` and ``run.t``, (B, *event).
    """
    if run.done:
        raise ValueError(f"the run is done after {run.nfe} evaluations; its result is `x`.")
    check.match("x0", x0, "x", run.x)
    loop = pauses(run.plan, run.x, run.source, row=run.row, stored=run.stored)
    next(loop)
    try:
        pause = loop.send(x0)
    except StopIteration as end:
        return replace(run, x=end.value, row=len(run.plan) - 1, done=True, nfe=run.nfe + 1, stored={})
    return replace(run, x=pause.x, row=pause.row, nfe=run.nfe + 1, stored=pause.stored)


@checked
def resume(plan: Plan, state: Mapping[str, Tensor], noise: Noise | Normals | None = None) -> Paused:
    """Restore a run from its tensors.

    Arguments:
        plan: Plan of the run.
        state: Output of :meth:`Paused.state_dict`; the tensors may be on another device than before.
        noise: Source of the normals, if it is not a :class:`Noise`; by default the one in `state`.
    """
    missing = {"x", "row_nfe_done", "plan"} - set(state)
    if missing:
        raise ValueError(f"`state` must come from `state_dict`; it lacks {', '.join(sorted(missing))}.")
    if not torch.equal(state["plan"].cpu(), fingerprint(plan)):
        raise ValueError("`plan` has another table than the plan of this run; use the same solver, process and grid.")
    row, nfe, done = state["row_nfe_done"].tolist()
    stored = {int(name[7:]): value for name, value in state.items() if name.startswith("stored.")}
    noise = _noise_of(state) if noise is None else noise
    if plan.stochastic and noise is None:
        raise ValueError("the run had a `noise` of its own, which `state` does not hold; give it again.")
    return Paused(plan, state["x"], row, bool(done), nfe, stored, noise, normals_of(plan, noise))


def fingerprint(plan: Plan) -> Tensor:
    """SHA-256 of the rows of a plan, (32,) uint8: equal for equal tables.

    Arguments:
        plan: Plan.
    """
    digest = hashlib.sha256()
    for row in plan.rows:
        columns = [[(k, _numbers(w)) for k, w in terms] for terms in (row.x, row.d, row.z)]
        digest.update(repr((_numbers(row.t), columns, _numbers(row.one), row.evaluates)).encode())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _numbers(w: Weight) -> float | list[float]:
    return w.detach().tolist() if isinstance(w, Tensor) else float(w)


def _of_noise(noise: Noise | Normals | None) -> dict[str, Tensor]:
    """A keyed noise as tensors; seeds as pairs of 32-bit words, because they may exceed int64."""
    if type(noise) is not Noise:
        return {}
    many = isinstance(noise.seed, tuple)
    seeds = noise.seed if isinstance(noise.seed, tuple) else (noise.seed or 0,)
    out = {
        "noise.seed": torch.tensor([(s & _MASK, s >> 32) for s in seeds], dtype=torch.int64).reshape(-1, 2),
        "noise.many_offset_path": torch.tensor([many, noise.offset, noise.path], dtype=torch.int64),
    }
    if noise.indices is not None:
        out["noise.indices"] = torch.tensor(noise.indices, dtype=torch.int64)
    return out


def _noise_of(state: Mapping[str, Tensor]) -> Noise | None:
    if "noise.seed" not in state:
        return None
    seeds = [low | high << 32 for low, high in state["noise.seed"].tolist()]
    many, offset, path = state["noise.many_offset_path"].tolist()
    indices = state["noise.indices"].tolist() if "noise.indices" in state else None
    return Noise(seeds if many else seeds[0], offset=offset, indices=indices, path=bool(path))
