"""Solvers and plans as schedulers of diffusers, for the pipelines of that library."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from scoresde import _checks as check
from scoresde import grids, solvers
from scoresde._doors import checked
from scoresde.plan.table import Plan
from scoresde.solvers.rule import Solver

if TYPE_CHECKING:
    from scoresde.interop.plan_scheduler import PlanScheduler

GridMaker = Callable[..., Tensor]


@checked
def to_diffusers(
    solver: Solver | Plan,
    scheduler: Mapping[str, object] | object,
    *,
    grid: str | GridMaker | None = None,
    seed: int | None = None,
    clip: float | str | None = "warn",
) -> PlanScheduler:
    """A scheduler of diffusers that runs a solver or a plan: ``pipe.scheduler = to_diffusers(solver, pipe.scheduler)``.

    Process, prediction and labels are those of the pipeline's own scheduler, and so are the times unless `grid` is
    given, the last one included. States are x_t, whose first one has the deviation of the process's noise: 1 for ε, v
    and flow networks. The list ``timesteps`` has one entry for each evaluation of the network. A run in the middle
    (image-to-image, inpainting) starts the solver anew there. States are kept in float32 or better.

    Arguments:
        solver: Solver such as ``ss.UniPC(3)``; or a plan for the process, which has its own number of steps.
        scheduler: Scheduler of the pipeline, or its configuration.
        grid: Name of a function of ``ss.grids``, such as ``"karras"``, or such a function, for the times.
        seed: Seed of the solver's noise, as in ``ss.sample``: row i of the batch is sample i. By default the noise
            comes from the pipeline's `generator`.
        clip: Largest absolute value of the denoised state, such as 1.0 for pixels; None does not clip. The default,
            ``"warn"``, does not clip either, and warns if `scheduler` does.

    Example:
        >>> import diffusers, scoresde as ss
        >>> scheduler = ss.interop.to_diffusers(ss.EDMHeun(), diffusers.DDIMScheduler(), grid="karras", clip=1.0)
        >>> scheduler.set_timesteps(3)
        >>> scheduler.order, len(scheduler.timesteps)
        (2, 5)
    """
    from scoresde.interop.plan_scheduler import PlanScheduler  # here, because diffusers is optional, and slow to import

    config = scheduler if isinstance(scheduler, Mapping) else getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise TypeError(
            f"`scheduler` must be a scheduler of diffusers or its configuration, such as pipe.scheduler, got "
            f"{type(scheduler).__name__}."
        )
    name = config.get("_class_name") if scheduler is config else type(scheduler).__name__
    if name == PlanScheduler.__name__:
        name = None  # its configuration has the name of the scheduler that it replaced
    given = {k: v for k, v in config.items() if not k.startswith("_")} | ({"scheduler_class": name} if name else {})
    if isinstance(clip, str):
        check.choice("clip", clip, ("warn",))
        _warn_of_clipping(config)
        clip = None
    own: dict[str, object] = {"solver": None, "plan": None, "grid": grid, "seed": seed, "clip": clip}
    own["plan" if isinstance(solver, Plan) else "solver"] = solver
    return PlanScheduler(**{**given, **own})  # type: ignore[arg-type]


def _warn_of_clipping(config: Mapping[str, object]) -> None:
    """Warn if a scheduler clips the denoised state, because ours does so only if it is told."""
    by = next((key for key in ("clip_sample", "thresholding") if config.get(key)), None)
    if by is None:
        return
    size = float(str(config.get("clip_sample_range") or 1.0)) if by == "clip_sample" else 1.0
    source = "their `clip_sample_range`" if by == "clip_sample" else "the range of their thresholding"
    warnings.warn(
        f"the pipeline's scheduler clips the denoised state ({by}=True), and ours does not by default: give "
        f"clip={size} ({source}), or clip=None if no clipping is meant.",
        stacklevel=check.levels_to_user(),
    )


def solver_of(text: str) -> Solver:
    """The solver that a text such as ``"UniPC(order=3)"`` makes; ``repr`` of most solvers is such a text.

    Arguments:
        text: Call of a function of ``ss.solvers``, with numbers, strings, tuples and further calls as arguments.
    """
    try:
        made = _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"`solver` must be a call of a function of ss.solvers with plain arguments, got {text!r}: {error}."
        ) from error
    if not isinstance(made, Solver):
        raise ValueError(f"`solver` must be a call that makes a solver, got {text!r}.")
    return made


def _value(node: ast.expr) -> object:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in solvers.__all__:
        function = getattr(solvers, node.func.id)
        return function(*map(_value, node.args), **{k.arg: _value(k.value) for k in node.keywords if k.arg})
    if isinstance(node, ast.Name) and node.id in solvers.__all__:
        return getattr(solvers, node.id)
    if isinstance(node, ast.Tuple):
        return tuple(map(_value, node.elts))
    return ast.literal_eval(node)


def grid_of(grid: str | GridMaker) -> GridMaker:
    """The grid maker of a name in ``ss.grids``, or the given one.

    Arguments:
        grid: Name, or function (sde, steps) → times.
    """
    if callable(grid):
        return grid
    made: GridMaker = getattr(grids, check.choice("grid", grid, tuple(grids.__all__)))
    return made
