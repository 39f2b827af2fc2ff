"""torchdiffeq on the probability flow: every method and clock to the same ends, errors that say where."""

from __future__ import annotations

import math

import pytest
import torch
from test_reversible import mlp
from torch import Tensor

import scoresde as ss
from scoresde.integrators.via_torchdiffeq import ADAPTIVE, CLOCKS, torchdiffeq_solve

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
        down = torchdiffeq_solve(model, x, clock=clock, rtol=1e-6, atol=1e-6, t_start=start, t_end=sde.t_min)
        assert float((down.x - model.flow(x, start, sde.t_min)).abs().max()) < 1e-4, clock
        assert down.t == sde.t_min
        up = torchdiffeq_solve(model, down.x, clock=clock, rtol=1e-6, atol=1e-6, t_start=sde.t_min, t_end=start)
        assert float((up.x - x).abs().max() / x.abs().max()) < 1e-3, clock


@pytest.mark.filterwarnings("ignore:The following arguments have no effect")  # scipy on what torchdiffeq gives it
@pytest.mark.parametrize("method", [*ADAPTIVE, "rk4", "midpoint", "explicit_adams", "scipy_solver"])
def test_every_method_of_torchdiffeq_runs(method: str) -> None:
    sde = ss.VP()
    model, x = gaussian(sde), noise(sde)
    options = {} if method in ADAPTIVE else {"solver": "DOP853"} if method == "scipy_solver" else {"step_size": 0.02}
    rtol = 1e-3 if method in ("fehlberg2", "adaptive_heun") else 1e-5
    found = torchdiffeq_solve(model, x, method, rtol=rtol, atol=rtol, t_end=0.1, options=options)
    allowed = 20 * rtol if method in (*ADAPTIVE, "scipy_solver") else 0.05 if method == "explicit_adams" else 1e-3
    assert float((found.x - model.flow(x, 1.0, 0.1)).abs().max()) < allowed


def test_where_nothing_is_left_of_the_noise_it_denoises() -> None:
    sde = ss.VP()
    model, x = ring(sde), noise(sde)
    asked: list[float] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t[0]))
        return model.x0(x, float(t[0]))

    found = torchdiffeq_solve(ss.Denoiser(net, sde, predicts="x0"), x)
    late = torchdiffeq_solve(model, x, t_end=sde.t_min)
    assert float((found.x - model.x0(late.x, sde.t_min)).abs().max()) < 1e-5
    assert found.nfe == len(asked) and found.t == 0.0
    assert min(asked) > 0.999 * sde.t_min and max(asked) <= 1, "nothing is asked beyond the ends"
    silent = torchdiffeq_solve(ring(ss.Flow()), noise(ss.Flow()))
    assert float(silent.x.norm(dim=1).sub(2).abs().max()) < 0.6


def test_one_hard_sample_keeps_its_tolerance_among_easy_ones() -> None:
    sde = ss.VP()
    model = ring(sde, std=0.02)
    x = noise(sde, 128)
    x[17] = 1.5 * torch.tensor([math.cos(math.pi / 8), math.sin(math.pi / 8)], dtype=torch.float64) + 1e-4
    tol = {"rtol": 1e-5, "atol": 1e-5}
    truth = ss.solve(model, x[17:18], ss.Adaptive(rtol=1e-9, atol=1e-9), t_end=sde.t_min).x
    runs = {c: torchdiffeq_solve(model, x, coupling=c, t_end=sde.t_min, **tol) for c in ("max", "mean")}
    errors = {c: float((run.x[17] - truth).norm()) for c, run in runs.items()}
    assert errors["max"] < 1e-3 and errors["max"] < errors["mean"] / 2, errors
    assert runs["max"].nfe > runs["mean"].nfe


def test_any_shape_and_a_start_from_the_prior() -> None:
    sde = ss.VP()
    model = ss.Denoiser(lambda x, t: 0.5 * x, sde, predicts="x0")
    found = torchdiffeq_solve(model, (2, 1, 3, 2), seed=7, rtol=1e-3, atol=1e-3)
    assert found.x.shape == (2, 1, 3, 2) and found.x.dtype == torch.float32 and found.seed == 7
    other = ss.solve(model, (2, 1, 3, 2), ss.Adaptive(rtol=1e-5, atol=1e-5), seed=7, t_end=sde.t_min)
    again = torchdiffeq_solve(model, (2, 1, 3, 2), seed=7, t_end=sde.t_min)
    assert float((again.x - other.x).abs().max()) < 3e-3, "from the same start"
    assert torchdiffeq_solve(model, (3,), seed=0, rtol=1e-3, atol=1e-3).x.shape == (3,)


