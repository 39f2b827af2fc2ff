"""A whole run as one program: a CUDA graph that is replayed with new states, seeds and conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser, Condition, Counter, Shared, expand_conditions
from scoresde.denoisers.gaussian import Gaussian
from scoresde.denoisers.modes import check_ready
from scoresde.denoisers.start import Start, as_start
from scoresde.noise.keyed import Laid, Noise, as_noise
from scoresde.noise.streams import Stream
from scoresde.plan.folding import Outputs
from scoresde.plan.fused import refusal
from scoresde.plan.run import Denoise, outputs_at, run
from scoresde.plan.table import Plan
from scoresde.sampling.solve import event_of, plan_for
from scoresde.solvers.rule import Solver


@checked
def capture(
    model: AbstractDenoiser,
    shape: Sequence[int],
    solver: Solver | Plan | None = None,
    *,
    steps: int | None = None,
    nfe: int | None = None,
    grid: Tensor | Sequence[float] | Callable[..., Tensor] | None = None,
    t_start: float | None = None,
    t_end: float = 0.0,
    start: Start | Gaussian | None = None,
    compile: str | None = None,
    graph: bool = True,
    fused: bool = False,
) -> Captured:
    """Prepare a run of fixed shape that is repeated many times, as one CUDA graph where there is CUDA.

    A graph holds the network, the updates and the normals of all steps. The host launches it once a run, so that small
    networks and small batches no longer wait for Python. The memory of the run belongs to the graph. Samples equal
    those of :func:`sample` with the same seed, to rounding. Without CUDA, or where a network cannot be captured, the
    run is compiled or eager, and ``reason`` says why.

    Arguments:
        model: Denoiser. Tensors among its conditions may be replaced at each call; their shapes and dtypes may not.
        shape: Shape of the samples, (B, *event).
        solver: Solver, plan, or None for :func:`default_solver`.
        steps: Number of steps, by default 20.
        nfe: Budget of evaluations, instead of `steps`.
        grid: Times, or a function that makes them.
        t_start: First time, by default T.
        t_end: Last time, by default 0.
        start: Distribution, dtype and device of the initial states.
        compile: Backend of ``torch.compile``, such as ``"inductor"``, to compile the whole run before it is captured;
            None for no compilation. The time that compilation takes grows with the number of evaluations.
        graph: Whether to capture a CUDA graph if the states are on CUDA.
        fused: Whether to compute each update, with its normals, by one kernel of Triton, as in
            :func:`scoresde.plan.run.run`. It needs the extra ``scoresde[triton]``; ``unfused`` says why updates are
            not.

    Returns:
        A function of a seed and of conditions that returns samples.

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.1)
        >>> sampler = ss.sampling.capture(mix, (4, 1), ss.UniPC(2), nfe=8)
        >>> sampler.mode, torch.equal(sampler(seed=3), ss.sample(mix, (4, 1), ss.UniPC(2), nfe=8, seed=3))
        ('eager', True)
    """
    plan = plan_for(check_ready(model), solver, steps, nfe, grid, t_start, t_end, event=event_of(shape))
    shape = check.shape("shape", shape)
    return Captured(model, shape, plan, as_start(start), compile=compile, graph=graph, fused=fused)


class Captured:
    """A run with memory of its own for its inputs; made by :func:`capture`.

    Arguments:
        model: Denoiser.
        shape: Shape of the samples, (B, *event).
        plan: Plan of the run.
        start: Distribution of the initial states.
        compile: Backend of ``torch.compile``, or None.
        graph: Whether to capture a CUDA graph if the states are on CUDA.
        fused: Whether to compute each update by one kernel of Triton.

    Attributes:
        plan: Plan of the run.
        mode: Way of the run: ``"graph"``, ``"compiled"`` or ``"eager"``.
        reason: Reason why there is no CUDA graph; empty if there is one.
        unfused: Reason why updates are not kernels of Triton; empty if they are.
    """

    def __init__(
        self,
        model: AbstractDenoiser,
        shape: Sequence[int],
        plan: Plan,
        start: Start,
        *,
        compile: str | None = None,
        graph: bool = True,
        fused: bool = False,
    ) -> None:
        if fused and compile is not None:
            raise ValueError("`fused` and `compile` exclude each other: a compiler fuses the updates itself; drop one.")
        self.plan, self.shape, self.mode, self.reason = plan, tuple(shape), "eager", ""
        self._model, self._start = model, start
        first = Noise(0)
        with (
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # it copies conditions, and writes are lost
            self._x = start.draw(model, self.shape, plan.rows[0].t, first).clone()
            self._noise = Laid(first.fork(Stream.STEPS), self.shape[0], self._x.device) if plan.stochastic else None
            self._cond = _buffers(model.conditions, self.shape[0])
            inner = model.given(**self._cond) if self._cond else model
            self._denoise = _prepared(plan, inner.counted(Counter()) if not model.is_leaf else inner, self._x)
            self.unfused = refusal(self._x) if fused else "`fused` is False"
            self._run: Callable[[], Tensor] = self._once
            if compile is not None:
                self._run = torch.compile(self._once, fullgraph=True, dynamic=False, backend=compile)
                self.mode = "compiled"
            self._graph: torch.cuda.CUDAGraph | None = None
            self._out: Tensor | None = None
            if not graph:
                self.reason = "`graph` is False"
            elif self._x.device.type != "cuda":
                self.reason = f"a CUDA graph needs states on CUDA, and these are on {self._x.device.type}"
            else:
                self.reason = self._capture()
                self.mode = self.mode if self.reason else "graph"

    def __repr__(self) -> str:
        why = f", {self.reason}" if self.reason else ""
        return f"Captured({self.plan.name or 'plan'}, {self.plan.nfe} evaluations of {self.shape}: {self.mode}{why})"

    @property
    def nfe(self) -> int:
        """Number of evaluations of a run."""
        return self.plan.nfe

    def __call__(
        self, seed: int | Sequence[int] | Noise | None = None, *, x: Tensor | None = None, **cond: Condition
    ) -> Tensor:
        """Draw samples.

        Arguments:
            seed: Seed of the samples, as in :func:`sample`.
            x: Initial states at the first time, (B, *event), instead of drawn ones.
            **cond: Conditions to replace, by name, of the shapes and dtypes of those of the model. They stay until they
                are replaced again.

        Returns:
            Samples, (B, *event), in new memory.
        """
        noise = as_noise(seed)
        if noise.path:
            raise ValueError("`seed` has path=True, and a captured run draws fresh normals; use ss.sample for paths.")
        with torch.no_grad():
            if x is None:
                x = self._start.draw(self._model, self.shape, self.plan.rows[0].t, noise)
            if check.match("x", x, "the captured state", self._x).dtype != self._x.dtype:
                raise ValueError(
                    f"`x` must have the dtype of the captured run, {self._x.dtype}, got {x.dtype}; capture the run "
                    f"with start=ss.Start(dtype={x.dtype})."
                )
            self._x.copy_(x)
            if self._noise is not None:
                self._noise.load(noise.fork(Stream.STEPS))
            _load(self._cond, cond, self.shape[0])
            if self._graph is None:
                out = self._run()
            else:
                self._graph.replay()
                assert self._out is not None
                out = self._out
            out = out.clone()
            check.warn_unless_finite(out)
            return out

    def _once(self) -> Tensor:
        return run(self.plan, self._denoise, self._x, self._noise, fused=not self.unfused)

    def _capture(self) -> str:
        """Capture the graph; the reason why it cannot be captured, or nothing."""
        side = torch.cuda.Stream(self._x.device)
        side.wait_stream(torch.cuda.current_stream(self._x.device))
        before = torch.cuda.get_sync_debug_mode()
        try:
            with torch.cuda.stream(side):
                self._run()  # libraries choose their kernels here, and compilation happens
                torch.cuda.set_sync_debug_mode("error")
                self._run()
        except RuntimeError as error:
            return _reason(error)
        finally:
            torch.cuda.set_sync_debug_mode(before)
            torch.cuda.current_stream(self._x.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):  # with a memory pool of its own
                self._out = self._run()
        except RuntimeError as error:
            torch.cuda.synchronize(self._x.device)
            self._out = None
            return _reason(error)
        self._graph = graph
        return ""


def _reason(error: RuntimeError) -> str:
    text = str(error).strip().splitlines()
    return f"the run cannot be captured: {text[0] if text else type(error).__name__}"


def _prepared(plan: Plan, model: AbstractDenoiser, x: Tensor) -> Denoise | Outputs:
    """The denoiser with all that does not depend on the state laid out on the device."""
    return outputs_at(plan, model, x) or model.x0


def _buffers(cond: Mapping[str, Condition], rows: int) -> dict[str, Condition]:
    """Conditions whose tensors have memory of their own, with one row for each sample."""

    def own(value: Condition) -> Condition:
        shared = isinstance(value, Shared)
        leaves, spec = tree_flatten(value.value if shared else value)
        if not shared:
            leaves = [expand_conditions({"": leaf}, rows)[""] for leaf in leaves]
        made = tree_unflatten([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        return Shared(made) if shared else made

    return {name: own(value) for name, value in cond.items()}


def _load(buffers: Mapping[str, Condition], cond: Mapping[str, Condition], rows: int) -> None:
    """Copy new conditions into the memory of the run."""
    for name, value in cond.items():
        if name not in buffers:
            known = ", ".join(buffers) or "none"
            raise ValueError(f"`{name}` is no condition of the captured model, whose conditions are: {known}.")
        mine = buffers[name]
        shared = isinstance(mine, Shared)
        given = value.value if isinstance(value, Shared) else value
        own, spec = tree_flatten(mine.value if shared else mine)
        new, other = tree_flatten(given)
        if spec != other:
            raise ValueError(f"`{name}` must be a tree like that of the captured model; capture the model again.")
        for old, leaf in zip(own, new, strict=True):
            if not isinstance(old, Tensor):
                if leaf is not old and leaf != old:
                    raise ValueError(f"`{name}` has the value {leaf!r} that is no tensor; capture the model again.")
                continue
            leaf = leaf if shared else expand_conditions({name: leaf}, rows)[name]
            if not isinstance(leaf, Tensor) or leaf.shape != old.shape or leaf.dtype != old.dtype:
                got = f"{tuple(leaf.shape)} of {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
                raise ValueError(
                    f"`{name}` must have the shape {tuple(old.shape)} and the dtype {old.dtype} of the captured model, "
                    f"got {got}; capture the model again for other shapes."
                )
            old.copy_(leaf, non_blocking=True)
