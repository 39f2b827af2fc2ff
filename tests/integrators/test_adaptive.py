"""Error control: what a sample becomes and costs is its own affair, and errors follow the tolerance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from per_sample import MODELS, X
from torch import Tensor

import scoresde as ss
from scoresde import integrators
from scoresde.integrators.adaptive import Adaptive, flow
from scoresde.integrators.dense import Path
from scoresde.integrators.embedded import Parts, Past, polynomial
from scoresde.integrators.loop import integrate
from scoresde.solvers.interpolants import DATA, LAM, NOISE, TAU, VELOCITY, V
from scoresde.solvers.quadrature import weights

PAIRS = {
    "Adams": integrators.Adams(),
    "Adams 2": integrators.Adams(2),
    "Adams in the angle": integrators.Adams(3, prediction=V),
    "UniPC": integrators.Adams(3, prediction=DATA, clock="lam"),
    "Bogacki-Shampine": integrators.BogackiShampine(),
    "Dormand-Prince": integrators.DormandPrince(),
    "DPM-Solver-12": integrators.DPM12(),
    "DPM-Solver-23": integrators.DPM23(),
    "DPM-Solver++-23": integrators.DPM23(DATA),
}
PROCESSES = {"VP": ss.VP(), "VE": ss.VE(), "EDM": ss.EDM(), "Flow": ss.Flow(), "Cosine": ss.Cosine()}


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def ring(sde: ss.SDE, std: float = 0.1) -> ss.GaussianMixture:
    angle = torch.arange(8) * math.pi / 4
    return ss.GaussianMixture(sde, 2 * torch.stack([angle.cos(), angle.sin()], 1), std=std)


def gaussian(sde: ss.SDE) -> ss.GaussianMixture:
    return ss.GaussianMixture(sde, torch.tensor([[0.5, -1.0]]), std=torch.tensor([[0.6, 0.2]]))


def noise(sde: ss.SDE, n: int = 8, seed: int = 3) -> Tensor:
    return sde.prior().sample((n, 2), ss.Noise(seed), dtype=torch.float64)


def tight(model: ss.GaussianMixture, x: Tensor, s: float, t: float) -> Tensor:
    return flow(model, x, s, t, Adaptive(integrators.Adams(), 1e-9, 1e-9)).x


def distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).flatten(1).square().mean(1).sqrt()


# Right, and in proportion to the tolerance.


@pytest.mark.parametrize("name", PROCESSES)
def test_the_flow_of_a_gaussian_is_followed_on_every_process(name: str) -> None:
    sde = PROCESSES[name]
    model = gaussian(sde)
    x = noise(sde, 4)
    start = 0.999 * sde.T if sde.alpha(sde.T) == 0 else sde.T
    truth = model.flow(x, start, sde.t_min)
    for kind, pair in PAIRS.items():
        found = flow(model, x, start, sde.t_min, Adaptive(pair, 1e-4, 1e-4))
        error = float(distance(found.x, truth).max())
        assert error < 30 * 1e-4, (kind, error)


@pytest.mark.parametrize("kind", ["Adams", "Dormand-Prince", "Bogacki-Shampine", "DPM-Solver-23"])
def test_the_error_falls_with_the_tolerance(kind: str) -> None:
    sde = ss.VP()
    model, x = ring(sde), noise(sde, 32)
    truth = tight(model, x, sde.T, sde.t_min)
    tols = (1e-3, 1e-4, 1e-5)
    runs = [flow(model, x, sde.T, sde.t_min, Adaptive(PAIRS[kind], tol, tol, max_nfe=5000)) for tol in tols]
    errors = [float(distance(run.x, truth).median()) for run in runs]
    slope = torch.tensor(errors).log10().diff().mean()
    assert -1.35 < slope < -0.7, errors
    assert errors[0] < 5e-3 and errors[-1] < 3e-5, errors


def test_down_to_data_the_slope_is_extrapolated() -> None:
    for sde in (ss.VP(), ss.VE()):
        model, x = ring(sde), noise(sde, 16)
        late = tight(model, x, sde.T, sde.t_min)
        truth = flow(model, late, sde.t_min, 1e-3 * sde.t_min, Adaptive(rtol=1e-7, atol=1e-7)).x
        found = ss.solve(model, x, Adaptive(rtol=1e-6, atol=1e-6))
        denoised = distance(model.x0(late, sde.t_min), truth).median()
        error = distance(found.x, truth).median()
        assert error < 2e-5 and error < denoised, type(sde).__name__


@pytest.mark.parametrize(
    ("pair", "order"),
    [
        (integrators.Adams(2), 3),
        (integrators.Adams(3), 4),
        (integrators.Adams(4), 5),
        (integrators.BogackiShampine(), 3),
        (integrators.DormandPrince(), 5),
        (integrators.DPM12(), 2),
        (integrators.DPM23(), 3),
        (integrators.DPM23(DATA), 3),
    ],
)
def test_pairs_have_the_orders_they_declare(pair: integrators.Pair, order: int) -> None:
    """One step from exact slopes: its error is as h^{order + 1}, its estimate one less."""
    assert pair.order == order
    sde = ss.VP()
    model, x = ring(sde, std=0.3), noise(sde, 16)
    frame = integrators.Frame(sde, pair.prediction, pair.in_lam)
    first = frame.u(torch.tensor([0.35], dtype=torch.float64))
    rule = Adaptive(integrators.Adams(), 1e-11, 1e-11)
    at = tight(model, x, sde.T, 0.35)

    def slopes(u: Tensor, y: Parts) -> Parts:
        point = frame.point(u[:1])
        t, N = float(point.t), frame.prediction.scale(point.alpha, point.sigma)
        p, q = frame.prediction.p(point.alpha, point.sigma), frame.prediction.q(point.alpha, point.sigma)
        return (p * N * y[0] + q * model.x0(N * y[0], t),)

    errors, estimates = [], []
    sizes = (0.4, 0.2) if pair.in_lam else (0.02, 0.01) if pair.memory > 1 else (0.08, 0.04)
    for h in sizes:
        direction = 1.0 if pair.in_lam else -1.0
        us = [first - direction * j * h for j in range(max(pair.memory, 2))]
        states = [flow(model, at, 0.35, float(frame.t(u)), rule).x if j else at for j, u in enumerate(us)]
        ys = [v / frame.scale(u) for u, v in zip(us, states, strict=True)]
        wide = [u.expand(len(x)) for u in us]
        past = Past(wide, [slopes(u, (y,)) for u, y in zip(wide, ys, strict=True)], torch.full((len(x),), len(us)))
        end = first + direction * h
        step = pair.attempt(slopes, frame.weigh, wide[0], end.expand(len(x)), (ys[0],), past)
        truth = flow(model, at, 0.35, float(frame.t(end)), rule).x / frame.scale(end)
        errors.append(float(distance(step.y[0], truth).median()))
        estimates.append(float(step.error.square().mean(1).sqrt().median()))
    measured = math.log2(errors[0] / errors[1])
    assert order + 0.5 < measured < order + 1.8, (measured, errors)
    assert estimates[0] > errors[0], "the estimate is of the lower one"
    assert float(torch.as_tensor(step.power).reshape(-1)[0]) - 0.5 < math.log2(estimates[0] / estimates[1])


def test_weights_are_those_of_the_one_formula() -> None:
    """Polynomials in the own clock and the quadrature against the kernel in λ are two ways to one number."""
    generator = torch.Generator().manual_seed(0)
    for sde in (ss.VP(), ss.EDM()):
        frame = integrators.Frame(sde, VELOCITY)
        u = (0.2 + 0.1 * torch.rand(5, 6, generator=generator, dtype=torch.float64)).cumsum(0).flip(0) / 2
        s, t, nodes = u[1], u[0], u[[0, 1, 2, 3]]
        a, b, at = frame.point(s)[None], frame.point(t)[None], frame.point(nodes)[None]
        W = weights(VELOCITY, TAU, 0.0, a, b, at, sde.inverse_lam)[0] / VELOCITY.scale(b.alpha, b.sigma)
        torch.testing.assert_close(frame.weigh(s, t, nodes), W, rtol=1e-11, atol=1e-13)
        for prediction in (DATA, NOISE, VELOCITY, V):
            own, lam = integrators.Frame(sde, prediction), integrators.Frame(sde, prediction, in_lam=True)
            at_lam = [frame.point(v).lam for v in (s, t)]
            c = [prediction.clock(v) for v in at_lam]
            torch.testing.assert_close(
                own.weigh(c[0], c[1], c[0][None]), lam.weigh(*at_lam, at_lam[0][None]), rtol=1e-11, atol=1e-13
            )
    assert LAM.infinite


def test_steps_of_one_size_are_the_adams_of_the_books() -> None:
    u = torch.tensor([[1.0], [0.0], [-1.0], [-2.0]], dtype=torch.float64)
    ab3 = polynomial(u[1], u[0], u[1:])[:, 0]
    torch.testing.assert_close(ab3 * 12, torch.tensor([23.0, -16.0, 5.0], dtype=torch.float64))
    am4 = polynomial(u[1], u[0], u)[:, 0]
    torch.testing.assert_close(am4 * 24, torch.tensor([9.0, 19.0, -5.0, 1.0], dtype=torch.float64))


# Every sample for itself.


@pytest.mark.parametrize("kind", ["Adams", "Dormand-Prince", "DPM-Solver-23"])
def test_a_hard_sample_is_itself_in_any_batch_and_costs_the_others_nothing(kind: str) -> None:
    sde = ss.VP()
    model = ring(sde, std=0.02)
    x = noise(sde, 256)
    angle = torch.tensor(math.pi / 8, dtype=torch.float64)
    x[17] = 1.5 * torch.stack([angle.cos(), angle.sin()]) + 1e-4  # falls between two modes
    rule = Adaptive(PAIRS[kind], 1e-4, 1e-4)
    batch = flow(model, x, sde.T, sde.t_min, rule)
    alone = flow(model, x[17:18], sde.T, sde.t_min, rule)
    others = flow(model, torch.cat([x[:17], x[18:]]), sde.T, sde.t_min, rule)
    assert float(distance(batch.x[17:18], alone.x)) < 1e-12
    keep = torch.arange(256) != 17
    assert float(distance(batch.x[keep], others.x).max()) < 1e-12
    assert torch.equal(batch.stats.nfe[keep], others.stats.nfe)
    assert batch.stats.nfe[17] == alone.stats.nfe[0] > batch.stats.nfe.median()


def test_calls_and_evaluations_are_counted() -> None:
    sde = ss.VP()
    mix = ring(sde)
    seen: list[int] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        seen.append(len(x))
        return mix.x0(x, t.double())

    model = ss.Denoiser(net, sde, predicts="x0")
    for pair in (integrators.Adams(), integrators.DPM23(), integrators.BogackiShampine()):
        seen.clear()
        found = ss.solve(model, noise(sde, 16), Adaptive(pair, 1e-3, 1e-3))
        assert found.calls == len(seen) and int(found.stats.nfe.sum()) == sum(seen)
        assert found.nfe == math.ceil(sum(seen) / 16)
        assert len(set(seen)) > 3, "samples leave as they finish"
        steps, rejected = found.stats.steps, found.stats.rejected
        if isinstance(pair, integrators.Adams):
            assert torch.equal(found.stats.nfe, 2 + steps + rejected), "one a step, two to start"
        assert bool(found.stats.finished.all())


def test_conditions_leave_with_their_samples() -> None:
    sde = ss.VP()
    mix = ring(sde)

    def net(x: Tensor, t: Tensor, shift: Tensor, both: Tensor) -> Tensor:
        assert len(shift) == len(x) and both.shape == (1, 2)
        return mix.x0(x - shift, t.double()) + both

    model = ss.Denoiser(net, sde, predicts="x0")
    shift = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]
    x = noise(sde, 6)
    both = torch.zeros(1, 2, dtype=torch.float64)
    whole = ss.solve(model.given(shift=shift, shared={"both": both}), x, Adaptive())
    assert len(set(whole.stats.nfe.tolist())) > 1
    for i in range(6):
        one = ss.solve(model.given(shift=shift[i : i + 1], shared={"both": both}), x[i : i + 1], Adaptive())
        assert float(distance(one.x, whole.x[i : i + 1])) < 1e-9


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["Adams", "DPM-Solver-23"])
def test_data_of_each_sample_follow_it(kind: str, name: str) -> None:
    rule = Adaptive(PAIRS[kind], 1e-4, 1e-4)
    whole = ss.solve(MODELS[name](slice(None)), X, rule)
    assert whole.stats is not None and len(set(whole.stats.nfe.tolist())) > 1
    for i in range(len(X)):
        one = ss.solve(MODELS[name](slice(i, i + 1)), X[i : i + 1], rule)
        assert float(distance(one.x, whole.x[i : i + 1])) < 1e-12
        assert one.stats is not None and one.stats.nfe[0] == whole.stats.nfe[i]


def test_chunks_and_ranks_make_no_difference() -> None:
    """Each half by itself is the whole; the halves make different numbers of calls, which is why wrappers that
    wait for other ranks are refused."""
    sde = ss.EDM()
    model = ring(sde)
    rule, start = Adaptive(rtol=1e-4, atol=1e-4), ss.Start(dtype=torch.float64)
    whole = ss.solve(model, (8, 2), rule, seed=5, start=start)
    halves = [ss.solve(model, (4, 2), rule, seed=ss.Noise(5, offset=4 * r), start=start) for r in range(2)]
    assert float(distance(torch.cat([half.x for half in halves]), whole.x).max()) < 1e-12
    assert halves[0].calls != halves[1].calls


def test_a_wrapper_that_waits_for_other_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Waits(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x

    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", Waits)
    model = ss.Denoiser(Waits(), ss.VP(), predicts="x0")
    ss.sample(model, (2, 2), Adaptive(), seed=0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"net\.module"):
        ss.sample(model, (2, 2), Adaptive(), seed=0)


# Both ways, at any time, in any dtype.


@pytest.mark.parametrize("name", PROCESSES)
def test_decode_takes_encode_back(name: str) -> None:
    sde = PROCESSES[name]
    model = ring(sde, std=0.3)
    x = model.sample(4, seed=1)
    gaps = []
    for tol in (1e-4, 1e-6):
        rule = Adaptive(rtol=tol, atol=tol)
        gaps.append(float(distance(ss.decode(model, ss.encode(model, x, rule), rule), x).median()))
    assert gaps[0] < 2e-3 and gaps[1] < 2e-5, gaps


@cache
def on_the_way() -> tuple[list[float], list[Tensor]]:
    """Times, and the flow at each of them, leg by leg."""
    sde = ss.VP()
    model, times = ring(sde, std=0.3), torch.linspace(0.95, 0.02, 9).tolist()
    truth = [noise(sde, 16)]
    for s, t in zip([1.0, *times], times, strict=False):
        truth.append(tight(model, truth[-1], s, t))
    return times, truth[1:]


@pytest.mark.parametrize("kind", ["Adams", "Adams 2", "Dormand-Prince", "Bogacki-Shampine", "DPM-Solver-23", "UniPC"])
def test_between_steps_the_solution_is_as_good_as_at_them(kind: str) -> None:
    sde = ss.VP()
    model, x = ring(sde, std=0.3), noise(sde, 16)
    times, truth = on_the_way()
    worst = []
    for tol in (1e-3, 1e-5):
        found = flow(model, x, sde.T, sde.t_min, Adaptive(PAIRS[kind], tol, tol, dense=True))
        assert found.path is not None
        worst.append(max(float(distance(found.path(t), y).median()) for t, y in zip(times, truth, strict=True)))
        assert float(distance(found.path(sde.T), x).max()) < 1e-12
        assert float(distance(found.path(sde.t_min), found.x).max()) < 1e-12
        per_sample = found.path(torch.linspace(0.1, 0.9, 16, dtype=torch.float64))
        assert float(distance(per_sample[3:4], found.path(0.1 + 0.8 * 3 / 15)[3:4])) < 1e-12
    assert worst[0] < 10e-3 and worst[1] < (30e-5 if kind == "Dormand-Prince" else 10e-5), worst


def test_dense_output_has_its_order() -> None:
    """On y' = cos, halving the steps divides the error between nodes by 2⁴ with two nodes and by 2⁶ with three."""
    for nodes, order in ((2, 4), (3, 6)):
        errors = []
        for n in (8, 16):
            u = torch.linspace(0, 4, n + 1, dtype=torch.float64)
            place = torch.arange(n + 1)[:, None]
            path = Path(u[:, None], place, u.sin()[:, None], u.cos()[:, None], nodes, torch.ones_like)
            at = torch.linspace(0.013, 3.97, 57, dtype=torch.float64)
            errors.append(max(abs(float(path.at(v[None])) - math.sin(v)) for v in at))
        assert order - 0.5 < math.log2(errors[0] / errors[1]) < order + 0.5, errors
    with pytest.raises(ValueError, match="runs from u = 0 to 4"):
        path.at(torch.tensor([4.1]))


