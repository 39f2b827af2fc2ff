"""Budgets smaller than the order: a multistep solver is then exactly the solver of lower order, and says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import scoresde as ss
from scoresde.solvers.multistep import Multistep

VP = ss.VP()
FAMILIES: dict[str, tuple[int, Callable[[int], ss.solvers.Solver]]] = {
    "UniPC": (9, ss.UniPC),
    "UniP": (9, lambda n: ss.UniPC(n, corrector=False)),
    "velocity": (4, ss.VelocityAB),
    "DPM-Solver++": (3, ss.DPMSolverPP),
    "DEIS": (3, ss.solvers.DEIS),
}


@pytest.mark.parametrize("end", [0.0, 0.05])
@pytest.mark.parametrize("name", FAMILIES)
def test_few_steps_of_a_high_order_are_those_of_the_lower_order(name: str, end: float) -> None:
    highest, make = FAMILIES[name]
    for steps in range(1, highest + 2):
        grid = ss.grids.quadratic_vp(VP, steps, **({"t_end": end} if end else {}))
        plan = make(highest).plan(VP, grid)
        lower = make(min(steps, highest))
        assert plan.rows == lower.plan(VP, grid).rows
        assert plan.order == lower.order == lower.plan(VP, grid).order


def test_a_start_of_full_order_keeps_it() -> None:
    assert Multistep(3, start="self").plan(VP, ss.grids.karras(VP, 2)).order == 3


@pytest.mark.parametrize("nfe", [1, 2])
def test_budgets_below_the_first_step_of_pndm_are_those_of_plms(nfe: int) -> None:
    solver, steps = ss.solvers.PNDM().for_nfe(nfe)
    grid = ss.grids.karras(VP, steps)
    assert solver.plan(VP, grid).rows == ss.solvers.PLMS().plan(VP, grid).rows and steps == nfe
