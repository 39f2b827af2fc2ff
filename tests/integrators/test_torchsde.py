"""The reverse SDE through torchsde: number of evaluations, distribution, seeds and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scoresde as ss
import scoresde.integrators.via_torchsde as backend
from scoresde.integrators.via_torchsde import ITO, STRATONOVICH, ReverseSDE, TorchSDE

torchsde = pytest.importorskip("torchsde")
F64 = torch.float64
EVALUATIONS = {"euler": 1, "milstein": 1, "srk": 2, "euler_heun": 1, "heun": 2, "midpoint": 2, "reversible_heun": 1}
GAUSSIAN = ss.GaussianMixture(ss.VP(), [[0.5, -1.0]], std=0.3)
T_MIN = GAUSSIAN.sde.t_min
F64_START = ss.Start(dtype=F64)


class Counted(ss.denoisers.AbstractDenoiser):
    """The denoiser of N(0, I), cheap and linear, which stores the time and shape of each evaluation."""

    def __init__(self, sde: ss.SDE) -> None:
        super().__init__(sde)
        self.times, self.shapes = list[float](), set[tuple[int, ...]]()

    def x0(self, x: Tensor, t: Any, **cond: Any) -> Tensor:
        self.times.append(float(t))
        self.shapes.add(tuple(x.shape))
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        return x * (alpha / (alpha**2 + sigma**2))


@pytest.mark.parametrize("method", ITO + STRATONOVICH)
def test_the_number_of_evaluations_and_draws(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, intervals = Counted(ss.VP()), list[tuple[float, float]]()
    make = backend.brownian

    def counted(*args: Any) -> Any:
        bm = make(*args)

        class Spy(torchsde.BaseBrownian):  # type: ignore[misc]
            dtype, device, shape = bm.dtype, bm.device, bm.shape
            levy_area_approximation = bm.levy_area_approximation

            def __repr__(self) -> str:
                return "spy"

            def __call__(self, a: Any, b: Any, **how: Any) -> Any:
                intervals.append((float(a), float(b)))
                return bm(a, b, **how)

        return Spy()

    monkeypatch.setattr(backend, "brownian", counted)
    solution = ss.solve(model, (32, 64), TorchSDE(method, steps=100, variable="lam"), seed=0, t_end=model.sde.t_min)
    extra = method == "reversible_heun"  # it starts with an evaluation, which every later step then reuses
    assert len(model.times) == solution.nfe == solution.calls == 100 * EVALUATIONS[method] + extra
    assert solution.times == [1.0, model.sde.t_min]
    assert intervals == [(float(k), float(k + 1)) for k in range(100)]
    assert model.times[0] == model.sde.T and min(model.times) >= model.sde.t_min


@pytest.mark.parametrize("method", ["euler", "srk"])
def test_twenty_thousand_steps_do_not_recurse(method: str) -> None:
    problem = ReverseSDE(Counted(ss.VP(beta_min=0.01, beta_max=0.5, T=20.0)), 20_000, method=method)
    y = torch.zeros(2, 1)
    bm = backend.brownian(problem, method, ss.Noise(0), y, False)
    for k in [*range(20_000), *reversed(range(20_000))]:
        bm(k, k + 1, return_U=method == "srk")
    x = ss.sample(problem.model, (2, 1), TorchSDE(method, steps=300), seed=0)
    assert x.isfinite().all()


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 5), (2, 3, 4, 5), (2, 2, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("method", ["srk", "reversible_heun"])
def test_states_of_any_shape(method: str, shape: tuple[int, ...]) -> None:
    model = Counted(ss.VP())
    solver = TorchSDE(method, steps=5, variable="lam")
    x = ss.sample(model, shape, solver, seed=0)
    assert x.shape == shape and x.isfinite().all() and model.shapes == {shape}
    y = ss.sample(model, (shape[0], math.prod(shape[1:])), solver, seed=0)
    assert torch.allclose(y.reshape(shape), x, atol=1e-5)


def test_time_goes_down_from_start_to_end_and_ends_there() -> None:
    for variable in ("t", "lam"):
        problem = ReverseSDE(GAUSSIAN, 7, variable=variable, t_start=0.9, t_end=0.1)
        times = [problem.time(s) for s in range(8)]
        assert times[0] == 0.9 and times[-1] == 0.1 and times == sorted(times, reverse=True)


MOMENTS = [(m, v) for m in ITO + STRATONOVICH for v in ("t", "lam")]


@pytest.mark.parametrize(("method", "variable"), MOMENTS)
def test_moments_of_a_gaussian(method: str, variable: str) -> None:
    n, steps = 4096, 100
    if (method, variable) == ("reversible_heun", "t"):
        steps = 400  # not stable on steeper drifts
    solver = TorchSDE(method, steps=steps, variable=variable)
    x = ss.sample(GAUSSIAN, (n, 2), solver, seed=0, t_end=0.02, start=F64_START)
    alpha, sigma = GAUSSIAN.sde.alpha(0.02), GAUSSIAN.sde.sigma(0.02)
    std = math.hypot(0.3 * alpha, sigma)
    weak = 0.03 if method in ("euler", "milstein", "euler_heun") else 0.004  # first order, second order
    mean = alpha * GAUSSIAN.mean()
    assert ((x.mean(0) - mean).abs() < 4 * std / n**0.5 + weak * std).all()
    assert ((x.std(0) / std - 1).abs() < 4 / (2 * n) ** 0.5 + weak).all()


@pytest.mark.parametrize("method", ["euler", "srk"])
def test_adaptive_steps(method: str) -> None:
    x = ss.sample(GAUSSIAN, (4096, 2), TorchSDE(method, steps=50, adaptive=True, variable="lam"), seed=0, t_end=0.02)
    alpha, sigma = GAUSSIAN.sde.alpha(0.02), GAUSSIAN.sde.sigma(0.02)
    assert ((x.std(0) / math.hypot(0.3 * alpha, sigma) - 1).abs() < 4 / 8192**0.5 + 0.02).all()


def test_a_denoised_end_is_the_denoiser_at_the_end() -> None:
    solver = TorchSDE(steps=10, variable="lam")
    x = ss.sample(GAUSSIAN, (3, 2), solver, seed=0, t_end=T_MIN)
    denoised = ss.solve(GAUSSIAN, (3, 2), solver, seed=0)
    assert torch.equal(denoised.x, GAUSSIAN.x0(x, T_MIN))
    assert denoised.times == [1.0, 0.0] and denoised.nfe == 21


@pytest.mark.parametrize("method", ["euler", "srk"])
@pytest.mark.parametrize("event", [(5,), (3, 7)], ids=str)
def test_a_sample_is_the_same_in_any_batch(method: str, event: tuple[int, ...]) -> None:
    def go(n: int, offset: int, **key: Any) -> Tensor:
        seed = ss.Noise(1, offset=offset, **key)
        return ss.sample(Counted(ss.VP()), (n, *event), TorchSDE(method, steps=20, variable="lam"), seed=seed)

    whole = go(64, 0)
    assert torch.allclose(go(1, 63), whole[63:], atol=1e-5) and torch.allclose(go(7, 7), whole[7:14], atol=1e-5)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    for adaptive in (False, True):
        ss.sample(GAUSSIAN, (2, 2), TorchSDE("srk", steps=5, variable="lam", adaptive=adaptive), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("method", "variable"), [("midpoint", "lam"), ("euler", "t")])
def test_on_a_path_runs_approach_each_other_at_order_one(method: str, variable: str) -> None:
    def go(steps: int) -> Tensor:
        seed = ss.Noise(2, path=True)
        x = seed.fork(9).normal((480, 2), 0, dtype=F64)
        return ss.sample(GAUSSIAN, x, TorchSDE(method, steps, variable=variable), seed=seed, t_start=0.8, t_end=0.3)

    errors = [float((go(n) - go(2 * n)).square().mean().sqrt()) for n in (10, 40)]
    assert abs(math.log(errors[0] / errors[1], 4) - 1) < 0.2, errors


# Gradients.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        out: Tensor = self.layers(torch.cat([x, t.to(x)[:, None]], 1))
        return out + shift


def gradients(method: str, grad: str, steps: int) -> Tensor:
    net = Net()
    model = ss.Denoiser(net, ss.VP(), predicts="x0")
    x = ss.Noise(0).normal((4, 2), 0, dtype=F64).requires_grad_()
    shift = torch.full((4, 2), 0.1, dtype=F64, requires_grad=True)
    solver = TorchSDE(method, steps, variable="lam")
    y = ss.sample(model.given(shift=shift), x, solver, seed=1, grad=grad, t_start=0.8, t_end=0.1)
    grads = torch.autograd.grad(y.square().sum(), [x, shift, *net.parameters()])
    return torch.cat([g.flatten() for g in grads])


def test_the_adjoint_of_reversible_heun_is_backpropagation() -> None:
    full, adjoint = (gradients("reversible_heun", grad, 20) for grad in ("full", "adjoint"))
    assert (full - adjoint).abs().max() < 1e-10 * full.abs().max()


def test_the_adjoint_of_other_methods_approaches_backpropagation() -> None:
    def gap(steps: int) -> float:
        full, adjoint = (gradients("euler", grad, steps) for grad in ("full", "adjoint"))
        return float((full - adjoint).norm() / full.norm())

    coarse, fine = gap(20), gap(160)
    assert fine < 0.03 and coarse / fine > 4, (coarse, fine)


# Arguments.

BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: TorchSDE("srx"), "did you mean 'srk'"),
    (lambda: ReverseSDE(GAUSSIAN, 5, t_end=0.0), "stop at a positive time"),
    (lambda: ss.sample(GAUSSIAN.under(ss.Flow()), (2, 2), TorchSDE()), "start a little before"),
    (lambda: TorchSDE(variable="s"), "`variable`"),
    (lambda: TorchSDE(eta=0.0), "`eta`"),
    (lambda: ss.sample(GAUSSIAN, (2, 2), TorchSDE("srk"), seed=ss.Noise(0, path=True)), "take 'euler'"),
    (lambda: ss.sample(GAUSSIAN, (2, 2), TorchSDE(), t_start=0.2, t_end=0.5), "`t_end`"),
    (lambda: ss.sample(GAUSSIAN, (2, 2), TorchSDE(), watch=print), "`callback` of `watch` has no meaning"),
]


@pytest.mark.parametrize(("call", "words"), BAD)
def test_bad_input_is_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