def test_states_at_times_of_choice() -> None:
    sde = ss.VP()
    model, x = ring(sde), noise(sde)
    found = ss.solve(model, x, Adaptive(rtol=1e-5, atol=1e-5), watch=ss.Watch(save_at=[0.5, 0.1]))
    assert list(found.trajectory) == [0.5, 0.1] and found.path is None
    assert float(distance(found.trajectory[0.5], tight(model, x, sde.T, 0.5)).max()) < 1e-4
    with pytest.raises(ValueError, match="steps of its own"):
        ss.solve(model, x, Adaptive(), watch=ss.Watch(save_at="all"))


def test_a_bar_shows_the_share_of_the_clock(capsys: pytest.CaptureFixture[str]) -> None:
    watch = ss.Watch(progress="always")
    shown = ss.solve(ring(ss.VP()), (4, 2), Adaptive(), seed=0, watch=watch)
    assert "100%" in capsys.readouterr().err
    assert torch.equal(shown.x, ss.solve(ring(ss.VP()), (4, 2), Adaptive(), seed=0).x)


def test_float32_states_are_as_good_as_their_dtype() -> None:
    sde = ss.VP()
    model, x = ring(sde).float(), noise(sde)
    found = ss.solve(model, x.float(), Adaptive(rtol=1e-5, atol=1e-5))
    assert found.x.dtype == torch.float32
    exact = ss.solve(ring(sde), x, Adaptive(rtol=1e-5, atol=1e-5))
    assert float(distance(found.x.double(), exact.x).median()) < 1e-4
    with pytest.raises(ValueError, match="use a float64 state"):
        ss.solve(model, x.float(), Adaptive(rtol=1e-7, atol=0.0))


