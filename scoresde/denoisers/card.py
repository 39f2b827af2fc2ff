"""The card of a model: what a user of its weights must know beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._printing import fields
from scoresde.data import Standardize
from scoresde.denoisers.gaussian import Gaussian
from scoresde.plan.table import Plan


@runtime_checkable
class Written(Protocol):
    """An object that a dictionary of numbers and texts can hold: a solver or a plan."""

    def to_dict(self) -> Mapping[str, object]:
        """The dictionary."""


@checked
@dataclass(frozen=True, eq=False, repr=False)
class Card:
    """What is saved with a model beside its weights; every entry may be left out.

    Nothing happens by itself: the card says how to sample, and ``ss.sample`` does what its arguments say.

    Arguments:
        solver: Solver that the model should be sampled with, or a plan, such as a fitted one.
        nfe: Number of function evaluations of that solver; a plan has its own.
        event: Shape of one sample, such as (3, 32, 32).
        conditions: Names of the network's conditions; by default the arguments of its ``forward`` that have no default.
        scale: Map from the data to the scale of the model; ``scale.inverse`` maps samples back.
        gaussian: Gaussian approximation of the data, on the scale and the process of the model.
        licence: Name of the licence, such as ``"apache-2.0"``.
        notes: Text for the reader.

    Example:
        >>> import scoresde as ss
        >>> Card(solver=ss.UniPC(3), nfe=10, event=(2,), licence="mit")
        Card(solver=UniPC(order=3), nfe=10, event=[2], licence='mit')
    """

    solver: Written | None = None
    nfe: int | None = None
    event: tuple[int, ...] | None = None
    conditions: tuple[str, ...] | None = None
    scale: Standardize | None = None
    gaussian: Gaussian | None = None
    licence: str = ""
    notes: str = ""

    def __post_init__(self) -> None:
        if not (self.solver is None or isinstance(self.solver, Written)):
            raise TypeError(f"`solver` must be a solver, a plan or None, got {type(self.solver).__name__}.")
        if self.nfe is not None:
            check.integer("nfe", self.nfe, at_least=1)
            if isinstance(self.solver, Plan):
                raise ValueError("`nfe` has no meaning with a plan, which has its own number of evaluations; drop it.")
        if self.event is not None:
            event = tuple(check.integer("event", size, at_least=1) for size in self.event)
            object.__setattr__(self, "event", event)
        if self.conditions is not None:
            if isinstance(self.conditions, str) or not all(isinstance(name, str) for name in self.conditions):
                raise TypeError(f"`conditions` must be a tuple of names, got {self.conditions!r}.")
            object.__setattr__(self, "conditions", tuple(self.conditions))
        for name, kind in (("scale", Standardize), ("gaussian", Gaussian)):
            if not (getattr(self, name) is None or isinstance(getattr(self, name), kind)):
                raise TypeError(
                    f"`{name}` must be a {kind.__name__} or None, got {type(getattr(self, name)).__name__}."
                )
        for name in ("licence", "notes"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"`{name}` must be a text, got {type(getattr(self, name)).__name__}.")

    def __repr__(self) -> str:
        entries = {name: getattr(self, name) for name in ("solver", "nfe", "event", "conditions", "scale", "gaussian")}
        texts = {name: getattr(self, name) or None for name in ("licence", "notes")}
        return f"Card({fields(**entries, **texts)})"
