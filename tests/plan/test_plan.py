"""Plans: a table means what it says, whoever runs it and however it was kept."""

from __future__ import annotations

import json
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

import scoresde as ss
from scoresde.plan.rows import Row
from scoresde.plan.run import Step, run, steps, updates
from scoresde.plan.table import Plan
from scoresde.solvers.interpolants import NOISE
from scoresde.solvers.multistep import Multistep
from scoresde.solvers.statistics import Statistics

VP = ss.VP()
RULES = {
    "DDIM": ss.DDIM(),
    "Euler": ss.solvers.Euler(),
    "Heun in lam": ss.solvers.Heun("lam"),
    "Midpoint": ss.solvers.Midpoint(),
    "RungeKutta4": ss.solvers.RungeKutta4(),
    "EDMHeun": ss.EDMHeun(),
    "DPM2": ss.solvers.DPM2(),
    "DEISRungeKutta": ss.solvers.DEISRungeKutta(),
    "RES": ss.solvers.RES(3),
    "ETDRK4": ss.solvers.ETDRK4(),
    "DPMSolver single": ss.solvers.DPMSolver(3),
    "DPMSolver fast": ss.solvers.DPMSolver(kind="fast").for_nfe(9)[0],
    "DPMSolverPP 2M": ss.DPMSolverPP(2),
    "DPMSolverPP 2S": ss.DPMSolverPP(2, kind="single"),
    "DPMSolverPP published 3M": ss.DPMSolverPP(3, form="published"),
    "UniPC": ss.UniPC(3),
    "UniPC bh1 of noise": ss.UniPC(2, "bh1", NOISE),
    "DEIS": ss.solvers.DEIS(3),
    "DEIS rho": ss.solvers.DEIS(3, "rho"),
    "LMS": ss.solvers.LMS(),
    "PLMS": ss.solvers.PLMS(),
    "PNDM": ss.solvers.PNDM(),
    "IPNDM": ss.solvers.IPNDM(),
    "VelocityAB": ss.VelocityAB(3),
    "VelocityAB from a self-start": ss.VelocityAB(3, start="self"),
    "AcceleratedDDIM": ss.solvers.AcceleratedDDIM(),
    "PECE": ss.solvers.with_corrector(ss.solvers.DEIS(2), reevaluate=True),
    "SDE 2M": Multistep(2, eta=1.0),
    "DPMSolverV3": ss.solvers.DPMSolverV3(
        Statistics((-6.0, 0.0, 7.0), (0.9, 0.5, 0.1), (-0.2, -0.5, -0.1), (0.1, 0.2, 0.3))
    ),
}
SINGLE_STEP = ("DDIM", "Euler", "Heun in lam", "Midpoint", "RungeKutta4", "EDMHeun", "DPM2", "DEISRungeKutta", "RES")
EACH_RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def grid_of(rule: ss.solvers.Solver, legs: int = 6) -> Tensor:
    orders = getattr(rule, "orders", None)
    return ss.grids.karras(VP, len(orders) if orders else legs)


def network(x: Tensor, t: Any) -> Tensor:
    """Something that is no linear function of the state and knows its time."""
    return torch.sin(x) * 0.8 - 0.3 * t


START = ss.Noise(0).normal((3, 5), 0, dtype=torch.float64)

# By hand: a stage, a normal, a constant, and a result.
SMALL = Plan(
    (
        Row(1.0, evaluates=True, node=0, note="start"),
        Row(0.5, x=((0, 0.25),), d=((0, 0.5),), evaluates=True, note="stage"),
        Row(0.5, x=((0, 0.5), (1, -1.0)), z=((0, 1e-5),), one=0.25, evaluates=True, node=1),
        Row(0.0, d=((2, 1.5), (0, -0.5)), node=2),
    ),
    "by hand",
    order=2,
    sde="VP()",
)


# What a plan says about itself.


def test_what_a_plan_counts() -> None:
    assert (SMALL.nfe, SMALL.draws, SMALL.stochastic, len(SMALL)) == (3, 1, True, 4)
    assert SMALL.times == [1.0, 0.5, 0.0], "nodes only"
    none = Plan((Row(1.0),))
    assert (none.nfe, none.draws, none.stochastic, none.memory, none.times) == (0, 0, False, 1, [])
    sparse = replace(SMALL, rows=(*SMALL.rows[:2], replace(SMALL.rows[2], z=((4, 1.0),)), SMALL.rows[3]))
    assert sparse.draws == 5, "a draw is known by its number"


@pytest.mark.parametrize(
    ("rule", "memory"),
    [
        (ss.DDIM(), 2),  # x, d
        (ss.DPMSolverPP(2), 3),  # x, d and the d before
        (ss.UniPC(3), 5),  # after the predictor: x that the corrector starts from, the new d and three more
        (
            ss.solvers.RungeKutta4(),
            5,
        ),  # x of the start and of three stages, from which the slopes are read off, and the last d
    ],
)
def test_memory_is_what_is_read_again(rule: ss.solvers.Solver, memory: int) -> None:
    assert rule.plan(VP, ss.grids.karras(VP, 8)).memory == memory


def test_the_small_plan_prints_as_a_table() -> None:
    assert str(SMALL).splitlines() == [
        "by hand: 3 evaluations, 4 rows, order 2, 1 draws",
        "   0  t=1        eval   start, node 0",
        "   1  t=0.5      eval  x[0:+0.25]  d[0:+0.5]   stage",
        "   2  t=0.5      eval  x[0:+0.5 1:-1]  z[0:+1e-05]  one[+0.25]   node 1",
        "   3  t=0              d[2:+1.5 0:-0.5]   node 2",
    ]