def test_any_shape_and_none() -> None:
    sde = ss.VP()
    model = ss.Denoiser(lambda x, t: 0.5 * x, sde, predicts="x0")
    for shape in ((3,), (2, 1, 3, 2), (0, 4)):
        found = ss.solve(model, shape, Adaptive(), seed=0)
        assert found.x.shape == shape
    x = noise(sde, 2)
    same = flow(model, x, 0.5, 0.5)
    assert torch.equal(same.x, x) or float(distance(same.x, x).max()) < 1e-15


def test_gradients_flow_through_the_steps() -> None:
    sde = ss.VP()
    net = torch.nn.Linear(2, 2).double()
    net.weight.copy_(torch.tensor([[0.3, -0.2], [0.1, 0.5]]))
    net.bias.copy_(torch.tensor([0.2, -0.4]))
    model = ss.Denoiser(lambda x, t: net(x), sde, predicts="x0")
    x = noise(sde, 4).requires_grad_()
    found = []
    with torch.enable_grad():
        for grad in ("full", "checkpoint"):
            out = ss.sample(model, x, Adaptive(rtol=1e-7, atol=1e-7), grad=grad, t_end=sde.t_min)
            found.append(torch.autograd.grad(out.square().sum(), (x, net.weight)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    moved, h = net.weight.detach().clone(), 1e-3
    values = []
    for sign in (1, -1):
        net.weight.copy_(moved)
        net.weight[0, 1] += sign * h
        out = ss.sample(model, x.detach(), Adaptive(rtol=1e-9, atol=1e-9), t_end=sde.t_min)
        values.append(float(out.square().sum()))
    torch.testing.assert_close(float(found[0][1][0, 1]), (values[0] - values[1]) / (2 * h), rtol=1e-4, atol=1e-4)


# Any vector field.


def test_a_plain_equation_both_ways_with_a_companion_that_does_not_steer() -> None:
    def field(u: Tensor, y: Parts, rows: Tensor | None) -> Parts:
        rate = torch.arange(1.0, 4.0, dtype=torch.float64)
        rate = rate if rows is None else rate[rows]
        return y[0] * rate[:, None], 1e6 * torch.cos(40 * u)

    one = torch.ones(3, 2, dtype=torch.float64)
    plain = lambda u, y, rows: field(u, y, rows)[:1]  # noqa: E731
    for pair in (integrators.Adams(), integrators.DormandPrince()):
        rule = pair, Adaptive(pair, 1e-8, 1e-8).control
        run = integrate(field, (one, torch.zeros(3, dtype=torch.float64)), 0.0, torch.tensor([1.0, 1.0, -1.0]), *rule)
        expected = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64).exp()[:, None] * one
        torch.testing.assert_close(run.y[0], expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(run.stats.steps, integrate(plain, one, 0.0, run.u, *rule).stats.steps)
    slow = lambda u, y, rows: (-y[0], u * y[0][:, 0])  # noqa: E731
    rule = integrators.Adams(), Adaptive(rtol=1e-9, atol=1e-9).control
    run = integrate(slow, (one, torch.zeros(3, dtype=torch.float64)), 0.0, 2.0, *rule)
    torch.testing.assert_close(run.y[1], torch.full_like(run.y[1], 1 - 3 * math.exp(-2)), rtol=1e-7, atol=1e-8)
    with pytest.raises(ValueError, match="slopes of the shapes"):
        integrate(lambda u, y, rows: y[0][:, :1], one, 0.0, 1.0, *rule)


# Limits and failures.


def test_a_limit_on_evaluations_holds_and_is_named() -> None:
    sde = ss.VP()
    model, x = ring(sde, std=0.02), noise(sde, 32)
    free = ss.solve(model, x, Adaptive(rtol=1e-5, atol=1e-5))
    limit = int(free.stats.nfe.median())
    rule = Adaptive(rtol=1e-5, atol=1e-5, max_nfe=limit)
    with pytest.raises(ss.SolverError, match=f"`max_nfe` = {limit} evaluations were not enough") as caught:
        ss.solve(model, x, rule)
    assert caught.value.nfe == limit and caught.value.finite and caught.value.dt < 0
    assert 0 < caught.value.t < 1 and free.stats.nfe[caught.value.worst_sample] > limit
    cut = ss.solve(model, x, replace(rule, on_limit="return"))
    assert int(cut.stats.nfe.max()) <= limit
    assert torch.equal(cut.stats.finished, free.stats.nfe <= limit)
    done = cut.stats.finished
    assert 0 < int(done.sum()) < 32
    assert float(distance(cut.x[done], free.x[done]).max()) < 1e-12
    assert float(distance(cut.x[~done], free.x[~done]).max()) < 0.2, "the rest of the way in one step"


def test_a_network_that_breaks_is_named_with_time_and_sample() -> None:
    sde = ss.VP()

    def net(x: Tensor, t: Tensor, breaks: Tensor) -> Tensor:
        return torch.where(breaks & (t[:, None] < 0.5), torch.nan, 0.3 * x)

    x, breaks = noise(sde, 4), torch.tensor([[False], [False], [True], [False]])
    model = ss.Denoiser(net, sde, predicts="x0")
    for pair in (integrators.Adams(), integrators.DormandPrince(), integrators.DPM12()):
        with pytest.raises(ss.SolverError, match=r"Sample 2 was at t = .*not finite") as caught:
            ss.sample(model.given(breaks=breaks), x, Adaptive(pair))
        error = caught.value
        assert error.worst_sample == 2 and not error.finite and 0.1 < error.t < 0.6 and -1e-4 < error.dt < 0
        assert error.nfe < 500
    broken = ss.Denoiser(lambda x, t: x * torch.nan, sde, predicts="x0")
    with pytest.raises(ss.SolverError, match="slope at the start is not finite") as caught:
        ss.sample(broken, x, Adaptive())
    assert caught.value.t == 1.0 and caught.value.nfe == 1 and not caught.value.finite


def test_bad_arguments_are_refused_at_the_door() -> None:
    model = ring(ss.VP())
    for wrong, word in (
        ({"rtol": -1.0}, "rtol"),
        ({"rtol": 0.0, "atol": 0.0}, "both be 0"),
        ({"on_limit": "stop"}, "on_limit"),
        ({"max_nfe": 0}, "max_nfe"),
        ({"pid": (1.0, 0.0)}, "pid"),
        ({"first_step": 0.0}, "first_step"),
    ):
        with pytest.raises(ValueError, match=word):
            Adaptive(**wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`pair` must be a pair"):
        Adaptive(ss.DDIM())  # type: ignore[arg-type]
    for option in ({"steps": 10}, {"nfe": 10}, {"grid": ss.grids.karras}):
        with pytest.raises(TypeError, match="chooses its own steps"):
            ss.solve(model, (2, 2), Adaptive(), **option)
    for watch in (ss.Watch(hook=lambda node, t, x: x), ss.Watch(callback=print)):
        with pytest.raises(ValueError, match="has no meaning with Adaptive"):
            ss.solve(model, (2, 2), Adaptive(), watch=watch)
    with pytest.raises(TypeError, match="chooses its own steps"):
        ss.encode(model, noise(ss.VP()), Adaptive(), steps=10)
    with pytest.raises(ValueError, match="no noise to start from"):
        flow(model, noise(ss.VP()), 0.0, 1.0)
    with pytest.raises(ValueError, match="cannot start or end where α = 0"):
        ss.sample(ring(ss.Flow()), (2, 2), Adaptive(integrators.DPM23()))


def test_a_solution_says_what_it_is() -> None:
    found = ss.solve(ring(ss.VP()), (3, 2), Adaptive(), seed=11)
    assert isinstance(found, ss.Solution) and found.seed == 11 and found.times == [1.0, 0.0]
    assert float(distance(ss.sample(ring(ss.VP()), (3, 2), Adaptive(), seed=11), found.x).max()) == 0
    cheap = ss.solve(ring(ss.VP()), (3, 2), Adaptive(first_step=0.05), seed=11)
    assert torch.equal(cheap.stats.nfe, 1 + cheap.stats.steps + cheap.stats.rejected)
