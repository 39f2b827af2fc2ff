"""torchdiffeq on the probability flow: every method and clock reaches the same end, and errors say where."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_reversible import mlp
from torch import Tensor

import scoresde as ss
from scoresde.integrators.via_torchdiffeq import ADAPTIVE, CLOCKS, TorchDiffEq

PROCESSES = {
    "VP": ss.VP(),
    "VE": ss.VE(),
    "EDM": ss.EDM(),
    "Flow": ss.Flow(),
    "Cosine": ss.Cosine(),
}


def gaussian(sde: ss.SDE) -> ss.GaussianMixture:
    return ss.GaussianMixture(sde, torch.tensor([[0.5, -1.0]]), std=torch.tensor([[0.6, 0.3]]))


def ring(sde: ss.SDE, std: float = 0.1) -> ss.GaussianMixture:
    angle = torch.arange(8) * math.pi / 4
    return ss.GaussianMixture(sde, 2 * torch.stack([angle.cos(), angle.sin()], 1), std=std)


def noise(sde: ss.SDE, n: int = 4) -> Tensor:
    return sde.prior().sample((n, 2), ss.Noise(3), dtype=torch.float64)


@pytest.mark.parametrize("name", PROCESSES)
def test_every_clock_ends_at_the_same_place_on_every_process(name: str) -> None:
    sde = PROCESSES[name]
    model, x = gaussian(sde), noise(sde)
    start = 0.999 * sde.T if sde.alpha(sde.T) == 0 else sde.T
    for clock in CLOCKS:
        method = TorchDiffEq(clock=clock, rtol=1e-6, atol=1e-6)
        down = ss.solve(model, x, method, t_start=start, t_end=sde.t_min)
        assert float((down.x - model.flow(x, start, sde.t_min)).abs().max()) < 1e-4, clock
        assert down.times == [start, sde.t_min]
        up = ss.solve(model, down.x, method, t_start=sde.t_min, t_end=start)
        assert float((up.x - x).abs().max() / x.abs().max()) < 1e-3, clock


@pytest.mark.filterwarnings("ignore:The following arguments have no effect")  # scipy on what torchdiffeq gives it
@pytest.mark.parametrize("method", [*ADAPTIVE, "rk4", "midpoint", "explicit_adams", "scipy_solver"])
def test_every_method_of_torchdiffeq_runs(method: str) -> None:
    sde = ss.VP()
    model, x = gaussian(sde), noise(sde)
    options = {} if method in ADAPTIVE else {"solver": "DOP853"} if method == "scipy_solver" else {"step_size": 0.02}
    rtol = 1e-3 if method in ("fehlberg2", "adaptive_heun") else 1e-5
    result = ss.solve(model, x, TorchDiffEq(method, rtol=rtol, atol=rtol, options=options), t_end=0.1)
    allowed = 20 * rtol if method in (*ADAPTIVE, "scipy_solver") else 0.05 if method == "explicit_adams" else 1e-3
    assert float((result.x - model.flow(x, 1.0, 0.1)).abs().max()) < allowed


def test_the_result_is_denoised_where_sigma_is_zero() -> None:
    sde = ss.VP()
    model, x = ring(sde), noise(sde)
    times: list[float] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        times.append(float(t[0]))
        return model.x0(x, float(t[0]))

    result = ss.solve(ss.Denoiser(net, sde, predicts="x0"), x, TorchDiffEq())
    late = ss.solve(model, x, TorchDiffEq(), t_end=sde.t_min)
    assert float((result.x - model.x0(late.x, sde.t_min)).abs().max()) < 1e-5
    assert result.nfe == result.calls == len(times) and result.times == [1.0, 0.0]
    assert min(times) > 0.999 * sde.t_min and max(times) <= 1, "the network is not evaluated beyond the ends"
    flow = ss.solve(ring(ss.Flow()), noise(ss.Flow()), TorchDiffEq())
    assert float(flow.x.norm(dim=1).sub(2).abs().max()) < 0.6


def test_one_hard_sample_meets_its_tolerance_among_easy_ones() -> None:
    sde = ss.VP()
    model = ring(sde, std=0.02)
    x = noise(sde, 512)
    x[17] = 1.5 * torch.tensor([math.cos(math.pi / 8), math.sin(math.pi / 8)], dtype=torch.float64) + 1e-4
    truth = ss.solve(model, x[17:18], ss.Adaptive(rtol=1e-9, atol=1e-9), t_end=sde.t_min).x
    runs = {
        c: ss.solve(model, x, TorchDiffEq(coupling=c, rtol=1e-5, atol=1e-5), t_end=sde.t_min) for c in ("max", "mean")
    }
    errors = {c: float((run.x[17] - truth).norm()) for c, run in runs.items()}
    assert errors["max"] < 1e-3 and errors["max"] < errors["mean"] / 2, errors
    assert runs["max"].nfe > runs["mean"].nfe


def test_any_shape_and_a_start_from_the_prior() -> None:
    sde = ss.VP()
    model = ss.Denoiser(lambda x, t: 0.5 * x, sde, predicts="x0")
    rough = TorchDiffEq(rtol=1e-3, atol=1e-3)
    result = ss.solve(model, (2, 1, 3, 2), rough, seed=7)
    assert result.x.shape == (2, 1, 3, 2) and result.x.dtype == torch.float32 and result.seed == 7
    other = ss.solve(model, (2, 1, 3, 2), ss.Adaptive(rtol=1e-5, atol=1e-5), seed=7, t_end=sde.t_min)
    again = ss.solve(model, (2, 1, 3, 2), TorchDiffEq(), seed=7, t_end=sde.t_min)
    assert float((again.x - other.x).abs().max()) < 3e-3, "from the same start"
    assert ss.solve(model, (3,), rough, seed=0).x.shape == (3,)


def test_states_on_the_way() -> None:
    sde = ss.VP()
    model, x = gaussian(sde), noise(sde)
    method = TorchDiffEq(rtol=1e-6, atol=1e-6)
    result = ss.solve(model, x, method, watch=ss.Watch(save_at=[0.2, 0.7]))
    assert list(result.trajectory) == [0.7, 0.2]
    for t, y in result.trajectory.items():
        assert float((y - model.flow(x, 1.0, t)).abs().max()) < 1e-4
    up = ss.solve(model, result.trajectory[0.2], method, t_start=0.2, t_end=1.0, watch=ss.Watch(save_at=[0.9, 0.7]))
    assert list(up.trajectory) == [0.7, 0.9]
    assert float((up.trajectory[0.7] - result.trajectory[0.7]).abs().max()) < 1e-4
    for save_at, words in (([1.5], "must name times inside"), ("all", "must be times"), ([1.0], "inside")):
        with pytest.raises(ValueError, match=f"`save_at` .*{words}"):
            ss.solve(model, x, method, watch=ss.Watch(save_at=save_at))
    with pytest.raises(ValueError, match="`callback` of `watch` has no meaning with TorchDiffEq"):
        ss.solve(model, x, method, watch=print)


def test_events_end_a_solve_or_raise_an_error_if_they_never_happen() -> None:
    sde = ss.VP()
    model, x = gaussian(sde), noise(sde, 1)
    lam = 0.3
    method = TorchDiffEq(event=lambda t, x: torch.tensor([sde.lam(t) - lam]), rtol=1e-7, atol=1e-7)
    result = ss.solve(model, x, method)
    assert result.times[0] == 1.0 and abs(sde.lam(result.times[1]) - lam) < 1e-4
    assert float((result.x - model.flow(x, 1.0, result.times[1])).abs().max()) < 1e-4
    with pytest.raises(ss.SolverError, match="event had not happened"):
        ss.solve(model, x, TorchDiffEq(event=lambda t, x: torch.ones(1), rtol=1e-4, atol=1e-4))
    with pytest.raises(ValueError, match="`save_at` has no meaning with `event`"):
        ss.solve(model, x, method, watch=ss.Watch(save_at=[0.5]))


def test_failures_say_where_and_which() -> None:
    sde = ss.VP()

    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.where((t[:, None] < 0.5) & (x[:, :1] == x[:, :1].max()), torch.nan, 0.3 * x)

    x = torch.tensor([[0.1, 0.0], [0.2, 0.0], [3.0, 0.0], [0.3, 0.0]], dtype=torch.float64)
    model = ss.Denoiser(net, sde, predicts="x0")
    with pytest.raises(ss.SolverError, match="torchdiffeq gave up") as caught:
        ss.solve(model, x, TorchDiffEq(rtol=1e-4, atol=1e-4))
    error = caught.value
    assert error.worst_sample == 2 and not error.finite and 0.45 < error.t <= 1 and error.nfe > 0
    with pytest.raises(ss.SolverError, match="`max_nfe` = 20 evaluations") as caught:
        ss.solve(ring(sde), noise(sde), TorchDiffEq(max_nfe=20))
    assert caught.value.nfe == 20 and 0 < caught.value.t < 1 and caught.value.dt < 0 and caught.value.finite
    with pytest.raises(ValueError, match="take 'tau'"):
        ss.solve(ring(ss.Flow()), noise(ss.Flow()), TorchDiffEq(clock="lam"))
    with pytest.raises(ValueError, match="`clock` must be one of"):
        TorchDiffEq(clock="sigma")


def test_all_gradients_agree() -> None:
    """Through torchdiffeq's steps, by its adjoint, through a fixed plan, adaptive steps and reversible ones."""
    sde = ss.VP()
    model = mlp(sde)
    cut: dict[str, Any] = {"t_start": 1.0, "t_end": 0.01}
    tol = {"rtol": 1e-8, "atol": 1e-8}

    def of(method: object, grad: str, **options: Any) -> list[Tensor]:
        x = noise(sde).requires_grad_()
        shift = torch.full((4, 2), 0.1, dtype=torch.float64, requires_grad=True)
        loss = ss.sample(model.given(shift=shift), x, method, grad=grad, **options).sin().sum()
        return list(torch.autograd.grad(loss, (x, shift, *model.parameters())))

    times = ss.grids.quadratic_vp(sde, 60, t_end=0.01)
    gradients = {
        "full": of(TorchDiffEq(**tol), "full", **cut),
        "adjoint": of(TorchDiffEq(**tol), "adjoint", **cut),
        "adaptive": of(ss.Adaptive(**tol), "full", **cut),
        "checkpoint": of(ss.Adaptive(**tol), "checkpoint", **cut),
        "plan": of(ss.solvers.RungeKutta4(), "full", steps=60, t_end=0.01),
        "reversible": of(ss.integrators.Reversible(ss.solvers.RK4, coupling=0.999), "reversible", grid=times),
    }
    for name, values in gradients.items():
        for a, b in zip(gradients["full"], values, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("where", ["shared", "guided", "measured"])
def test_whatever_requires_grad_has_gradients_by_the_adjoint(where: str) -> None:
    """Shared conditions, conditions made from another tensor inside guidance, measurements."""
    sde = ss.VP()
    net, x = mlp(sde), noise(sde)

    def of(grad: str) -> Tensor:
        root = torch.full((4, 2), 0.2, dtype=torch.float64, requires_grad=True)
        model: ss.denoisers.AbstractDenoiser = net
        if where == "shared":
            model = net.given(shared={"shift": root[0] * 2})
        elif where == "guided":
            model = ss.ClassifierFree(net, 2.0, null={"shift": 0.0}).given(shift=2 * root)
        else:
            operator = ss.inverse.Mask(torch.tensor([True, False]))
            model = ss.inverse.DDNM(net, ss.inverse.Measurement(operator, 2 * root[:, :1], 0.0))
        out = ss.sample(model, x, TorchDiffEq(rtol=1e-7, atol=1e-7), grad=grad, t_end=0.05)
        return torch.autograd.grad(out.sin().sum(), root)[0]

    full, adjoint = of("full"), of("adjoint")
    assert full.abs().max() > 1e-3
    torch.testing.assert_close(adjoint, full, rtol=1e-4, atol=1e-5)
