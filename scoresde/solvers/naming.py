"""Names of solvers: each prints as the call that makes it, with the options that differ from their defaults."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from functools import wraps
from numbers import Integral, Real
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, ParamSpec

from torch import Tensor

from scoresde._doors import checked_with

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from scoresde.solvers.rule import Solver

_LONG = 8  # numbers of a tuple that are printed; longer tuples are printed as a digest

Options = ParamSpec("Options")


@dataclass(frozen=True)
class Call:
    """The call of a function that made a solver.

    Arguments:
        text: The call, such as ``UniPC(order=2)``.
        solver: The solver that the call returned.
    """

    text: str
    solver: Solver


# Our argument, and a hint, for the keywords of other libraries.
WORDS = {
    "solver_order": ("order", "use `order`"),
    "solver_type": ("form", "use `form`; docs/glossary.md has the words"),
    "algorithm_type": ("order", "each algorithm is a solver, such as ss.DPMSolverPP or ss.SDEDPMSolverPP"),
    "predict_x0": ("prediction", "use `prediction`, ss.solvers.DATA or ss.solvers.NOISE"),
    "use_karras_sigmas": ("order", "it belongs to the grid, as in grid=ss.grids.karras of ss.sample"),
}


def published(function: Callable[Options, Solver]) -> Callable[Options, Solver]:
    """Decorate a function that returns a solver: its arguments are checked, and the solver prints as the call."""
    parameters = inspect.signature(function)
    door = checked_with({name: hint for name, (ours, hint) in WORDS.items() if ours in parameters.parameters})(function)

    @wraps(function)
    def make(*args: Options.args, **kwargs: Options.kwargs) -> Solver:
        solver = door(*args, **kwargs)
        if solver.made_by is not None and solver.made_by.solver == replace(solver, made_by=None):
            return solver  # another function of the catalogue made it
        given = parameters.bind(*args, **kwargs).arguments
        options = [(p.name, given.get(p.name, p.default), p.default) for p in parameters.parameters.values()]
        # The order is shown also if it is the default.
        options = [(name, v, MISSING if name == "order" and v is not None else default) for name, v, default in options]
        text = f"{function.__name__}({_options(options)})"
        return replace(solver, made_by=Call(text, replace(solver, made_by=None)))

    return make


def name_of(solver: Solver) -> str:
    """The call that makes a solver: that of its function, or of its class."""
    call = solver.made_by
    if call is None:
        return constructor(solver)
    names = [f.name for f in fields(solver) if f.name != "made_by"]
    changed = _options([(name, getattr(solver, name), getattr(call.solver, name)) for name in names])
    return f"replace({call.text}, {changed})" if changed else call.text


def constructor(value: DataclassInstance) -> str:
    """The constructor call of a dataclass, with the fields that differ from their defaults."""
    given = [(f.name, getattr(value, f.name), f.default) for f in fields(value) if f.repr]
    return f"{type(value).__name__}({_options(given)})"


def _options(options: list[tuple[str, object, object]]) -> str:
    """Options that differ from their defaults, from (name, value, default)."""
    return ", ".join(f"{name}={show(value)}" for name, value, default in options if not _equal(value, default))


def _equal(value: object, default: object) -> bool:
    if default is MISSING or default is inspect.Parameter.empty or isinstance(value, Tensor):
        return False
    return value is default or value == default


def show(value: object) -> str:
    """Text of an option, as a user types it where it is short; equal for equal options, and without addresses."""
    if isinstance(value, Tensor):
        value = value.detach().tolist()
    if isinstance(value, bool):
        return repr(value)
    if isinstance(value, Real):
        number = int(value) if isinstance(value, Integral) else float(value)
        return str(int(number)) if abs(number) < 1e15 and number == int(number) else repr(number)
    if isinstance(value, (tuple, list)):
        if len(value) > _LONG:
            return f"<{len(value)} values {digest(*value)}>"
        return f"({', '.join(map(show, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, FunctionType):
        return _show_function(value)
    if type(value).__repr__ is object.__repr__:
        state = ", ".join(f"{name}={show(v)}" for name, v in vars(value).items()) if hasattr(value, "__dict__") else ""
        return f"{type(value).__name__}({state})"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def digest(*values: object) -> str:
    """A short hash of the texts of values."""
    return hashlib.sha256("\n".join(map(show, values)).encode()).hexdigest()[:8]


def _show_function(function: FunctionType) -> str:
    """Name of a function; with a digest if the name is not unique, as that of a lambda or of a closure."""
    values = [cell.cell_contents for cell in function.__closure__ or ()]
    if function.__name__ != "<lambda>" and not values:
        return function.__name__
    code = function.__code__
    constants = [c for c in code.co_consts if not isinstance(c, CodeType)]
    return f"<{function.__name__.strip('<>')} {digest(code.co_code.hex(), code.co_names, constants, values)}>"
