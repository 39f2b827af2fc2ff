"""Solvers as dictionaries: the call that makes a solver, which is read back without running any code of the file."""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Mapping

from scoresde.solvers.rule import Solver

_KEY = "solver"


def to_dict(solver: Solver) -> dict[str, object]:
    """The call that makes a solver; the function behind :meth:`Solver.to_dict`.

    Arguments:
        solver: Solver of the library, whose options are numbers, strings and tuples of them.
    """
    text = repr(solver)
    try:
        back = _read(text)
    except ValueError:
        back = None
    if back != solver or repr(back) != text:
        raise TypeError(
            f"{text} has options that a text cannot hold, or is a solver of your own; write the table that it builds "
            f"instead, solver.plan(sde, grid)."
        )
    return {_KEY: text}


def from_dict(table: Mapping[str, object]) -> Solver:
    """The solver of a dictionary; the function behind :meth:`Solver.from_dict`.

    Arguments:
        table: Output of :func:`to_dict`.
    """
    text = table.get(_KEY) if isinstance(table, Mapping) else None
    if not isinstance(text, str):
        raise ValueError(f"`table` must be a dictionary from `to_dict`, with the text {_KEY!r}, got {table!r}.")
    return _read(text)


def _read(text: str) -> Solver:
    try:
        solver = _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{text!r} is not a call of a solver of this version, with its options: {error}") from error
    if not isinstance(solver, Solver):
        raise ValueError(f"{text!r} is not the call of a solver; dir(ss.solvers) lists them.")
    return solver


def _value(node: ast.expr) -> object:
    """Value of a literal, of a tuple, of a public name of ``scoresde.solvers``, or of a call of one."""
    from scoresde import solvers

    if isinstance(node, ast.Tuple):
        return tuple(map(_value, node.elts))
    if isinstance(node, ast.Name) and node.id in ("inf", *solvers.__all__):
        return math.inf if node.id == "inf" else getattr(solvers, node.id)
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
    options = {str(word.arg): _value(word.value) for word in node.keywords}
    if name == "replace" and len(node.args) == 1:
        inner = _value(node.args[0])
        if not isinstance(inner, Solver):
            raise ValueError("replace() needs a solver.")
        return dataclasses.replace(inner, **options)  # type: ignore[arg-type]
    if name not in solvers.__all__ or node.args:
        raise ValueError(f"there is no solver {name}(...).")
    return getattr(solvers, name)(**options)
