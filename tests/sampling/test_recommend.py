"""The defaults: every process, prediction and budget gets a plan that spends its budget and keeps errors small."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.analysis import amplification, gaussian_stds
from scoresde.denoisers import AbstractDenoiser
from scoresde.sampling import default_grid, default_solver, plan_for, recommend
from scoresde.sampling.defaults import BOUND, Bounded

f64 = torch.float64
BUDGETS = (1, 2, 3, 4, 5, 6, 8, 11, 15, 25, 50)
PROCESSES: dict[str, ss.SDE] = {
    **{cls.__name__: cls() for cls in (ss.VP, ss.SubVP, ss.VE, ss.Cosine, ss.EDM, ss.Flow, ss.Trig)},
    "Cosine to the end": ss.Cosine(T=1.0),
    "Polynomial": ss.processes.Polynomial(n=2.0),
    "Discrete linear": ss.Discrete(ss.processes.betas("linear", 1000)),
    "Discrete scaled linear": ss.Discrete(ss.processes.betas("scaled_linear", 1000)),
    "Discrete cosine": ss.Discrete(ss.processes.betas("cosine", 1000)),
    "Discrete zero SNR": ss.Discrete(ss.processes.zero_terminal_snr(ss.processes.betas("scaled_linear", 1000))),
    "Shifted flow": ss.processes.Shifted(ss.Flow(), 3.0),
}
PREDICTIONS = ("eps", "score", "x0", "v", "velocity")
MEANS = torch.tensor([[-1.0, 0.2], [1.0, -0.4], [0.3, 0.9]], dtype=f64)


def mixture(sde: ss.SDE) -> ss.GaussianMixture:
    return ss.GaussianMixture(sde, MEANS, std=0.3)


def network(sde: ss.SDE, predicts: str) -> ss.Denoiser | None:
    """An exact network of this prediction, or None where the prediction does not determine the data."""
    exact = mixture(sde)

    def net(x: Tensor, t: Tensor) -> Tensor:
        return exact.predict(predicts, x.double(), float(t[0]))

    if (
        predicts in ("eps", "score", "velocity")
        and sde.alpha(sde.T) < 1e-12
        and not (predicts == "velocity" and sde.alpha_dot(sde.T) != 0)
    ):
        return None
    return ss.Denoiser(net, sde, predicts=predicts, time="t")


def hopeless(sde: ss.SDE) -> bool:
    """Whether an ε-network's x₀ at T is wrong by thousands of times its error, as on cosine lists of β."""
    return sde.lam(sde.T) < -math.log(1e3)


def models(sde: ss.SDE) -> Iterator[AbstractDenoiser]:
    yield mixture(sde)
    yield from (model for predicts in PREDICTIONS if (model := network(sde, predicts)) is not None)


@pytest.mark.parametrize("name", PROCESSES)
def test_every_budget_is_spent_and_gaussian_data_keep_their_width(name: str) -> None:
    sde = PROCESSES[name]
    for model in models(sde):
        for nfe in BUDGETS:
            plan = plan_for(model, nfe=nfe)
            assert plan.nfe == nfe and not plan.stochastic
            if nfe >= 3 and not (model.kind.predicts in ("eps", "score") and hopeless(sde)):
                (found, exact), *_ = gaussian_stds(plan, sde, [1.0])
                assert (0.33 if nfe == 3 else 0.5) * exact < found < 1.25 * exact, (str(model.kind), nfe, found)
            if not model.kind.exact:
                first = ss.DDIM().plan(sde, plan.times)
                factors = [float(amplification(p, sde, model.kind.predicts).max()) for p in (plan, first)]
                assert factors[0] <= BOUND * factors[1] * (1 + 1e-12), (model.kind.predicts, nfe, factors)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_error_falls_with_the_budget(name: str) -> None:
    sde = PROCESSES[name]
    exact = mixture(sde)
    x = sde.prior(std=0.8).sample((64, 2), ss.Noise(0), dtype=f64)
    truth = ss.sample(exact, x, ss.VelocityAB(3), grid=ss.grids.flow_time(sde, 400, 1.5))
    for model in models(sde):
        noise = model.kind.predicts in ("eps", "score")
        if noise and hopeless(sde):
            continue
        for nfe, most in ((5, 0.35), (10, 0.15), (20, 0.05)):
            gap = (ss.sample(model, x, nfe=nfe) - truth).norm(dim=1) / math.sqrt(2)
            assert float(gap.median()) < most * (1.5 if noise else 1.0), (model.kind, nfe, float(gap.median()))


