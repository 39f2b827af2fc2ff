"""Brownian paths: their law, their additivity, that nothing but the seed decides them, and strong convergence."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import scoresde as ss
from scoresde.noise.brownian import BrownianPath, PathNoise, Span, _nodes, _placed, _weights, depth_for
from scoresde.noise.keyed import Noise
from scoresde.plan.run import run
from scoresde.solvers.ancestral import Ancestral
from scoresde.solvers.interpolants import DATA, NOISE
from scoresde.solvers.multistep import Multistep
from scoresde.solvers.rule import Solver
from scoresde.solvers.tape import Tape

F64 = torch.float64
N = 5_000


def path(n: int = N, event: tuple[int, ...] = (3,), dtype: torch.dtype = F64, **key: int) -> BrownianPath:
    return BrownianPath(Noise(0, **key), (n, *event), dtype=dtype)


# Within a cell [16^k, 16^(k+1)], across its ends, at 0, at and across the anchor 1, very small, very large, before 0.
STRETCHES = [(0, 1), (0.2, 0.5), (0.5, 3), (1e-9, 1e-8), (5, 1e12), (0.99, 1.0001), (-1, 2), (-3, -2), (15.9, 16.1)]


@pytest.mark.parametrize(("s", "t"), STRETCHES)
def test_increments_are_standard_normal(s: float, t: float) -> None:
    z = path().normal(s, t).flatten()
    se = len(z) ** -0.5
    assert abs(z.mean()) < 4 * se and abs(z.var() - 1) < 4 * 2**0.5 * se
    assert abs((z**4).mean() - 3) < 4 * 96**0.5 * se
    ordered, at = z.sort().values, (torch.arange(len(z), dtype=F64) + 0.5) / len(z)
    assert (torch.special.ndtr(ordered) - at).abs().max() < 1.95 * se, "Kolmogorov–Smirnov, 0.1 %"


def test_increments_of_stretches_apart_are_independent_and_others_share_what_they_share() -> None:
    W, se = path(), (3 * N) ** -0.5
    apart = [W.normal(a, b) for a, b in [(-2, -1), (0, 0.25), (0.25, 0.3), (0.3, 1), (1, 1.7), (1.7, 90)]]
    for y, z in itertools.combinations(apart, 2):
        assert abs((y * z).mean()) < 4.5 * se
    z = apart[1]
    assert abs((z[:, 0] * z[:, 1]).mean()) < 4 * N**-0.5, "numbers of a state"
    assert abs((z[1:] * z[:-1]).mean()) < 4 * se, "samples"
    shared = (W(0.1, 0.6) * W(0.4, 0.9)).mean()
    assert abs(shared - 0.2) < 4 * 0.55 * se


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 2e-6), (F64, 4e-15)], ids=["float32", "float64"])
@given(data=st.data())
@settings(max_examples=20)
def test_increments_add_up_whatever_was_asked_before(dtype: torch.dtype, tol: float, data: st.DataObject) -> None:
    time = st.floats(-50, 5000).map(lambda t: round(t, 3))
    a, b, c = sorted(data.draw(st.lists(time, min_size=3, max_size=3, unique=True)))
    W, other = path(4, dtype=dtype), path(4, dtype=dtype)
    whole = W(a, c)
    other(c, a), other(b, c)
    size = math.sqrt(abs(a) + abs(b) + abs(c) + 1)
    assert (W(a, b) + W(b, c) - whole).abs().max() < tol * size
    assert torch.equal(other(a, c), whole) and torch.equal(W(c, a), -whole)


@pytest.mark.parametrize("event", [(), (1,), (5,), (3, 7), (40, 60)], ids=str)
def test_a_sample_has_its_path_in_any_batch(event: tuple[int, ...]) -> None:
    whole = path(64, event).normal(0.3, 2.0)
    for first, n in ((0, 1), (13, 7), (63, 1)):
        part = path(n, event, offset=first).normal(0.3, 2.0)
        assert torch.equal(part, whole[first : first + n])
    seeds = BrownianPath(Noise([5, 6]), (2, *event), dtype=F64)
    assert torch.equal(seeds(0, 1)[1:], BrownianPath(Noise([6]), (1, *event), dtype=F64)(0, 1))


def test_each_sample_may_have_its_own_times() -> None:
    s = torch.tensor([0.1, 0.0, 20.0, -3.0, 1.0, 0.2], dtype=F64)
    t = torch.tensor([0.2, 5.0, 1.0, 3.0, 16.0, 0.2001], dtype=F64)
    W = path(6)
    for i, (a, b) in enumerate(zip(s.tolist(), t.tolist(), strict=True)):
        assert torch.allclose(W(s, t)[i], path(6)(a, b)[i], rtol=0, atol=1e-14)
    assert torch.allclose(W.between(s, t, W.unit(s), W.unit(t)), W.normal(s, t), rtol=0, atol=0)


def test_float32_is_float64_rounded() -> None:
    for s, t in STRETCHES:
        short = 1 + (abs(s) / abs(t - s)) ** 0.5
        gap = path(50, dtype=torch.float32).normal(s, t) - path(50).normal(s, t)
        assert gap.abs().max() < 2e-6 * short, (s, t)


def test_a_stretch_of_no_length_is_refused() -> None:
    with pytest.raises(ValueError, match="in one leaf of this path"):
        path(2).normal(1.0, 1.0 + 1e-12)
    with pytest.raises(ValueError, match="sample 1"):
        path(2).normal(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 2.0]))
    with pytest.raises(ValueError, match="between 1e-240 and 1e240"):
        path(2).normal(1.0, 1e250)


# In plans.

MIX = ss.GaussianMixture(ss.VP(), [[-1.0, 0.3], [1.0, 0.0]], std=0.5)


def spans(plan: ss.Plan) -> list[Span]:
    return [span for span in plan.spans if span is not None]


def test_a_leg_of_data_prediction_is_the_increment_in_its_clock() -> None:
    eta = 0.7
    grid = ss.grids.karras(MIX.sde, 6, t_end=0.01)
    plan = Multistep(1, eta=eta).plan(MIX.sde, grid)
    clock = (2 * eta**2 * MIX.sde.lam(grid)).exp()
    assert [s.start for s in spans(plan)] == pytest.approx(clock[:-1].tolist(), rel=1e-13)
    assert [s.end for s in spans(plan)] == pytest.approx(clock[1:].tolist(), rel=1e-13)
    for row, span in zip(plan.rows[1:], plan.spans, strict=True):
        assert span is not None
        sigma, lam = MIX.sde.sigma(row.t), MIX.sde.lam(row.t)
        std = sigma * math.exp(-(eta**2) * lam) * math.sqrt(span.end - span.start)
        assert row.z[0][1] == pytest.approx(std, rel=1e-12)


EXACT = {  # rules that are exact where D is constant: only the noise of their legs could differ
    "data": Multistep(1, eta=1.0),
    "data, eta=0.4": Multistep(1, eta=0.4),
    "DDPM": ss.DDPM(),
    "EulerAncestral": ss.solvers.EulerAncestral(),
    "Ancestral": Ancestral(ss.DDIM()),
    "ERSDE": ss.solvers.ERSDE(1),
}


@pytest.mark.parametrize("rule", EXACT.values(), ids=EXACT)
def test_where_the_data_is_one_point_the_end_does_not_depend_on_the_number_of_steps(rule: Solver) -> None:
    sde, ends = ss.VP(), []
    for n in (1, 2, 7, 50):
        plan = rule.plan(sde, ss.grids.karras(sde, n, t_end=0.05))
        ends.append(run(plan, lambda x, t: torch.zeros_like(x), torch.ones(4, 2, dtype=F64), Noise(3, path=True)))
    assert ends[0].std() > 0.1 * sde.sigma(0.05)
    for end in ends[1:]:
        assert (end - ends[0]).abs().max() < 1e-12


def test_where_the_noise_is_0_the_end_does_not_depend_on_the_number_of_steps() -> None:
    sde, ends = ss.VP(), []
    for n in (1, 2, 7, 50):
        plan = Multistep(1, NOISE, eta=1.0).plan(sde, ss.grids.karras(sde, n, t_end=0.05))
        ends.append(
            run(plan, lambda x, t: x / sde.alpha(t), torch.ones(4, 2, dtype=F64), Noise(3, path=True))  # ε = 0
        )
    for end in ends[1:]:
        assert (end - ends[0]).abs().max() < 1e-11 * ends[0].abs().max()


def test_normals_of_stages_are_parts_of_the_leg() -> None:
    tape = Tape(MIX.sde, 0.8)
    a = tape.move(0, 0.6, [0], eta=1.0)
    first = 0
    tape.move(0, 0.4, [a, 0], eta=1.0, noise=[(first, 0.6), (tape.draw(), 0.8)])
    tape.move(0, 0.4, [a, 0], eta=1.0, noise=[(first, 0.6), (1, 0.8)], evaluates=False)
    one, two = spans(tape.plan())
    assert (one.end, one.path, one.lap) == (two.start, two.path, two.lap)
    assert two.end == pytest.approx(math.exp(2 * MIX.sde.lam(0.4)))


def test_a_stretch_that_is_solved_again_has_noise_of_its_own() -> None:
    grid = [0.9, 0.6, 0.3, 0.6, 0.3, 0.01]
    plan = Multistep(1, eta=1.0).plan(MIX.sde, ss.grids.zigzag(grid))
    assert [None if s is None else s.lap for s in plan.spans] == [0, 0, None, 1, 1]
    again = PathNoise(Noise(0, path=True), plan.spans)
    x = torch.zeros(N, 1, dtype=F64)
    assert abs((again.like(x, 1) * again.like(x, 3)).mean()) < 4 * N**-0.5
    assert torch.equal(again.like(x, 2), Noise(0).like(x, 2)), "what is forward noise is fresh"


def test_plans_keep_their_spans() -> None:
    rule = Multistep(2, eta=1.0)
    plan = rule.plan(MIX.sde, ss.grids.karras(MIX.sde, 5))
    assert ss.Plan.from_dict(plan.to_dict()) == plan and spans(plan)
    first, then = (rule.plan(MIX.sde, torch.tensor(t, dtype=F64)) for t in ([1, 0.7, 0.5], [0.5, 0.3, 0.1]))
    joint = first.join(then)
    assert joint.spans == rule.plan(MIX.sde, torch.tensor([1, 0.7, 0.5, 0.3, 0.1], dtype=F64)).spans
    assert "spans" not in ss.DDIM().plan(MIX.sde, ss.grids.karras(MIX.sde, 5)).to_dict()


def test_sampling_on_a_path() -> None:
    rule, seed = Multistep(2, eta=1.0), ss.Noise(0, path=True)
    x = ss.sample(MIX, (7, 2), rule, steps=8, seed=seed)
    assert torch.equal(x, ss.sample(MIX, (7, 2), rule, steps=8, seed=ss.Noise(0, path=True)))
    part = ss.sample(MIX, (2, 2), rule, steps=8, seed=ss.Noise(0, offset=5, path=True))
    assert torch.allclose(part, x[5:], rtol=0, atol=1e-6)
    assert torch.equal(
        ss.sample(MIX, (7, 2), ss.DDIM(), steps=8, seed=seed), ss.sample(MIX, (7, 2), ss.DDIM(), steps=8, seed=0)
    )
    by_sample = torch.stack([ss.grids.uniform_lam(MIX.sde, 4, t_end=t) for t in (0.01, 0.02)], 1)
    both = ss.sample(MIX, x[:2], rule.plan(MIX.sde, by_sample), seed=seed)
    one = ss.sample(MIX, x[:2], rule.plan(MIX.sde, by_sample[:, 1]), seed=seed)
    assert torch.allclose(both[1], one[1], atol=1e-5)
    tape = Tape(MIX.sde, 1.0)
    tape.append(0.5, x=[(0, 1.0)], z=[(tape.draw(), 1.0)])
    by_hand = tape.plan()
    with pytest.raises(ValueError, match="no step of this plan uses a Brownian path"):
        run(by_hand, MIX.x0, torch.zeros(1, 2), seed)


ADDITIVE = [
    *(Multistep(order, prediction, eta=1.0) for order in (1, 2) for prediction in (DATA, NOISE)),
    *(rule(clock=clock) for rule in (ss.EulerMaruyama, ss.solvers.StochasticHeun) for clock in ("t", "lam")),
    ss.solvers.ReverseDiffusion(),
    ss.DDPM(),
    ss.solvers.EulerAncestral(0.7),
    ss.solvers.DPM2Ancestral(),
    *(ss.solvers.ERSDE(order) for order in (1, 2, 3)),
    ss.solvers.SASolver(),
]


# Theory: with additive noise and Brownian increments alone, strong order 1, whatever is interpolated.
@pytest.mark.parametrize("rule", ADDITIVE, ids=lambda rule: rule.name)
def test_strong_order_on_one_path(rule: Solver) -> None:
    noise, sde = Noise(1, path=True), MIX.sde
    x = noise.normal((128, 2), 0, dtype=F64)

    def end(legs: int) -> Tensor:
        lam = torch.linspace(-3, 2, legs + 1, dtype=F64)
        return run(rule.plan(sde, sde.t_of_lam(lam)), MIX.x0, x, noise)

    legs, fine = [8, 16, 32, 64], end(384)
    errors = [(end(n) - fine).square().sum(1).mean().sqrt().log2() for n in legs]
    slope = float(errors[0] - errors[-1]) / 3
    assert abs(slope - 1) < 0.2, (slope, errors)


@pytest.mark.parametrize("maker", [lambda f: Multistep(2, eta=f), ss.DDIM, ss.EulerMaruyama], ids=["2M", "DDIM", "EM"])
def test_runs_approach_each_other_where_the_stochasticity_varies(maker: Any) -> None:
    noise, sde, rule = Noise(1, path=True), MIX.sde, maker(lambda t: 0.5 + 0.5 * t)
    x = noise.normal((64, 2), 0, dtype=F64)
    ends = [
        run(rule.plan(sde, sde.t_of_lam(torch.linspace(-3, 2, n + 1, dtype=F64))), MIX.x0, x, noise)
        for n in (16, 64, 256)
    ]
    errors = [float((end - ends[-1]).square().mean().sqrt()) for end in ends]
    assert errors[1] < errors[0] / 2.5 and errors[1] < 0.06, errors


def test_rules_of_one_sde_end_on_one_path() -> None:
    noise, sde = Noise(1, path=True), MIX.sde
    x = noise.normal((64, 2), 0, dtype=F64)
    times = sde.t_of_lam(torch.linspace(-3, 2, 257, dtype=F64))
    ends = [run(rule.plan(sde, times), MIX.x0, x, noise) for rule in (Multistep(2, eta=1.0), ss.DDPM())]
    assert (ends[0] - ends[1]).square().mean().sqrt() < 0.02


# Trees of normals.


def covariance(times: list[float], depth: int) -> Tensor:
    """Of W(t)/√t at times in [1, 16), from the weights of all normals that they read."""
    t = torch.tensor(times, dtype=F64)
    place = _placed(t)
    left, right, heights = _weights(place.u, depth)
    tents = torch.zeros(len(t), 2 ** (depth + 1), dtype=F64)
    for level, nodes in enumerate(_nodes(place.u, depth)):
        tents[torch.arange(len(t)), nodes] += heights[level]
    ends = torch.cat((left, right)).T
    return ends @ torch.tensor([[1, 0.25], [0.25, 1]], dtype=F64) @ ends.T + tents @ tents.T


@given(times=st.lists(st.floats(1, 15.99), min_size=2, max_size=6), depth=st.integers(0, 9))
def test_times_in_leaves_of_their_own_have_the_law_of_brownian_motion(times: list[float], depth: int) -> None:
    leaves = _placed(torch.tensor(times, dtype=F64)).leaf(depth).tolist()
    apart = [t for i, t in enumerate(times) if leaves[i] not in leaves[:i]]
    t = torch.tensor(apart, dtype=F64)
    exact = torch.minimum(t[:, None], t) / (t[:, None] * t).sqrt()
    assert (covariance(apart, depth) - exact).abs().max() < 1e-9


def test_paths_of_all_depths_agree_at_the_ends_of_their_leaves() -> None:
    deep, flat = (BrownianPath(Noise(0), (3, 2), dtype=F64, depth=depth) for depth in (31, 4))
    for k in range(-20, 40):
        t = 16.0 ** (k / 2**4)
        assert torch.allclose(flat.unit(t), deep.unit(t), rtol=0, atol=1e-6), "deep down a tent is √ of a rounding high"
    assert not torch.allclose(flat.unit(1.1), deep.unit(1.1))
    with pytest.raises(ValueError, match="deeper than `depth`=4"):
        flat(1.0, 1.1)
    with pytest.raises(ValueError, match=r"`depth` must lie in \[0, 31\], got 32"):
        BrownianPath(Noise(0), (1,), depth=32)


def test_a_leg_on_a_path_costs_a_dozen_normals(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def counted(self: Noise, shape: Any, draws: Tensor, **how: Any) -> Tensor:
        drawn.append(len(draws))
        return normals(self, shape, draws, **how)

    normals = Noise.normals
    monkeypatch.setattr(Noise, "normals", counted)
    sde = ss.VP()
    for legs, most in ((20, 18), (100, 12), (1000, 9)):
        drawn.clear()
        plan = Multistep(1, eta=1.0).plan(sde, ss.grids.uniform_lam(sde, legs, t_end=1e-3))
        run(plan, lambda x, t: x, torch.zeros(1, 2), Noise(0, path=True))
        assert sum(drawn) < most * legs, (legs, sum(drawn) / legs)


def test_plans_of_close_times_get_deeper_paths() -> None:
    assert depth_for(torch.tensor([1.0, 2.0, 3.0], dtype=F64)) == 12
    close = torch.tensor([1.0, 2.0, 2.0 * (1 + 1e-5), 2.0 * (1 + 1e-5)], dtype=F64)
    assert 17 <= depth_for(close) <= 19
    leaves = _placed(close).leaf(depth_for(close)).tolist()
    assert len(set(leaves)) == 3
