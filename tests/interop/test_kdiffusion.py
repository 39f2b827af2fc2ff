"""Our solvers in k-diffusion's calling form: the published updates, our own run, and what tools expect of a sampler."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import published as pub
import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.interop import kdiffusion_sampler
from scoresde.plan import run
from scoresde.solvers import Solver
from scoresde.solvers.ancestral import Churn

EDM = ss.EDM()
DATA = ss.GaussianMixture(EDM, [[1.0, -0.5], [-1.2, 0.3], [0.2, 1.1]], std=[0.5, 0.4, 0.6])
START = 80.0 * ss.Noise(0).normal((4, 2), 0, dtype=torch.float64)
SIGMAS = ss.grids.karras(EDM, 8)
NORMALS = [ss.Noise(3).normal((4, 2), k, dtype=torch.float64) for k in range(40)]


def model(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
    assert sigma.shape == (len(x),) and sigma.dtype == x.dtype
    return DATA.x0(x, sigma)


def given() -> Callable[[Tensor, Tensor], Tensor]:
    """A noise sampler that returns the same normals at every run."""
    numbers = iter(NORMALS)
    return lambda sigma, sigma_next: next(numbers)


def one(t: float) -> float:
    return 1.0


def identity(t: float) -> float:
    return t


ODE: list[tuple[Solver, Any, dict[str, Any]]] = [
    (ss.DDIM(), pub.ddim, {}),
    (ss.EDMHeun(), pub.edm_heun, {}),
    (ss.solvers.DPM2(), pub.dpm_2, {}),
    (ss.solvers.LMS(), pub.lms, {}),
    (ss.DPMSolverPP(2), pub.dpmpp_2m, {}),
    (ss.DPMSolverPP(2, kind="single"), pub.dpmpp_2s, {}),
]


@pytest.mark.parametrize(("solver", "update", "options"), ODE, ids=lambda v: getattr(v, "__name__", None))
def test_the_published_updates(solver: Solver, update: Any, options: dict[str, Any]) -> None:
    ours = kdiffusion_sampler(solver)(model, START, SIGMAS, disable=True)
    expected = update(DATA.x0, START, SIGMAS, one, identity, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def literal(kind: str, x: Tensor, eta: float, s_noise: float) -> Tensor:
    """Stochastic samplers as k-diffusion has them, typed again: an ancestral Euler step, and DPM-Solver++(2M) SDE."""
    numbers, last = iter(NORMALS), None
    s = SIGMAS.tolist()
    for i in range(len(s) - 1):
        d = DATA.x0(x, s[i])
        if s[i + 1] == 0:
            x = d
        elif kind == "ancestral":
            up = min(s[i + 1], eta * s[i + 1] * math.sqrt(1 - (s[i + 1] / s[i]) ** 2))
            down = math.sqrt(s[i + 1] ** 2 - up**2)
            x = x + (x - d) / s[i] * (down - s[i]) + s_noise * up * next(numbers)
        else:
            h = math.log(s[i] / s[i + 1])
            weight = -math.expm1(-2 * h)
            x = s[i + 1] / s[i] * math.exp(-h) * x + weight * d
            if last is not None:
                x = x + 0.5 * weight * h / last[1] * (d - last[0])
            x = x + s_noise * s[i + 1] * math.sqrt(-math.expm1(-2 * h)) * next(numbers)
            last = d, h
    return x


@pytest.mark.parametrize(("eta", "s_noise"), [(1.0, 1.0), (0.6, 1.0), (0.6, 0.9)])
def test_ancestral_steps_with_eta_and_s_noise(eta: float, s_noise: float) -> None:
    sample = kdiffusion_sampler(ss.solvers.EulerAncestral())
    ours = sample(model, START, SIGMAS, disable=True, eta=eta, s_noise=s_noise, noise_sampler=given())
    torch.testing.assert_close(ours, literal("ancestral", START, eta, s_noise), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("s_noise", [1.0, 1.1])
def test_multistep_sdes_with_s_noise(s_noise: float) -> None:
    sample = kdiffusion_sampler(ss.SDEDPMSolverPP(2))
    ours = sample(model, START, SIGMAS, disable=True, s_noise=s_noise, noise_sampler=given())
    torch.testing.assert_close(ours, literal("sde", START, 1.0, s_noise), rtol=1e-9, atol=1e-9)


SEEDED = [
    ss.VelocityAB(3),
    ss.UniPC(3),
    ss.DDIM(1.0),
    ss.solvers.SEEDS(3),
    ss.solvers.DPMPPSDE(),
    ss.solvers.SASolver(2, 2),
    ss.solvers.EDMStochastic(s_churn=4.0),
]


@pytest.mark.parametrize("solver", SEEDED, ids=repr)
def test_a_seed_gives_the_samples_of_sample(solver: Solver) -> None:
    ours = kdiffusion_sampler(solver)(model, START, SIGMAS, {"seed": 5}, disable=True)
    expected = ss.sample(DATA, START, solver, grid=SIGMAS, seed=5)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_without_a_seed_the_noise_is_that_of_torch() -> None:
    sample = kdiffusion_sampler(ss.DDIM(1.0))
    torch.manual_seed(1)
    ours = sample(model, START, SIGMAS, disable=True)
    torch.manual_seed(1)
    numbers = [torch.randn_like(START) for _ in range(7)]
    torch.testing.assert_close(
        ours, sample(model, START, SIGMAS, disable=True, noise_sampler=lambda s, t: numbers.pop(0))
    )


@pytest.mark.parametrize(
    "solver", [ss.UniPC(2), ss.EDMHeun(), Churn(ss.EDMHeun(), 4.0), ss.solvers.DPM2Ancestral()], ids=repr
)
def test_the_callback_sees_the_start_of_every_step(solver: Solver) -> None:
    seen: list[dict[str, Any]] = []
    x = kdiffusion_sampler(solver)(model, START, SIGMAS, {"seed": 0}, callback=seen.append, disable=True)
    assert [s["i"] for s in seen] == list(range(8))
    assert [float(s["sigma"]) for s in seen] == SIGMAS[:-1].tolist()
    for step in seen:
        assert set(step) == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert float(step["sigma_hat"]) >= float(step["sigma"]) and step["sigma"].ndim == step["sigma_hat"].ndim == 0
        torch.testing.assert_close(step["denoised"], DATA.x0(step["x"], float(step["sigma_hat"])))
    assert any(float(s["sigma_hat"]) > float(s["sigma"]) for s in seen) == isinstance(solver, Churn)
    torch.testing.assert_close(seen[-1]["denoised"], x)  # the step into σ = 0 returns the denoised state


def test_intervals_of_the_noise() -> None:
    asked: list[tuple[float, float]] = []

    def sampler(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        asked.append((float(sigma), float(sigma_next)))
        return torch.zeros_like(START)

    kdiffusion_sampler(ss.solvers.DPM2Ancestral())(model, START, SIGMAS, disable=True, noise_sampler=sampler)
    s = SIGMAS.tolist()
    assert asked == [(a, b) for a, b in pairwise(s) if b > 0]


@pytest.mark.parametrize("sde", [ss.VP(), ss.Discrete(ss.processes.betas("linear", 1000))], ids=["VP", "Discrete"])
def test_networks_of_other_processes_behind_a_wrapper(sde: ss.SDE) -> None:
    """The state of k-diffusion is x_t / α_t at σ_t / α_t."""
    inner = ss.GaussianMixture(sde, [[1.0, -0.5], [-1.2, 0.3]], std=[0.5, 0.4])

    def wrapped(y: Tensor, sigma: Tensor) -> Tensor:
        t = float(sde.t_of_lam(-math.log(float(sigma[0]))))
        return inner.x0(float(sde.alpha(t)) * y, t)

    times = ss.grids.karras(sde, 8)
    start = ss.Noise(1).normal((4, 2), 0, dtype=torch.float64)
    ours = kdiffusion_sampler(ss.UniPC(3))(
        wrapped, start / float(sde.alpha(sde.T)), (-sde.lam(times)).exp(), disable=True
    )
    plan = ss.UniPC(3).plan(sde, times)
    torch.testing.assert_close(ours, run(plan, inner.x0, start), rtol=1e-6, atol=1e-6)  # t_of_lam of a list of β


def test_half_precision_goes_in_and_out() -> None:
    seen: list[torch.dtype] = []

    def half(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(x.dtype)
        return DATA.x0(x.float(), sigma.float()).to(x.dtype)

    x = kdiffusion_sampler(ss.UniPC(2))(half, START.bfloat16(), SIGMAS.float(), disable=True)
    assert x.dtype == torch.bfloat16 and set(seen) == {torch.bfloat16}


def test_the_signature_has_what_the_solver_has() -> None:
    base = ["model", "x", "sigmas", "extra_args", "callback", "disable"]
    noisy = [*base, "eta", "s_noise", "noise_sampler"]
    expected = {
        ss.UniPC(3): base,
        ss.DPMSolverPP(2): base,
        ss.solvers.EulerAncestral(): noisy,
        ss.SDEDPMSolverPP(2): noisy,
        ss.solvers.EDMStochastic(s_churn=4.0): [*base, "s_noise", "noise_sampler"],
    }
    for solver, names in expected.items():
        sample = kdiffusion_sampler(solver)
        assert list(inspect.signature(sample).parameters) == names, solver
        assert sample.__name__ == f"sample_{solver!r}"


def test_mistakes_are_named() -> None:
    with pytest.raises(TypeError, match="`solver` must be a solver"):
        kdiffusion_sampler("euler")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`eta` has no meaning with UniPC\(order=2\), got 0.5"):
        kdiffusion_sampler(ss.UniPC(2))(model, START, SIGMAS, eta=0.5)
    with pytest.raises(ValueError, match="`times` repeats"):
        kdiffusion_sampler(ss.UniPC(2))(model, START, torch.tensor([1.0, 1.0, 0.0]))