@pytest.mark.parametrize("name", ["VP", "EDM", "Discrete scaled linear"])
@pytest.mark.parametrize(("nfe", "most"), [(20, 5e-3), (50, 3e-4)])
def test_an_accurate_eps_network_is_followed_closely(name: str, nfe: int, most: float) -> None:
    # Modes that are a tenth as wide as their distance; a grid that ends far from data has ten times these errors.
    sde = PROCESSES[name]
    angle = torch.arange(8, dtype=f64) * (math.pi / 4)
    exact = ss.GaussianMixture(sde, torch.stack([angle.cos(), angle.sin()], dim=1), std=0.1)
    model = ss.Denoiser(lambda x, t: exact.eps(x.double(), float(t[0])), sde, predicts="eps", time="t")
    x = sde.prior(std=0.7).sample((32, 2), ss.Noise(0), dtype=f64)
    truth = ss.sample(exact, x, ss.VelocityAB(3), grid=ss.grids.flow_time(sde, 400, 1.5))
    gap = (ss.sample(model, x, nfe=nfe) - truth).norm(dim=1) / math.sqrt(2)
    assert float(gap.median()) < most, float(gap.median())


def test_one_evaluation_of_the_network_for_each_of_the_budget() -> None:
    calls: list[int] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return 0.3 * x

    for predicts in ("eps", "v"):
        model = ss.Denoiser(net, ss.VP(), predicts=predicts)
        for nfe in (*range(1, 14), 31, 64):
            calls.clear()
            assert ss.solve(model, (2, 3), nfe=nfe, seed=0).nfe == nfe == len(calls)


def test_errors_of_a_network_on_a_cosine_schedule_do_not_grow() -> None:
    # With quadratic_vp and a rule of order 3 the worst state moves by 34 times the error.
    sde = ss.Discrete(ss.processes.betas("cosine", 1000))
    exact, delta = mixture(sde), 0.02

    def net(x: Tensor, t: Tensor) -> Tensor:
        wave = torch.sin(7 * x + 0.05 * t.double()[:, None])
        return exact.v(x.double(), float(t[0])) + delta * wave

    clean = ss.Denoiser(lambda x, t: exact.v(x.double(), float(t[0])), sde, predicts="v", time="t")
    noisy = ss.Denoiser(net, sde, predicts="v", time="t")
    x = ss.Noise(1).normal((64, 2), 0, dtype=f64)
    for nfe in (4, 8, 15, 30):
        gap = (ss.sample(noisy, x, nfe=nfe) - ss.sample(clean, x, nfe=nfe)).norm(dim=1)
        assert float(gap.median()) < 8 * delta, nfe


def test_errors_of_the_first_steps_stay_small_where_an_eps_network_does_not_contract_them() -> None:
    # If ε does not depend on x, x/α moves by the integral of ε over σ/α, and nothing later shrinks an error of it.
    sde = ss.VP()
    eps = lambda x, t: x * 0 + (1 / (1 + sde.sigma(t) / sde.alpha(t) / 5)).view(-1, 1, 1, 1)  # noqa: E731
    model = ss.Denoiser(eps, sde, predicts="eps")
    exact = -5 * math.log1p(sde.sigma(sde.T) / sde.alpha(sde.T) / 5)
    start = torch.zeros(1, 1, 1, 1, dtype=f64)  # images; the default for vectors takes longer first steps
    for nfe, bound in ((14, 0.02), (17, 0.02), (20, 0.005), (24, 0.005)):  # log_noise(0.3, 1.75) has 0.03 at 14
        assert abs(float(ss.sample(model, start, nfe=nfe)) / exact - 1) < bound, nfe


