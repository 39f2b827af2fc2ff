"""Processes as dictionaries of numbers and names, for JSON files; the round trip is exact."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from numbers import Integral, Real

from scoresde.processes.derived import Shifted
from scoresde.processes.discrete import Discrete
from scoresde.processes.named import EDM, VE, VP, Cosine, Flow, Polynomial, SubVP, Trig
from scoresde.processes.sde import SDE

CLASSES: tuple[type[SDE], ...] = (VP, SubVP, VE, Cosine, EDM, Flow, Polynomial, Trig, Discrete, Shifted)
"""Processes that a dictionary can hold: those of the library that numbers define."""

_KEY = "process"


def to_dict(sde: SDE) -> dict[str, object]:
    """The class name and the arguments of a process; the function behind :meth:`SDE.to_dict`.

    Arguments:
        sde: Process, of a class in ``CLASSES``.
    """
    if type(sde) not in CLASSES:
        raise TypeError(
            f"{type(sde).__name__} is defined by code, which a dictionary cannot hold; the processes that it can hold "
            f"are {_names()}. Rebuild the process in your program, and pass it where the dictionary is read, as in "
            f"ss.load(folder, sde=...)."
        )
    names = [field.name for field in dataclasses.fields(sde) if field.init]
    if isinstance(sde, Discrete):
        names = ["betas", "t_min"]
    return {_KEY: type(sde).__name__, **{name: _plain(name, getattr(sde, name)) for name in names}}


def from_dict(table: Mapping[str, object]) -> SDE:
    """The process of a dictionary; the function behind :meth:`SDE.from_dict`.

    Arguments:
        table: Output of :func:`to_dict`.
    """
    if not isinstance(table, Mapping) or _KEY not in table:
        got = f"keys {', '.join(map(repr, table))}" if isinstance(table, Mapping) else type(table).__name__
        raise ValueError(f"`table` must be a dictionary from `to_dict`, with the key {_KEY!r}, got {got}.")
    classes = {cls.__name__: cls for cls in CLASSES}
    name = table[_KEY]
    if not isinstance(name, str) or name not in classes:
        raise ValueError(
            f"`table` has {_KEY}={name!r}, which is not one of {_names()}; was it written by a newer version?"
        )
    given = {
        key: from_dict(value) if isinstance(value, Mapping) else value for key, value in table.items() if key != _KEY
    }
    try:
        return classes[name](**given)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"`table` does not hold the arguments of {name}: {error}.") from error


def _names() -> str:
    return ", ".join(cls.__name__ for cls in CLASSES)


def _plain(name: str, value: object) -> object:
    """An argument as JSON holds it."""
    if isinstance(value, SDE):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_plain(name, entry) for entry in value]
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise TypeError(f"`{name}` must be a finite number to be written, got {value!r}.")
    return int(value) if isinstance(value, Integral) else float(value)
