"""Plans that are written once: a bounded memo of the tables that a solver, a process and a grid define.

A table is a pure function of the solver, the process and the times. A second call with equal arguments returns the
plan of the first. An argument counts as equal only if its whole value is known: numbers, text, tuples and dictionaries
of them, the functions and frozen dataclasses of this library, and ``functools.partial`` of its functions. With anything
else (a function of your own, which may read a variable; a tensor, which may change or need a gradient; a class of your
own) every call writes the plan, and nothing is stored.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import lru_cache, partial
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType
from typing import TypeAlias

import torch
from torch import Tensor

from scoresde.grids.zigzags import Zigzag
from scoresde.plan.table import Plan
from scoresde.processes.sde import SDE
from scoresde.solvers.rule import Solver

GridMaker: TypeAlias = Callable[..., Tensor]

STORED = 64  # results of one kind

LONGEST = 256  # times of a grid whose plan is stored, at most about 400 kB

_PLAIN = {int, str, bool, type(None)}

_PACKAGE = __name__.split(".")[0] + "."


class Unknown(Exception):
    """The value of an argument is not known, so that its plan cannot be stored."""


def value_of(thing: object) -> Hashable:
    """A value that is equal for two things only if they are the same in every respect; raise Unknown if there is none.

    Arguments:
        thing: Argument of a solver, a process or a grid maker.
    """
    kind = type(thing)
    if kind is float:
        return thing  # equal to no other type below, because these carry their type
    if kind in _PLAIN:
        return kind, thing
    if isinstance(thing, tuple) and kind is tuple:
        return thing if thing and set(map(type, thing)) == {float} else (tuple, *map(value_of, thing))
    if isinstance(thing, dict) and kind is dict:
        return dict, *((value_of(name), value_of(entry)) for name, entry in thing.items())
    if isinstance(thing, FunctionType):
        return _by_name(thing)
    if isinstance(thing, BuiltinFunctionType | MethodDescriptorType):
        owner = getattr(thing, "__self__", None)
        if owner is None or isinstance(owner, type):
            return thing
    elif kind is partial and isinstance(thing, partial):
        return partial, value_of(thing.func), value_of(thing.args), value_of(tuple(sorted(thing.keywords.items())))
    elif is_dataclass(thing) and kind.__module__.startswith(_PACKAGE):
        return kind, *(value_of(getattr(thing, f.name)) for f in fields(thing) if f.compare)
    raise Unknown


def _by_name(function: FunctionType) -> FunctionType:
    """A function of the library that can be found by its name, which therefore has no variables of its own."""
    if (function.__module__ or "").startswith(_PACKAGE):  # code that was executed from a text has no module
        found: object = sys.modules.get(function.__module__)
        for name in function.__qualname__.split("."):
            found = getattr(found, name, None)
        if found is function:
            return function
    raise Unknown


@dataclass(frozen=True)
class _Table:
    """A plan to write; equal to another with an equal value."""

    value: Hashable
    solver: Solver = field(compare=False)
    sde: SDE = field(compare=False)
    times: Tensor = field(compare=False)
    up: str


@dataclass(frozen=True)
class _Grid:
    """A grid to make; equal to another with an equal value."""

    value: Hashable
    maker: GridMaker = field(compare=False)
    sde: SDE = field(compare=False)
    steps: int
    window: tuple[tuple[str, float], ...]


def written(solver: Solver, sde: SDE, times: Tensor, up: str = "diffuse") -> Plan:
    """``solver.plan(sde, times, up=up)``, from an earlier equal call if there was one.

    Arguments:
        solver: Solver.
        sde: Process.
        times: Grid.
        up: Steps that go up in time.
    """
    plain = type(times) in (Tensor, Zigzag) and times.dtype == torch.float64 and times.ndim == 1
    if torch.compiler.is_compiling() or not plain or times.requires_grad or len(times) > LONGEST:
        return solver.plan(sde, times, up=up)
    try:
        value = type(times), tuple(times.tolist()), value_of(solver), value_of(sde)
    except Unknown:
        return solver.plan(sde, times, up=up)
    return _write(_Table(value, solver, sde, times, up))


@lru_cache(maxsize=STORED)
def _write(table: _Table) -> Plan:
    return table.solver.plan(table.sde, table.times, up=table.up)


def made(maker: GridMaker, sde: SDE, steps: int, window: Sequence[tuple[str, float]] = ()) -> Tensor:
    """``maker(sde, steps, **window)``, from an earlier equal call if there was one.

    Arguments:
        maker: Grid maker.
        sde: Process.
        steps: Number of steps.
        window: Names and values of the ends that are given, `t_start` and `t_end`.
    """
    if torch.compiler.is_compiling() or not 0 < steps < LONGEST:
        return maker(sde, steps, **dict(window))
    try:
        value = value_of(maker), value_of(sde), value_of(tuple(window))
    except Unknown:
        return maker(sde, steps, **dict(window))
    return _make(_Grid(value, maker, sde, steps, tuple(window))).clone()  # the caller may change it


@lru_cache(maxsize=STORED)
def _make(grid: _Grid) -> Tensor:
    return grid.maker(grid.sde, grid.steps, **dict(grid.window))