def test_unipc_2_prints_as_the_design_shows_it() -> None:
    assert str(ss.UniPC(2).plan(VP, [1.0, 0.7, 0.4, 0.0])).splitlines() == [
        "UniPC(order=2): 3 evaluations, 6 rows, order 3",
        "   0  t=1        eval   start, node 0",
        "   1  t=0.7      eval  x[0:+0.9965]  d[0:+0.0778]   predict",
        "   2  t=0.7            x[0:+0.9965]  d[1:+0.0389 0:+0.0389]   correct, node 1",
        "   3  t=0.4      eval  x[2:+0.9001]  d[1:+0.4925 0:-0.1263]   predict",
        "   4  t=0.4            x[2:+0.9001]  d[3:+0.2106 1:+0.172 0:-0.01635]   correct, node 2",
        "   5  t=0              d[3:+1]   node 3",
    ]


def test_a_plan_for_each_sample_prints_how_many_there_are() -> None:
    times = torch.tensor([[1.0, 0.9], [0.5, 0.4], [0.3, 0.2]], dtype=torch.float64)
    assert "x[0:<2 values>]" in str(ss.DDIM().plan(VP, times))


BAD_ROWS = {
    "no rows": ((), "must not be empty"),
    "a start that reads": ((Row(1.0, x=((0, 1.0),)),), "row 0 is the start; its `x`, `d` and `z` must be empty"),
    "a row that reads nothing": ((Row(1.0), Row(0.5)), "row 1 has no terms"),
    "a constant alone": ((Row(1.0), Row(0.5, one=1.0)), "row 1 has no terms"),
    "itself": ((Row(1.0), Row(0.5, x=((1, 1.0),))), r"row 1 uses x\[1\]; use earlier rows only"),
    "a later row": (
        (Row(1.0), Row(0.5, x=((2, 1.0),)), Row(0.4, x=((0, 1.0),))),
        r"row 1 uses x\[2\]; use earlier",
    ),
    "a later evaluation": ((Row(1.0, evaluates=True), Row(0.5, d=((1, 1.0),), evaluates=True)), r"uses d\[1\]"),
    "a negative row": ((Row(1.0), Row(0.5, x=((-1, 1.0),))), r"uses x\[-1\]"),
    "a negative draw": ((Row(1.0), Row(0.5, x=((0, 1.0),), z=((-1, 1.0),))), r"uses z\[-1\]"),
    "what was not evaluated": ((Row(1.0), Row(0.5, d=((0, 1.0),))), r"uses d\[0\], but row 0 does not evaluate"),
    "nan": ((Row(1.0), Row(0.5, x=((0, float("nan")),))), r"row 1 has the weight nan on x\[0\]; it must be finite"),
    "inf": ((Row(1.0), Row(0.5, x=((0, 1.0),), z=((0, float("inf")),))), r"weight inf on z\[0\]"),
    "a constant that is not finite": ((Row(1.0), Row(0.5, x=((0, 1.0),), one=float("nan"))), "constant nan"),
    "a row named twice": ((Row(1.0), Row(0.5, x=((0, 1.0), (0, 2.0)))), "has an entry of `x` twice; add its weights"),
    "a time that is not finite": ((Row(float("inf")),), "row 0 has the time inf"),
    "a negative time": ((Row(1.0), Row(-0.5, x=((0, 1.0),))), "row 1 has the time -0.5"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_tables_are_refused(case: str) -> None:
    rows, message = BAD_ROWS[case]
    with pytest.raises(ValueError, match=message):
        Plan(rows)


# Keeping it.


@EACH_RULE
def test_a_plan_comes_back_from_its_numbers_to_the_bit(rule: ss.solvers.Solver, tmp_path: Path) -> None:
    plan = rule.plan(VP, grid_of(rule))
    assert Plan.from_dict(plan.to_dict()) == plan
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan, "through text too"
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    table = json.loads((tmp_path / "plan.json").read_text())
    assert table["scoresde"] == 1 and len(table["rows"]) == len(plan)


def test_equality_sees_every_number() -> None:
    assert replace(SMALL) == SMALL and hash(replace(SMALL)) == hash(SMALL)
    assert Plan.from_dict(SMALL.to_dict()) == SMALL
    rows = list(SMALL.rows)
    for change in (
        {"t": np.nextafter(0.5, 1)},
        {"x": ((0, 0.5), (1, np.nextafter(-1.0, 0)))},
        {"z": ((0, 2e-5),)},
        {"one": 0.0},
        {"node": None},
        {"evaluates": True, "note": "x"},
    ):
        other = replace(SMALL, rows=(*rows[:2], replace(rows[2], **change), rows[3]))
        assert other != SMALL, change
    for change in ({"name": "other"}, {"order": 1}, {"sde": ""}):
        assert replace(SMALL, **change) != SMALL
    assert VP and ss.UniPC(3).plan(VP, ss.grids.karras(VP, 5)) == ss.UniPC(3).plan(ss.VP(), ss.grids.karras(ss.VP(), 5))


def test_tables_of_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="format 1, got format None"):
        Plan.from_dict({"rows": []})
    with pytest.raises(ValueError, match="got format 2"):
        Plan.from_dict({**SMALL.to_dict(), "scoresde": 2})
    table = SMALL.to_dict()
    table["rows"][1]["x"] = [[3, 1.0]]
    with pytest.raises(ValueError, match="earlier rows only"):
        Plan.from_dict(table)
    many = ss.DDIM().plan(VP, torch.tensor([[1.0, 0.9], [0.5, 0.4]], dtype=torch.float64))
    with pytest.raises(ValueError, match="a number for each sample"):
        many.to_dict()
    times = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    assert Plan.from_dict(ss.DDIM().plan(VP, times).to_dict()).rows == ss.DDIM().plan(VP, [1.0, 0.5]).rows


# The file.


def test_every_flipped_bit_of_a_file_is_noticed(tmp_path: Path) -> None:
    plan = replace(SMALL, meta={"fitted": [1, 2.5, "λ"]})
    path = tmp_path / "plan.json"
    plan.save(path)
    whole = path.read_bytes()
    refused = 0
    for byte in range(len(whole)):
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1 << byte % 8]) + whole[byte + 1 :])
        try:  # pytest turns the warning of a file without a checksum into an error
            again = Plan.load(path)
        except ValueError as error:
            refused += f"{path} is not a plan that `save` wrote, or is damaged" in str(error)
            continue
        assert again == plan and again.meta == plan.meta, f"byte {byte} changed the plan"
    assert refused > 0.7 * len(whole), "all but a few blanks"
    path.write_bytes(whole)
    again = Plan.load(path)
    assert again == plan and again.meta == plan.meta
    for cut in range(0, len(whole) - 2, 5):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"plan\.json is not a plan"):
            Plan.load(path)