def test_states_on_the_way() -> None:
    sde = ss.VP()
    model, x = gaussian(sde), noise(sde)
    found = torchdiffeq_solve(model, x, save_at=[0.2, 0.7], rtol=1e-6, atol=1e-6)
    assert list(found.trajectory) == [0.7, 0.2]
    for t, y in found.trajectory.items():
        assert float((y - model.flow(x, 1.0, t)).abs().max()) < 1e-4
    with pytest.raises(ValueError, match="`save_at` must name times inside"):
        torchdiffeq_solve(model, x, save_at=[1.5])


def test_events_end_a_solve_or_say_that_they_never_came() -> None:
    sde = ss.VP()
    model, x = gaussian(sde), noise(sde, 1)
    lam = 0.3
    found = torchdiffeq_solve(model, x, event=lambda t, x: torch.tensor([sde.lam(t) - lam]), rtol=1e-7, atol=1e-7)
    assert abs(sde.lam(found.t) - lam) < 1e-4
    assert float((found.x - model.flow(x, 1.0, found.t)).abs().max()) < 1e-4
    with pytest.raises(ss.SolverError, match="event had not happened"):
        torchdiffeq_solve(model, x, event=lambda t, x: torch.ones(1), rtol=1e-4, atol=1e-4)


def test_failures_say_where_and_which() -> None:
    sde = ss.VP()

    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.where((t[:, None] < 0.5) & (x[:, :1] == x[:, :1].max()), torch.nan, 0.3 * x)

    x = torch.tensor([[0.1, 0.0], [0.2, 0.0], [3.0, 0.0], [0.3, 0.0]], dtype=torch.float64)
    model = ss.Denoiser(net, sde, predicts="x0")
    with pytest.raises(ss.SolverError, match="torchdiffeq gave up") as caught:
        torchdiffeq_solve(model, x, rtol=1e-4, atol=1e-4)
    error = caught.value
    assert error.worst_sample == 2 and not error.finite and 0.45 < error.t <= 1 and error.nfe > 0
    with pytest.raises(ss.SolverError, match="`max_nfe` = 20 evaluations") as caught:
        torchdiffeq_solve(ring(sde), noise(sde), max_nfe=20)
    assert caught.value.nfe == 20 and 0 < caught.value.t < 1 and caught.value.dt < 0 and caught.value.finite
    with pytest.raises(ValueError, match="take 'tau'"):
        torchdiffeq_solve(ring(ss.Flow()), noise(ss.Flow()), clock="lam")
    with pytest.raises(ValueError, match="`clock` must be one of"):
        torchdiffeq_solve(ring(sde), noise(sde), clock="sigma")


def test_all_gradients_agree() -> None:
    """Through torchdiffeq's steps, by its adjoint, through a fixed plan, adaptive steps and reversible ones."""
    sde = ss.VP()
    model = mlp(sde)
    cut = {"t_start": 1.0, "t_end": 0.01}
    tol = {"rtol": 1e-8, "atol": 1e-8}

    def of(solve: object) -> list[Tensor]:
        x = noise(sde).requires_grad_()
        shift = torch.full((4, 2), 0.1, dtype=torch.float64, requires_grad=True)
        assert callable(solve)
        loss = solve(x, shift).sin().sum()
        return list(torch.autograd.grad(loss, (x, shift, *model.parameters())))

    times = ss.grids.quadratic_vp(sde, 60, t_end=0.01)
    found = {
        "full": of(lambda x, c: torchdiffeq_solve(model, x, grad="full", shift=c, **cut, **tol).x),
        "adjoint": of(lambda x, c: torchdiffeq_solve(model, x, grad="adjoint", shift=c, **cut, **tol).x),
        "adaptive": of(lambda x, c: ss.sample(model, x, ss.Adaptive(**tol), grad="full", shift=c, **cut)),
        "checkpoint": of(lambda x, c: ss.sample(model, x, ss.Adaptive(**tol), grad="checkpoint", shift=c, **cut)),
        "plan": of(
            lambda x, c: ss.sample(model, x, ss.solvers.RungeKutta4(), steps=60, grad="full", shift=c, t_end=0.01)
        ),
        "reversible": of(
            lambda x, c: (
                ss.integrators.Reversible(ss.solvers.RK4, coupling=0.999)
                .solve(model, x, times, grad="reversible", shift=c)
                .x
            )
        ),
    }
    for name, values in found.items():
        for a, b in zip(found["full"], values, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