def test_a_grid_on_which_the_default_would_amplify_errors_gets_a_lower_order() -> None:
    sde = ss.Discrete(ss.processes.betas("cosine", 1000))
    model = ss.Denoiser(lambda x, t: x, sde, predicts="eps")
    grid = [1000.0, 999.0, 500.0, 100.0, 0.0]
    plan = plan_for(model, grid=grid)
    own = Bounded(ss.UniPC(2, "exact"), "eps", bound=1e9).solver.plan(sde, grid)
    worst = [float(amplification(p, sde, "eps").max()) for p in (plan, own, ss.DDIM().plan(sde, grid))]
    assert worst[0] <= BOUND * worst[2]
    assert plan.order == 1 or worst[1] <= BOUND * worst[2]


def test_the_reason_is_one_sentence() -> None:
    model = ss.Denoiser(lambda x, t: x, ss.VP(), predicts="eps")
    for given in (None, model, mixture(ss.VP())):
        for nfe in BUDGETS:
            choice = recommend(nfe, given)
            assert choice.why[0].isupper() and choice.why.endswith(".") and ". " not in choice.why
            assert repr(choice.solver) == repr(default_solver(nfe, given))
            if choice.grid is not None:
                assert torch.equal(choice.grid(ss.VP(), 7), default_grid(nfe, given)(ss.VP(), 7))


def test_solvers_that_need_short_steps_at_high_noise_keep_the_quadratic_grid() -> None:
    model = mixture(ss.VP())
    for solver in (ss.EulerMaruyama(), ss.DDPM(), ss.solvers.RungeKutta4(), ss.SDEDPMSolverPP(2)):
        assert default_grid(20, model, solver) is ss.grids.quadratic_vp
    for solver in (ss.UniPC(3), ss.solvers.DPMSolver(2), ss.VelocityAB(2)):
        assert torch.equal(default_grid(20, model, solver)(ss.VP(), 20), recommend(20, model).grid(ss.VP(), 20))


VECTORS, IMAGES = (2,), (1, 8, 8)


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_few_evaluations_of_vectors_get_the_universal_plan_and_images_a_rule(predicts: str) -> None:
    net = ss.Denoiser(lambda x, t: torch.zeros_like(x), ss.VP(), predicts=predicts)
    largest = {"eps": 8, "score": 8, "x0": 5}.get(predicts, 6)
    for nfe in range(1, 20):
        table = isinstance(recommend(nfe, net, VECTORS).solver, ss.solvers.Universal)
        assert table == (3 <= nfe <= largest)
        assert not isinstance(recommend(nfe, net, IMAGES).solver, ss.solvers.Universal)
        assert not isinstance(recommend(nfe, net).solver, ss.solvers.Universal)  # the shape is not known
        found = ss.solve(net, (3, *VECTORS), nfe=nfe, seed=0)
        assert found.nfe <= nfe and found.plan is not None
        assert found.plan == plan_for(net, nfe=nfe, event=VECTORS)


def test_the_universal_plan_of_the_default_has_the_scale_of_the_data() -> None:
    wide = ss.Gaussian(ss.VP(), torch.zeros(2), torch.full((2,), 9.0))
    net = ss.Denoiser(lambda x, t: torch.zeros_like(x), ss.VP(), predicts="v")
    assert recommend(5, net, VECTORS).solver == ss.solvers.Universal(1.0, "data")
    net.card = ss.denoisers.Card(gaussian=wide)
    found = recommend(5, net).solver
    assert isinstance(found, ss.solvers.Universal) and found.data_std == pytest.approx(3.0)
    scaled = ss.Denoiser(
        lambda x, t: x, ss.EDM(), predicts="F", precondition=ss.denoisers.Preconditioning(sigma_data=0.5)
    )
    assert recommend(5, scaled, VECTORS).solver == ss.solvers.Universal(0.5, "data")