def test_plans_saved_without_a_checksum_load_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps(SMALL.to_dict(), indent=1) + "\n")  # as the first version wrote it
    with pytest.warns(UserWarning, match=r"old\.json has no checksum.*save it again"):
        assert Plan.load(path) == SMALL


def test_a_failed_save_leaves_the_old_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    SMALL.save(path)

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device; nothing was written: .*plan\.json"):
        replace(SMALL, name="new").save(path)
    monkeypatch.undo()
    with pytest.raises(TypeError, match="not JSON serializable"):
        replace(SMALL, meta={"a": torch.zeros(1)}).save(path)
    assert Plan.load(path) == SMALL and list(tmp_path.iterdir()) == [path]


ROW = {"t": 1.0}
FORGED: dict[str, bytes] = {
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep meta": b'{"scoresde": 1, "meta": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
    "not UTF-8": b"\xff\xfe{",
    "a list": b"[1]",
    "a number": b"3",
    "long number": b'{"scoresde": ' + b"9" * 5000 + b"}",
    "no rows": json.dumps({"scoresde": 1}).encode(),
    **{
        name: json.dumps({"scoresde": 1, "name": "", "order": 1, "sde": "", "rows": rows}).encode()
        for name, rows in {
            "huge time": [{"t": 10**400}],
            "infinite time": [{"t": 1e999}],
            "text as time": [{"t": "1"}],
            "truth as weight": [ROW, {"t": 0.5, "x": [[0, True]]}],
            "text as weight": [ROW, {"t": 0.5, "x": [[0, "1.0"]]}],
            "later row": [ROW, {"t": 0.5, "x": [[10**30, 1.0]]}],
            "list as row": [[]],
            "unknown entry": [{**ROW, "w": 1}],
            "pairs of three": [ROW, {"t": 0.5, "x": [[0, 1.0, 2]]}],
            "list as node": [{**ROW, "node": []}],
            "number of rows": 7,
        }.items()
    },
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_files_are_one_clear_error(kind: str, tmp_path: Path) -> None:
    (tmp_path / "forged.json").write_bytes(FORGED[kind])
    with pytest.raises(
        ValueError, match=r"forged\.json is not a plan that `save` wrote, or is damaged .*make the plan"
    ):
        Plan.load(tmp_path / "forged.json")


# Joining.


@pytest.mark.parametrize("name", SINGLE_STEP)
def test_plans_of_single_steps_join_to_the_plan_of_the_joined_grid(name: str) -> None:
    rule = RULES[name]
    first, second = [1.0, 0.8, 0.5], [0.5, 0.3, 0.1, 0.0]
    joined = rule.plan(VP, first).join(rule.plan(VP, second))
    whole = rule.plan(VP, first + second[1:])
    assert joined.nfe == whole.nfe and joined.times == whole.times
    assert (joined.name, joined.order, joined.sde) == (whole.name, whole.order, whole.sde)
    assert [row.node for row in joined.rows] == [row.node for row in whole.rows]
    # Legs are laid side by side, and an exponential of many numbers rounds otherwise than one of few.
    torch.testing.assert_close(run(joined, network, START), run(whole, network, START), rtol=1e-13, atol=1e-14)
    two = run(rule.plan(VP, second), network, run(rule.plan(VP, first), network, START))
    assert torch.equal(run(joined, network, START), two)


def test_joined_plans_shift_rows_draws_and_nodes() -> None:
    first = Plan((Row(1.0, evaluates=True, node=0), Row(0.5, d=((0, 1.0),), z=((0, 2.0), (2, 1.0)), node=1)), "a", 3)
    second = Plan(
        (Row(0.5, evaluates=True, node=0), Row(0.2, x=((0, 3.0),), d=((0, 4.0),), z=((1, 5.0),), one=6.0, node=1)), "b"
    )
    joined = first.join(second)
    assert joined.rows[1].evaluates, "the second plan asks where it starts"
    assert joined.rows[2] == Row(0.2, x=((1, 3.0),), d=((1, 4.0),), z=((4, 5.0),), one=6.0, node=2)
    assert (joined.name, joined.order, joined.draws, joined.times) == ("a + b", 3, 5, [1.0, 0.5, 0.2])
    assert second.join(Plan((Row(0.2),))).rows[:2] == second.rows, "joining a start alone changes nothing"


def test_joined_normals_are_fresh() -> None:
    rule = Multistep(1, eta=1.0)
    a, b = rule.plan(VP, [1.0, 0.5]), rule.plan(VP, [0.5, 0.2])
    draws = [k for row in a.join(b).rows for k, _ in row.z]
    assert draws == [0, 1]


def test_plans_that_do_not_meet_are_refused() -> None:
    rule = ss.DDIM()
    plan = rule.plan(VP, [1.0, 0.5])
    with pytest.raises(ValueError, match=r"must start where this plan ends, at t = 0.5, but starts at 1"):
        plan.join(plan)
    with pytest.raises(ValueError, match=r"different processes: VP.* and VP.*beta_max=10"):
        plan.join(rule.plan(ss.VP(beta_max=10.0), [0.5, 0.2]))
    many = rule.plan(VP, torch.tensor([[1.0, 0.9], [0.5, 0.4]], dtype=torch.float64))
    with pytest.raises(ValueError, match="a number for each sample"):
        many.join(many)


# Folding, and what a row means, on random tables.

WEIGHTS = st.floats(-1.5, 1.5).map(lambda w: round(w, 3))


@st.composite
def tables(draw: st.DrawFn) -> Plan:
    n = draw(st.integers(1, 9))
    rows = [Row(1.0, evaluates=draw(st.booleans()), node=0)]
    for r in range(1, n + 1):
        asked = [k for k in range(r) if rows[k].evaluates]
        some = lambda pool: draw(st.lists(st.sampled_from(pool), unique=True, max_size=3)) if pool else []  # noqa: E731
        x, d, z = some(list(range(r))), some(asked), some([0, 1, 2])
        if not (x or d or z):
            x = [r - 1]
        terms = [tuple((k, draw(WEIGHTS)) for k in column) for column in (x, d, z)]
        one = draw(st.sampled_from([0.0, 0.0, 0.7]))
        node = draw(st.sampled_from([None, r]))
        rows.append(Row(1 - r / (n + 1), *terms, evaluates=draw(st.booleans()), node=node, one=one))
    return Plan(tuple(rows), "random")


def literally(plan: Plan, x: Tensor, noise: ss.Noise | None) -> list[np.ndarray[Any, Any]]:
    """Every state of the table, in numpy, keeping all of them."""
    xs, ds = [], {}
    for r, row in enumerate(plan.rows):
        state = np.full(x.shape, row.one) if r else x.numpy()
        for k, w in row.x:
            state = state + w * xs[k]
        for k, w in row.d:
            state = state + w * ds[k]
        for k, w in row.z:
            assert noise is not None
            state = state + w * noise.normal(tuple(x.shape), k, dtype=torch.float64).numpy()
        if row.evaluates:
            ds[r] = np.sin(state) * 0.8 - 0.3 * row.t
        xs.append(state)
    return xs


def in_tensors(plan: Plan) -> Plan:
    def terms(column: Any) -> Any:
        return tuple((k, torch.tensor(w, dtype=torch.float64)) for k, w in column)

    return replace(
        plan,
        rows=tuple(
            replace(r, x=terms(r.x), d=terms(r.d), z=terms(r.z), one=torch.tensor(r.one, dtype=torch.float64))
            for r in plan.rows
        ),
    )


@settings(max_examples=60)
@given(tables())
def test_running_a_table_is_what_it_says_and_folding_changes_nothing(plan: Plan) -> None:
    noise = ss.Noise(1)
    states = literally(plan, START, noise)
    size = 1 + np.abs(states[-1]).max()
    got = run(plan, network, START, noise)
    assert np.abs(got.numpy() - states[-1]).max() < 1e-12 * size
    folded = plan.folded()
    assert np.abs(run(folded, network, START, noise).numpy() - states[-1]).max() < 1e-12 * size
    assert [r.t for r in folded.rows if r.evaluates] == [r.t for r in plan.rows if r.evaluates]
    assert folded.folded() == folded
    readers = [[row for row in folded.rows if k in dict(row.x)] for k in range(len(folded))]
    for k in range(1, len(folded) - 1):
        if not folded.rows[k].evaluates and len(readers[k]) == 1:
            assert folded.rows[k].node is not None and readers[k][0].d, "else nothing is left to fold"
    # Nor does the memory that states are made in, or whether weights are numbers or tensors.
    with torch.no_grad():
        assert torch.equal(run(plan, network, START, noise, overwrite=True), got)
    assert torch.allclose(run(in_tensors(plan), network, START, noise), got, rtol=1e-12, atol=1e-12 * size)
    # Every node that is passed is the table's state there.
    nodes = {row.node: r for r, row in enumerate(plan.rows) if row.node is not None}
    for step in steps(plan, network, START, noise):
        if step.node in nodes:
            assert np.abs(step.x.numpy() - states[nodes[step.node]]).max() < 1e-12 * size


def test_a_zigzag_costs_no_pass_over_the_state() -> None:
    times = ss.grids.zigzag([1.0, 0.8, 0.9, 0.6, 0.7, 0.3, 0.0])
    for rule in (ss.DDIM(), ss.DPMSolverPP(2), Multistep(1, eta=1.0)):
        plan = rule.plan(VP, times)
        assert plan.nfe == 4, "one for each leg that is solved"
        assert len(plan) == 1 + plan.nfe, "up legs have no rows of their own"
        assert plan.times == [1.0, 0.9, 0.7, 0.3, 0.0], "a turning point below is folded into the noise after it"


# Running it.


def hand_ddim(x: Tensor, times: list[float]) -> Tensor:
    for s, t in pairwise(times):
        d = network(x, s)
        ratio = VP.sigma(t) / VP.sigma(s)
        x = ratio * x + (VP.alpha(t) - ratio * VP.alpha(s)) * d
    return x


def test_ddim_is_ddim() -> None:
    times = [1.0, 0.7, 0.3, 0.1, 0.0]
    got = run(ss.DDIM().plan(VP, times), network, START)
    assert torch.allclose(got, hand_ddim(START, times), rtol=1e-13)


class Alive(TorchFunctionMode):
    """Counts the states that are alive: results of torch functions of the state's shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.seen: dict[int, weakref.ref[Tensor]] = {}
        self.most = 0

    def _watch(self, x: Tensor) -> None:
        key = id(x)
        self.seen[key] = weakref.ref(x, lambda _: self.seen.pop(key, None))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.shape == self.shape and id(out) not in self.seen:
            self._watch(out)
        self.most = max(self.most, len(self.seen))
        return out


@EACH_RULE
def test_states_are_forgotten_as_soon_as_no_row_names_them(rule: ss.solvers.Solver) -> None:
    times = grid_of(rule, 30)
    plan = rule.plan(VP, times)
    at_network = []

    def net(x: Tensor, t: Any) -> Tensor:
        at_network.append(len(counter.seen))
        return x * 0.5

    x = torch.ones(2, 7, dtype=torch.float64)
    with Alive((2, 7)) as counter:
        run(plan, net, x, ss.Noise(0))
    # While a row is made there are two more than between rows, it and the last one, whose shape it has; and a normal
    # with a view of it.
    assert counter.most <= plan.memory + 2 + 2 * plan.stochastic
    assert max(at_network) <= plan.memory, "and none that is dead sits beside the network"
    if times.numel() > 20:
        assert plan.memory <= 12, "it does not grow with the number of legs"


def test_steps_and_callbacks_keep_nothing() -> None:
    plan = ss.DDIM().plan(VP, ss.grids.karras(VP, 30))
    with Alive((2, 7)) as counter:
        run(plan, lambda x, t: x * 0.5, torch.ones(2, 7), callback=lambda step: None)
    assert counter.most <= plan.memory + 2


@EACH_RULE
def test_the_start_is_left_alone(rule: ss.solvers.Solver) -> None:
    for overwrite in (False, True):
        x = START.clone()
        with torch.no_grad():
            run(rule.plan(VP, grid_of(rule)), network, x, ss.Noise(0), overwrite=overwrite)
        assert torch.equal(x, START)


@EACH_RULE
def test_overwriting_changes_no_result_and_stands_back_for_gradients(rule: ss.solvers.Solver) -> None:
    plan = rule.plan(VP, grid_of(rule))
    want = run(plan, network, START, ss.Noise(0))
    with torch.no_grad():
        assert torch.equal(run(plan, network, START, ss.Noise(0), overwrite=True), want)
    starts = [START.clone().requires_grad_() for _ in range(2)]
    grads = [
        torch.autograd.grad(run(plan, network, x, ss.Noise(0), overwrite=o).sum(), x)[0]
        for x, o in zip(starts, (False, True), strict=True)
    ]
    assert torch.equal(*grads) and bool(grads[0].any())


def test_hooks_are_called_at_every_node_in_order_and_may_replace_the_state() -> None:
    plan = ss.UniPC(3).plan(VP, ss.grids.karras(VP, 5))
    seen: list[tuple[int, Any]] = []

    def look(node: int, t: Any, x: Tensor) -> Tensor:
        seen.append((node, t))
        return x

    assert torch.equal(run(plan, network, START, hook=look), run(plan, network, START))
    assert seen == list(enumerate(ss.grids.karras(VP, 5).tolist())), "stages and predictions are no nodes"
    asked = []

    def net(x: Tensor, t: Any) -> Tensor:
        asked.append(x)
        return network(x, t)

    run(ss.DDIM().plan(VP, [1.0, 0.5, 0.0]), net, START, hook=lambda node, t, x: x + 100 if node == 1 else x)
    assert float(asked[1].min()) > 50, "the network is asked at what the hook made"
    last = run(ss.DDIM().plan(VP, [1.0, 0.5]), network, START, hook=lambda node, t, x: torch.zeros_like(x))
    assert not last.any(), "the result is the hook's too"
    with pytest.raises(TypeError, match="`hook` must return a state, got NoneType"):
        run(plan, network, START, hook=lambda node, t, x: None)  # type: ignore[arg-type, return-value]


def test_steps_tell_where_a_run_is() -> None:
    plan = ss.solvers.DPMSolver(2).plan(VP, [1.0, 0.6, 0.2, 0.0])
    passed = list(steps(plan, network, START))
    assert [s.node for s in passed] == [0, 1, 2, 3]
    assert [s.t for s in passed] == [1.0, 0.6, 0.2, 0.0]
    assert [s.nfe for s in passed] == [1, 3, 5, 5]
    assert torch.equal(passed[0].x, START)
    for step in passed[:-1]:
        assert step.x0 is not None and torch.equal(step.x0, network(step.x, step.t))
    assert passed[-1].x0 is None
    assert torch.equal(passed[-1].x, run(plan, network, START))
    seen: list[Step] = []
    run(plan, network, START, callback=seen.append)
    assert [(s.node, s.t, s.nfe) for s in seen] == [(s.node, s.t, s.nfe) for s in passed]


def test_a_result_without_a_node_is_passed_too() -> None:
    plan = Plan((Row(1.0, node=0), Row(0.5, x=((0, 2.0),))))
    assert [s.node for s in steps(plan, network, START)] == [0, -1]
    assert torch.equal(run(plan, network, START), 2 * START)
    assert torch.equal(run(Plan((Row(1.0),)), network, START), START)


def test_a_run_can_be_left_and_taken_up_again() -> None:
    plan = ss.UniPC(2).plan(VP, ss.grids.karras(VP, 6))
    loop = steps(plan, network, START)
    first = [next(loop).node for _ in range(3)]
    assert first == [0, 1, 2]
    rest = list(loop)
    assert torch.equal(rest[-1].x, run(plan, network, START))


PER_SAMPLE = torch.tensor([[1.0, 0.9, 0.8], [0.6, 0.5, 0.55], [0.3, 0.2, 0.1]], dtype=torch.float64)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2), (2, 3, 4, 4), (2, 1, 3, 2, 2), (0, 3), (1, 5), (3, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_shape_runs_and_keeps_its_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = ss.Noise(3).normal(shape, 0, dtype=dtype)
    plan = Multistep(2, eta=0.5).plan(VP, ss.grids.karras(VP, 5))
    out = run(plan, network, x, ss.Noise(0))
    assert out.shape == shape and out.dtype == dtype and bool(out.isfinite().all())
    flat = run(plan, network, x.double().flatten(1) if x.ndim > 1 else x.double()[:, None], ss.Noise(0))
    assert torch.allclose(out.double().reshape(flat.shape), flat, atol=1e-5 if dtype == torch.float32 else 1e-12)


def test_strides_do_not_matter() -> None:
    x = ss.Noise(3).normal((4, 3, 5, 5), 0, dtype=torch.float64)
    plan = ss.UniPC(3).plan(VP, ss.grids.karras(VP, 5))
    want = run(plan, network, x)
    for other in (x.contiguous(memory_format=torch.channels_last), x.transpose(1, 3).contiguous().transpose(1, 3)):
        assert not other.is_contiguous()
        assert torch.equal(run(plan, network, other), want)
    assert torch.equal(run(plan, network, x[:1].expand(4, 3, 5, 5))[3], want[0])


@pytest.mark.parametrize("rule", [ss.UniPC(3), ss.solvers.RungeKutta4(), Multistep(2, NOISE, eta=1.0)], ids=str)
def test_nothing_reads_a_tensor_back_to_the_host(rule: ss.solvers.Solver) -> None:
    # A tensor on the meta device has no numbers: .item(), bool() and nonzero() raise there.
    x = torch.empty(3, 2, 4, device="meta")
    plans = [rule.plan(VP, ss.grids.karras(VP, 6))]
    if not isinstance(rule, type(ss.solvers.RungeKutta4())):
        plans.append(rule.plan(VP, PER_SAMPLE))
    for plan in plans:
        passed: list[Step] = []
        out = run(plan, lambda x, t: x * 0.5, x, ss.Noise(0), hook=lambda node, t, x: x + 1, callback=passed.append)
        assert out.device.type == "meta" and out.shape == x.shape
        assert len(passed) == len(plan.times)
        assert str(plan)


def test_a_denoiser_on_another_device_is_asked_at_times_on_that_device() -> None:
    model = ss.Denoiser(lambda x, t: x * t.reshape(-1, 1), VP, predicts="eps")
    out = run(ss.DPMSolverPP(2).plan(VP, PER_SAMPLE), model.x0, torch.empty(3, 2, device="meta"))
    assert out.device.type == "meta"


def test_noise_must_be_given_where_it_is_drawn() -> None:
    plan = Multistep(1, eta=1.0).plan(VP, [1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match=r"draws 1 normals; give it a `noise`, as in Noise\(seed\)"):
        run(plan, network, START)
    again = [run(plan, network, START, ss.Noise(seed)) for seed in (0, 0, 1)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])


def test_interleaved_runs_of_one_plan_do_not_meet() -> None:
    plan = Multistep(3, corrector=3, eta=0.5).plan(VP, ss.grids.karras(VP, 8))
    starts = [START, ss.Noise(5).normal((2, 4), 0, dtype=torch.float64)]
    alone = [run(plan, network, x, ss.Noise(i)) for i, x in enumerate(starts)]
    loops = [steps(plan, network, x, ss.Noise(i)) for i, x in enumerate(starts)]
    last: list[Tensor] = [START, START]
    for pair in zip(*loops, strict=True):
        last = [step.x for step in pair]
    assert all(torch.equal(a, b) for a, b in zip(last, alone, strict=True))


def test_threads_may_share_a_plan() -> None:
    plan = ss.UniPC(3).plan(VP, ss.grids.karras(VP, 12))
    before = hash(plan)
    starts = [ss.Noise(i).normal((5, 4), 0, dtype=torch.float64) for i in range(16)]
    alone = [run(plan, network, x) for x in starts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: run(plan, network, x), starts))
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert hash(plan) == before


@pytest.mark.parametrize(
    "rule", [ss.UniPC(2), ss.solvers.DEIS(3), ss.solvers.RungeKutta4(), Multistep(2, eta=1.0)], ids=str
)
def test_a_grid_for_each_sample_runs_each_on_its_own(rule: ss.solvers.Solver) -> None:
    def net(x: Tensor, t: Any) -> Tensor:
        return torch.sin(x) * 0.8 - 0.3 * (t[:, None] if isinstance(t, Tensor) and t.ndim else t)

    got = run(rule.plan(VP, PER_SAMPLE), net, START, ss.Noise(0))
    for b in range(3):
        alone = rule.plan(VP, PER_SAMPLE[:, b].tolist())
        want = run(alone, net, START[b : b + 1], ss.Noise(0)[[b]])
        assert torch.allclose(got[b], want[0], rtol=1e-12)
    with pytest.raises(ValueError, match="`weight` has 3 entries and the state has 2 rows"):
        run(rule.plan(VP, PER_SAMPLE), lambda x, t: x, START[:2], ss.Noise(0))


# Its matrices.


@EACH_RULE
def test_matrices_are_those_of_exact_elimination(rule: ss.solvers.Solver) -> None:
    """By substitution in rational numbers; rounding is measured against the same sums of absolute values."""
    plan = rule.plan(VP, grid_of(rule))
    n = plan.nfe
    exact: list[dict[int, Fraction]] = []
    size: list[dict[int, Fraction]] = []
    place = {r: 1 + i for i, r in enumerate(r for r, row in enumerate(plan.rows) if row.evaluates)}
    for r, row in enumerate(plan.rows):
        value, bound = ({0: Fraction(1)} if r == 0 else {} for _ in range(2))
        for k, w in row.x:
            for j, v in exact[k].items():
                value[j] = value.get(j, Fraction(0)) + Fraction(w) * v
                bound[j] = bound.get(j, Fraction(0)) + abs(Fraction(w)) * size[k][j]
        constant = [(1 + n + plan.draws, row.one)]
        for j, w in [*((place[k], w) for k, w in row.d), *((1 + n + k, w) for k, w in row.z), *constant]:
            value[j] = value.get(j, Fraction(0)) + Fraction(w)
            bound[j] = bound.get(j, Fraction(0)) + abs(Fraction(w))
        exact.append(value)
        size.append(bound)
    table = ss.plan.unroll(plan)
    whole = torch.cat([table.x[:, None], table.d, table.z, table.one[:, None]], dim=1)
    assert [*table.t] == [plan.rows[r].t for r in (*place, len(plan) - 1)]
    for i, r in enumerate((*place, len(plan) - 1)):
        for j, found in enumerate(whole[i].tolist()):
            gap = abs(Fraction(found) - exact[r].get(j, Fraction(0)))
            assert gap <= Fraction(2e-14) * size[r].get(j, Fraction(0)), (r, j)


@settings(max_examples=60)
@given(tables())
def test_matrices_give_the_states_of_a_run(plan: Plan) -> None:
    noise, seen = ss.Noise(1), []

    def watched(x: Tensor, t: Any) -> Tensor:
        seen.append((x, network(x, t)))
        return seen[-1][1]

    result = run(plan, watched, START, noise)
    table = ss.plan.unroll(plan)
    normals = [noise.normal(START.shape, k, dtype=torch.float64) for k in range(plan.draws)]
    denoised = [d for _, d in seen]
    for r, state in enumerate([*(x for x, _ in seen), result]):
        size = 1 + max(float(x.abs().max()) for x in (*(x for x, _ in seen), result))
        assert torch.allclose(table.state(r, START, denoised[:r], normals), state, rtol=0, atol=1e-12 * size)


@settings(max_examples=60)
@given(tables())
def test_amplification_is_the_move_of_the_result_by_the_worst_errors(plan: Plan) -> None:
    """By runs with a denoiser that does not look at its input, so that no error is seen by a later evaluation."""

    def result(errors: list[float]) -> float:
        given = iter(errors)
        return float(run(plan, lambda x, t: torch.full_like(x, 0.3 + next(given)), START, ss.Noise(1))[0, 0])

    n, delta = plan.nfe, 0.1
    clean = result([0.0] * n)
    signs = [1.0 if result([float(j == k) for j in range(n)]) >= clean else -1.0 for k in range(n)]
    move = result([delta * sign for sign in signs]) - clean
    assert move == pytest.approx(delta * plan.amplification, rel=1e-9, abs=1e-9 * (1 + abs(clean)))


@EACH_RULE
def test_amplification_of_a_plan_is_the_last_row_of_its_matrix(rule: ss.solvers.Solver) -> None:
    plan = rule.plan(VP, grid_of(rule))
    weights = ss.plan.unroll(plan).d[-1]
    assert plan.amplification == pytest.approx(float(weights.abs().sum()), rel=1e-12)
    assert plan.amplification >= abs(float(weights.sum()))


def test_amplification_of_a_grid_for_each_sample_is_that_of_the_worst() -> None:
    grids = [ss.grids.karras(VP, 6, t_end=0.2), ss.grids.uniform_lam(VP, 6, t_end=0.2)]
    alone = [ss.UniPC(3).plan(VP, grid).amplification for grid in grids]
    assert alone[0] != pytest.approx(alone[1], rel=1e-3)
    assert ss.UniPC(3).plan(VP, torch.stack(grids, 1)).amplification == pytest.approx(max(alone), rel=1e-12)


def test_matrices_are_differentiable_in_scalar_weights_and_refuse_those_of_samples() -> None:
    w = torch.tensor([0.25, 0.5, -1.0, 0.3, 0.7], dtype=torch.float64, requires_grad=True)

    def matrices(w: Tensor) -> tuple[Tensor, ...]:
        rows = (
            Row(1.0, evaluates=True, node=0),
            Row(0.5, x=((0, w[0]),), d=((0, w[1]),), z=((0, w[4]),), one=w[3], evaluates=True),
            Row(0.1, x=((1, w[2]), (0, 0.5)), d=((1, w[1]),), node=1),
        )
        table = ss.plan.unroll(Plan(rows))
        return table.x, table.d, table.z, table.one

    x, d, z, one = matrices(w.detach())
    assert float(x[-1]) == 0.5 + 0.25 * -1.0 and d[-1].tolist() == [-0.5, 0.5]
    assert z[-1].tolist() == [-0.7] and float(one[-1]) == -0.3
    assert torch.autograd.gradcheck(matrices, (w,))
    with pytest.raises(ValueError, match="row 0 has a number for each sample"):
        ss.plan.unroll(ss.DDIM().plan(VP, PER_SAMPLE))


def test_runs_are_differentiable_in_weights_of_all_and_of_samples() -> None:
    def result(all_of: Tensor, each: Tensor) -> Tensor:
        rows = (
            Row(1.0, evaluates=True, node=0),
            Row(0.5, x=((0, each),), d=((0, all_of),), one=each, evaluates=True),
            Row(0.1, x=((1, all_of), (0, 0.5)), d=((1, each),), z=((0, each),), node=1),
        )
        return run(Plan(rows), network, START, ss.Noise(0))

    each = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    all_of = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(result, (all_of, each))


def test_a_vector_of_ones_receives_the_constants() -> None:
    one = torch.eye(1, 5, dtype=torch.float64)
    base = replace(SMALL, rows=tuple(replace(row, one=0.0) for row in SMALL.rows))
    linear = lambda x, t: 0.5 * x  # noqa: E731
    for plan, plain in ((SMALL, base), (in_tensors(SMALL), in_tensors(base))):
        got = run(plan, linear, START, ss.Noise(0), ones=one) - run(plain, linear, START, ss.Noise(0))
        want = run(plan, linear, START, ss.Noise(0)) - run(plain, linear, START, ss.Noise(0))
        assert torch.allclose(got, want * one, atol=1e-15) and bool(want.all())
        (*_, last) = steps(plan, linear, START, ss.Noise(0), ones=one)
        assert torch.equal(last.x, run(plan, linear, START, ss.Noise(0), ones=one))
    alone = Plan((Row(1.0), Row(0.5, z=((0, 2.0),), one=3.0)))
    assert torch.allclose(run(alone, linear, START, ss.Noise(0), ones=one),
                          3 * one + 2 * ss.Noise(0).like(START, 0))  # fmt: skip


# Its updates.


@settings(max_examples=40)
@given(tables())
def test_updates_are_the_rows_of_a_run_before_and_after_noise(plan: Plan) -> None:
    noise = ss.Noise(1)
    states = literally(plan, START, noise)
    size = 1 + max(np.abs(x).max() for x in states)
    seen = []
    for update in updates(plan, network, START, noise):
        added = sum(
            (w * noise.normal(START.shape, k, dtype=torch.float64) for k, w in update.draws), torch.zeros_like(START)
        )
        assert torch.allclose(update.mean + added, update.x, rtol=0, atol=1e-12 * size)
        assert np.abs(update.x.numpy() - states[update.row]).max() < 1e-12 * size
        seen.append(update.row)
    assert seen == list(range(1, len(plan)))
    for a, b in zip(
        updates(plan, network, START, noise), updates(in_tensors(plan), network, START, noise), strict=True
    ):
        assert torch.allclose(a.x, b.x, atol=1e-12 * size) and torch.allclose(a.mean, b.mean, atol=1e-12 * size)


def test_a_run_continues_from_the_state_that_is_put_in_place() -> None:
    plan = Multistep(2, eta=0.5).plan(VP, ss.grids.karras(VP, 5))
    want = [ss.Noise(k).normal(START.shape, 0, dtype=torch.float64) for k in range(len(plan))]
    asked: list[Tensor] = []

    def net(x: Tensor, t: Any) -> Tensor:
        asked.append(x)
        return network(x, t)

    for update in updates(plan, net, START):
        assert update.x is update.mean, "without a source of normals the mean is the state"
        update.x = want[update.row]
    assert all(x is y for x, y in zip(asked[1:], want[1:], strict=False))
    last = plan.rows[-1]
    terms = [w * network(want[k] if k else START, plan.rows[k].t) for k, w in last.d] + [w * want[k] for k, w in last.x]
    assert torch.allclose(update.mean, sum(terms, torch.zeros_like(START)), rtol=1e-12)


@EACH_RULE
def test_updates_free_states_as_a_run_does(rule: ss.solvers.Solver) -> None:
    plan = rule.plan(VP, grid_of(rule, 30))
    at_network = []

    def net(x: Tensor, t: Any) -> Tensor:
        at_network.append(len(counter.seen))
        return x * 0.5

    x = torch.ones(2, 7, dtype=torch.float64)
    with Alive((2, 7)) as counter:
        for update in updates(plan, net, x, ss.Noise(0)):
            del update
    assert max(at_network) <= plan.memory


def test_updates_read_no_tensor_back_to_the_host() -> None:
    x = torch.empty(3, 2, 4, device="meta")
    for times in (ss.grids.karras(VP, 6), PER_SAMPLE):
        plan = Multistep(2, NOISE, eta=1.0).plan(VP, times)
        passed = [update.x for update in updates(plan, lambda x, t: x * 0.5, x, ss.Noise(0))]
        assert len(passed) == len(plan) - 1 and all(y.device.type == "meta" for y in passed)


# In a notebook, and where it came from.


def test_a_notebook_shows_the_printed_table() -> None:
    page = replace(SMALL, name="a < b", meta={"from": "UniPC & co"})._repr_html_()
    assert "<b>a &lt; b: 3 evaluations, 4 rows, order 2, 1 draws</b>" in page and "from: UniPC &amp; co" in page
    assert page.count("<tr>") == 1 + len(SMALL) and "<details>" not in page
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page)
    rows = [cells[i : i + 8] for i in range(0, len(cells), 8)]
    assert rows[2] == ["2", "0.5", "eval", "0:+0.5 1:-1", "", "0:+1e-05", "+0.25", "node 1"]
    assert rows[3] == ["3", "0", "", "", "2:+1.5 0:-0.5", "", "", "node 2"]
    long = ss.DDIM().plan(VP, ss.grids.karras(VP, 40))._repr_html_()
    assert long.startswith("<details><summary>") and long.count("<tr>") == 42
    assert "2 values" in ss.DDIM().plan(VP, PER_SAMPLE[:, :2])._repr_html_()


def test_a_plan_remembers_where_it_came_from() -> None:
    plan = replace(ss.UniPC(2).plan(VP, [1.0, 0.6, 0.3]), meta={"from": "a fit"})
    assert plan.folded().meta == {"from": "a fit"} and ss.plan.unroll(plan).plan(plan).meta == {"from": "a fit"}
    other = ss.UniPC(2).plan(VP, [0.3, 0.1])
    assert (
        plan.join(other).meta == {"joined": [{"from": "a fit"}, {}]}
        and other.join(Plan((Row(0.1),), sde=other.sde)).meta == {}
    )
    assert Plan.from_dict(plan.join(other).to_dict()).meta == plan.join(other).meta
