"""Solvers as dictionaries: the text is read back to an equal solver, or refused; it never runs as code."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch
from test_naming import CATALOGUE, solvers_of

import scoresde as ss
from scoresde.solvers import Leg, Solver, Tape

BY_FUNCTION = ("half", "wave", "square", "<", "Slope", "partial")  # options of the catalogue that are code


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_solver_without_code_in_its_options_is_restored(name: str) -> None:
    restored = 0
    for solver in solvers_of(name):
        try:
            table = solver.to_dict()
        except TypeError:
            refused = (*BY_FUNCTION, "Statistics", "edm_prediction", "Prediction(", "phi=")
            assert any(word in repr(solver) for word in refused), solver
            continue
        back = Solver.from_dict(json.loads(json.dumps(table)))
        assert back == solver and repr(back) == repr(solver)
        restored += 1
    assert restored or name in ("DPMSolverV3", "EntryMultistep", "ExtendedReverse", "ReverseEuler")


def test_a_restored_solver_builds_the_same_table() -> None:
    grid = torch.tensor([1.0, 0.7, 0.4, 0.1, 0.0], dtype=torch.float64)
    for solver in (ss.UniPC(3), ss.SDEDPMSolverPP(2, eta=0.3), ss.EDMHeun(alpha=2 / 3), replace(ss.DDIM(), eta=0.25)):
        assert Solver.from_dict(solver.to_dict()).plan(ss.VP(), grid) == solver.plan(ss.VP(), grid)


@dataclass(frozen=True)
class Own(Solver):
    order = 1

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        new = tape.move(leg.row, leg.t, leg.history[:1], evaluates=leg.evaluates, node=leg.node)
        return new, [new]


@pytest.mark.parametrize("solver", [Own(), ss.DDIM(eta=lambda t: 0.5)])
def test_code_is_refused_with_the_way_to_do_it(solver: Solver) -> None:
    with pytest.raises(TypeError, match=r"text cannot hold.*solver\.plan\(sde, grid\)"):
        solver.to_dict()


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "DDIM(eta=__import__('os').getpid())",
        "solvers.DDIM()",
        "DDIM().plan",
        "Solver.from_dict",
        "Leg(row=0)",
        "(lambda: DDIM())()",
        "DDIM(**{'eta': 0.5})",
        "DDIM(0.5)",
        "DDIM(speed=1)",
        "UniPC(order=-1)",
        "replace(3)",
        "DATA",
        "",
        "(" * 500,
    ],
)
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a call of a solver|not the call of a solver"):
        Solver.from_dict({"solver": text})
    with pytest.raises(ValueError, match="must be a dictionary"):
        Solver.from_dict({"name": text})