def test_guidance_a_window_a_grid_and_a_gaussian_start_get_the_rule() -> None:
    net = ss.Denoiser(lambda x, t, label=None: torch.zeros_like(x), ss.VP(), predicts="v")
    assert isinstance(recommend(5, net.given(label=torch.zeros(1)), VECTORS).solver, ss.solvers.Universal)
    assert isinstance(recommend(5, ss.guidance.Clamp(net), VECTORS).solver, ss.solvers.Multistep)
    gaussian = ss.Gaussian(ss.VP(), torch.zeros(2), torch.ones(2))
    for options in (
        {"t_start": 0.5},
        {"t_end": 0.01},
        {"grid": ss.grids.karras},
        {"gaussian": gaussian},
        {"grid": [1.0, 0.6, 0.4, 0.2, 0.1, 0.0], "nfe": None},
    ):
        plan = plan_for(net, **{"nfe": 5, "event": VECTORS, **options})
        assert not plan.name.startswith("Universal"), options


def test_an_exact_model_of_one_point_gets_the_rule() -> None:
    point = ss.denoisers.Empirical(ss.VP(), torch.ones(1, 2))
    assert isinstance(recommend(5, point).solver, ss.solvers.Multistep)
    x = ss.sample(point, (4, 2), nfe=5, seed=0)
    assert torch.allclose(x, torch.ones(4, 2), atol=1e-5)


def test_the_default_of_vectors_is_nearer_than_that_of_images_on_thin_data() -> None:
    # modes of a standard deviation of .05 in the plane, with an error of 1 % in the prediction
    means = torch.cartesian_prod(torch.linspace(-1, 1, 3, dtype=f64), torch.linspace(-1, 1, 3, dtype=f64))
    exact = ss.GaussianMixture(ss.VP(), means, std=0.05)
    x = ss.Noise(3).normal((64, 2), 0, dtype=f64)
    for predicts in ("v", "eps"):

        def net(x: Tensor, t: Tensor, predicts: str = predicts) -> Tensor:
            wave = (3 * x.flip(1) + 2 * exact.sde.lam(float(t[0]))).cos()
            return exact.predict(predicts, x, float(t[0])) + 0.01 * math.sqrt(2) * wave

        model = ss.Denoiser(net, ss.VP(), predicts=predicts)
        end = ss.sample(model, x, ss.VelocityAB(3), grid=ss.grids.quadratic_vp(ss.VP(), 300))
        for nfe in (4, 5, 6, 8, 10):
            choice = recommend(nfe, model, IMAGES)
            of_images = ss.sample(model, x, choice.solver, grid=choice.grid, nfe=nfe)
            errors = [(y - end).norm(dim=1).median() for y in (ss.sample(model, x, nfe=nfe), of_images)]
            assert errors[0] < errors[1], (predicts, nfe)


def test_a_universal_plan_shows_its_states_and_a_hook_gets_the_rule() -> None:
    exact, seen = mixture(ss.VP()), []
    plain = ss.solve(exact, (2, 2), nfe=5, seed=0)
    assert plain.plan is not None and plain.plan.name.startswith("Universal") and len(plain.times) == 6
    for watch in (ss.Watch(save_at="all"), ss.Watch(callback=lambda step: seen.append(step.node)), True):
        found = ss.solve(exact, (2, 2), nfe=5, seed=0, watch=watch)
        assert torch.equal(found.x, plain.x)
        assert len(found.trajectory) in (0, 6)
    assert seen == [0, 1, 2, 3, 4, 5]
    hooked = ss.solve(exact, (2, 2), nfe=5, seed=0, watch=ss.Watch(hook=ss.sampling.LangevinCorrector(0.1)))
    assert hooked.plan is not None and not hooked.plan.name.startswith("Universal")
