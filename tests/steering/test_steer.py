"""Steering against closed forms: a tilted Gaussian and a tilted mixture are a Gaussian and a mixture again."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde import inverse, steering
from scoresde.analysis.moments import exact_moments
from scoresde.steering import Resampling, Reward, Steered, potentials, steer

F64 = torch.float64
DOUBLE = ss.Start(dtype=F64)
SDE = ss.VP()
NORMAL = ss.GaussianMixture(SDE, torch.zeros(1, 1, dtype=F64), std=1.0)
SLOPE = 0.8
LINEAR = Reward(lambda x: SLOPE * x[:, 0])
RULES = {
    "DDPM": ss.DDPM(),
    "SDE-DPM-Solver++ 2M": ss.SDEDPMSolverPP(2),
    "shared normals, SA-Solver": ss.solvers.SASolver(),
    "stages with normals of their own, SEEDS": ss.solvers.SEEDS(3),
    "one normal in two stages, Heun": ss.solvers.StochasticHeun(),
    "Euler-Maruyama": ss.EulerMaruyama(),
    "little noise": ss.solvers.EulerAncestral(0.6),
    "two normals, DPM++ SDE": ss.solvers.DPMPPSDE(),
    "noise up, then down": ss.solvers.EDMStochastic(),
}
PLAN = ss.SDEDPMSolverPP(2).plan(SDE, ss.grids.quadratic_vp(SDE, 16))


def gaussian(plan: ss.Plan) -> float:
    """Variance of the samples of a plan for N(0, 1)."""
    return float(exact_moments(plan, SDE).variance)


def z_score(run: Steered, log_z: float) -> float:
    """Mean of the estimates of Z over the problems, relative to the exact value, in standard errors."""
    ratio = (run.log_z - log_z).exp()
    return float((ratio.mean() - 1) / (ratio.std() / math.sqrt(len(ratio))))


@pytest.mark.parametrize("proposal", [None, "gradient"])
@pytest.mark.parametrize("rule", RULES)
def test_z_is_unbiased_under_every_rule_with_few_particles(rule: str, proposal: str | None) -> None:
    """The samples of a plan for N(0, 1) are N(0, v), so Z = exp(c² v / 2) and the tilted mean is c v, exactly."""
    plan = RULES[rule].plan(SDE, ss.grids.karras(SDE, 16))
    v = gaussian(plan)
    always = Resampling("stratified", threshold=1.0)
    run = steer(NORMAL, LINEAR, (500, 1), plan, particles=12, proposal=proposal, seed=1, start=DOUBLE, resample=always)
    assert abs(z_score(run, 0.5 * SLOPE**2 * v)) < 3.5
    weights = run.log_z.softmax(0)  # Σ Z mean / Σ Z estimates the mean of the target
    mean = weights @ run.mean()[:, 0]
    error = float((weights.square() * (run.mean()[:, 0] - mean).square()).sum().sqrt())
    assert abs(float(mean) - SLOPE * v) < 4 * error
    assert run.parents.shape == (len(run.ess) - 1, 500, 12)
    assert bool((run.parents != torch.arange(12)).any()), "some populations were resampled"


@pytest.mark.parametrize("rule", ["DDPM", "SDE-DPM-Solver++ 2M", "one normal in two stages, Heun", "little noise"])
def test_the_gradient_lowers_the_error_of_log_z(rule: str) -> None:
    plan = RULES[rule].plan(SDE, ss.grids.quadratic_vp(SDE, 16))
    blind, guided = (
        steer(NORMAL, LINEAR, (300, 1), plan, particles=12, proposal=p, seed=1, start=DOUBLE)
        for p in (None, "gradient")
    )
    assert float(guided.log_z.std()) < 0.75 * float(blind.log_z.std())


def far(model: ss.denoisers.AbstractDenoiser) -> ss.denoisers.AbstractDenoiser:
    """A guided denoiser that has little to do with the reward."""
    return ss.guidance.ClassifierGuidance(model, lambda x, t: -0.3 * (x - 1).square().sum(1))


@pytest.mark.parametrize("rule", ["SDE-DPM-Solver++ 2M", "shared normals, SA-Solver", "two normals, DPM++ SDE"])
def test_any_denoiser_is_a_valid_proposal(rule: str) -> None:
    plan = RULES[rule].plan(SDE, ss.grids.karras(SDE, 16))
    run = steer(NORMAL, LINEAR, (500, 1), plan, particles=12, proposal=far(NORMAL), seed=2, start=DOUBLE)
    assert abs(z_score(run, 0.5 * SLOPE**2 * gaussian(plan))) < 3.5


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "max"},
        {"schedule": "sum"},
        {"schedule": lambda twists: 0.5 * twists.mean(1)},
        {"resample": Resampling(threshold=0.0)},
        {"resample": Resampling("multinomial", threshold=1.0)},
        {"resample": Resampling("residual", every=3)},
        {"resample": Resampling("stratified", threshold=0.9)},
        {"resample": lambda w, u: steering.multinomial(w, u)},
    ],
    ids=["max", "sum", "own schedule", "never", "always", "every third step", "often", "own rule"],
)
def test_schedules_and_rules_change_no_target(options: dict[str, Any]) -> None:
    # "sum" adds the twists of 16 steps. At a slope of 0.3 its weights are so heavy-tailed that 1000 runs miss the mean.
    slope = 0.05 if options.get("schedule") == "sum" else 0.3
    weak = Reward(lambda x: slope * x[:, 0])
    run = steer(NORMAL, weak, (1000, 1), PLAN, particles=12, seed=3, start=DOUBLE, **options)
    assert abs(z_score(run, 0.5 * slope**2 * gaussian(PLAN))) < 3.5
    if options.get("resample") == Resampling(threshold=0.0):
        assert torch.equal(run.lineage()[0], torch.arange(12).expand(1000, 12))


def test_the_schedules_are_those_of_the_paper() -> None:
    """The products of G over a path, with G = exp(difference), exp(max so far) and exp(sum so far)."""
    twists = torch.tensor([[1.0, 3.0, 2.0]])
    assert potentials.difference(twists).tolist() == [2.0]
    assert potentials.maximum(twists).tolist() == [1.0 + 3.0 + 3.0]
    assert potentials.total(twists).tolist() == [1.0 + 4.0 + 6.0]


@pytest.mark.parametrize(
    "twisted",
    [
        Reward(lambda x: SLOPE * x[:, 0], anneal=lambda t: 1 - t),
        Reward(lambda x: SLOPE * x[:, 0], state=lambda x, t: 0.5 * x[:, 0]),
        steering.Smoothed(LINEAR, points=4),
    ],
    ids=["annealed", "of the state", "smoothed"],
)
@pytest.mark.parametrize("proposal", [None, "gradient"])
def test_twists_change_no_target(twisted: steering.Potential, proposal: str | None) -> None:
    run = steer(NORMAL, twisted, (500, 1), PLAN, particles=12, proposal=proposal, seed=4, start=DOUBLE)
    assert abs(z_score(run, 0.5 * SLOPE**2 * gaussian(PLAN))) < 3.5


def test_a_smoothed_twist_is_exact_for_a_quadratic_reward_of_a_gaussian() -> None:
    """E[exp r(x₀) | x_t] in closed form, up to the error of the points: 2000 of them, so about 2 %."""
    quadratic = Reward(lambda x: -2 * (x[:, 0] - 0.5).square())
    smooth = steering.Smoothed(quadratic, points=2000)
    x, t = torch.tensor([[-1.0], [0.2], [1.5]], dtype=F64), 0.4
    d, v = NORMAL.x0(x, t)[:, 0], SDE.sigma(t) ** 2  # of N(0, 1) under VP
    exact = -2 * (d - 0.5) ** 2 / (1 + 4 * v) - 0.5 * math.log(1 + 4 * v)
    torch.testing.assert_close(smooth.twist(x, d[:, None], t, SDE), exact, rtol=0, atol=0.08)
    torch.testing.assert_close(smooth.log_value(x), quadratic.log_value(x))


# Mixtures.

MEANS = torch.tensor([[-1.5, 0.0], [1.0, 1.0], [1.0, -1.5]], dtype=F64)
MIX = ss.GaussianMixture(SDE, MEANS, std=torch.tensor([0.4, 0.6, 0.5], dtype=F64), weights=[0.5, 0.2, 0.3])
TILT = torch.tensor([1.2, -0.7], dtype=F64)


def tilted() -> tuple[ss.GaussianMixture, float]:
    """p(x) exp(a·x) / Z and log Z: component k moves by C a and weighs exp(a·μ + a·C a / 2) more."""
    C = MIX.component_covariances()
    move = C @ TILT
    log_w = MIX.weights.log() + MEANS @ TILT + 0.5 * (move @ TILT)
    exact = ss.GaussianMixture(SDE, MEANS + move, cov=C, weights=log_w.softmax(0))
    return exact, float(log_w.logsumexp(0))


TARGETS = {
    "linear": (Reward(lambda x: x @ TILT.to(x)), tilted),
    "quadratic": (
        steering.Smoothed(Reward(lambda x: -2 * (x[:, 0] - 0.3).square())),
        lambda: (
            inverse.posterior(MIX, SEEN),
            float(inverse.log_evidence(MIX, SEEN)) + 0.5 * math.log(2 * math.pi * 0.25),
        ),
    ),
}
SEEN = inverse.Measurement(inverse.Mask(torch.tensor([True, False])), torch.tensor([[0.3]], dtype=F64), std=0.5)


@pytest.mark.parametrize("proposal", [None, "gradient"])
@pytest.mark.parametrize("name", TARGETS)
def test_particles_reach_the_tilted_mixture(name: str, proposal: str | None) -> None:
    """With 4000 particles: moments to 0.08 standard deviations, log Z to 0.1, and a classifier finds no difference."""
    reward, target = TARGETS[name]
    exact, log_z = target()
    run = steer(MIX, reward, (1, 2), particles=4000, proposal=proposal, grid=50, seed=5, start=DOUBLE)
    sd = exact.covariance().diagonal().sqrt()
    assert float(((run.mean()[0] - exact.mean()) / sd).abs().max()) < 0.08
    second = run.mean(lambda x: (x - exact.mean()).square())[0]
    torch.testing.assert_close(second, sd**2, rtol=0.1, atol=0)
    assert float(run.log_z) == pytest.approx(log_z, abs=0.1)
    assert float(run.log_z_error) < 0.1
    x, y = run.resampled(seed=6)[0, ::4], exact.sample(1000, seed=7)
    if proposal is None:
        found = ss.metrics.c2st(x, y, folds=2, steps=100)
        assert found < 0.54, "the standard deviation of the accuracy is 0.011"
        assert ss.metrics.c2st(MIX.sample(1000, seed=8), y, folds=2, steps=100) > 0.6


def test_the_error_falls_as_particles_grow() -> None:
    exact, log_z = tilted()
    reward = TARGETS["linear"][0]
    errors = []
    for n in (25, 400):
        run = steer(MIX, reward, (40, 2), particles=n, proposal="gradient", grid=30, seed=9, start=DOUBLE)
        bias = run.merged()
        assert float(bias.log_z) == pytest.approx(log_z, abs=0.1), "30 steps"
        errors.append(float((run.mean() - bias.mean()).square().mean().sqrt()))
    assert errors[1] < errors[0] / 2.5, "like the root of 16, with some slack for resampling"


# log Z and its error.


@pytest.mark.parametrize("proposal", [None, "gradient"])
def test_the_estimated_variance_of_z_is_unbiased(proposal: str | None) -> None:
    """Z² V of Lee and Whiteley is an unbiased estimate of Var(Z) if every step is resampled multinomially."""
    resample = Resampling("multinomial", threshold=1.0)
    reward = Reward(lambda x: 1.5 * x[:, 0])
    plan = ss.DDPM().plan(SDE, ss.grids.quadratic_vp(SDE, 5))
    run = steer(NORMAL, reward, (6000, 1), plan, particles=24, proposal=proposal, seed=10, resample=resample)
    z = run.log_z.exp()
    estimates = z.square() * run.z_variance.nan_to_num(1.0)  # from one ancestor the estimate is Z²
    error = (estimates - (z - z.mean()).square()).std() / 6000**0.5
    assert float((estimates.mean() - z.var()).abs()) < 3.5 * float(error)
    assert float(error) < 0.15 * float(z.var()), "the test has power"


def test_the_error_of_log_z_is_of_the_right_size_for_every_rule() -> None:
    """1 for multinomial resampling, to three errors of a deviation from 400 runs, 3.5 % each; about 1 for others."""
    for rule, slack in (("systematic", 0.2), ("stratified", 0.2), ("residual", 0.2), ("multinomial", 0.11)):
        run = steer(NORMAL, LINEAR, (400, 1), PLAN, particles=100, resample=rule, seed=11, start=DOUBLE)
        z = run.log_z.exp()
        estimate = (z.square() * run.z_variance).mean().sqrt()
        assert float(estimate / z.std()) == pytest.approx(1, abs=slack), rule


def test_merged_runs_are_one_population() -> None:
    run = steer(NORMAL, LINEAR, (50, 1), PLAN, particles=20, seed=12, start=DOUBLE)
    one = run.merged()
    assert one.x.shape == (1, 1000, 1) and float(one.log_weights.exp().sum()) == pytest.approx(1)
    assert float(one.log_z) == pytest.approx(float(run.log_z.exp().mean().log()))
    z = run.log_z.exp()
    assert float(one.log_z_error) == pytest.approx(float(z.std() / z.mean() / 50**0.5))
    weights = run.log_z.softmax(0)
    torch.testing.assert_close(one.mean()[0], weights @ run.mean())
    assert torch.equal(one.lineage()[0, 0, 20:40], 20 + run.lineage()[0, 1])


# Ancestry.


def test_lineages_follow_the_parents() -> None:
    parents = torch.tensor([[[0, 0, 2]], [[1, 2, 2]], [[0, 1, 2]], [[2, 0, 0]]])
    made = Steered(
        x=torch.zeros(1, 3, 1), nfe=0, calls=0, times=[], log_weights=torch.zeros(1, 3),
        log_potential=torch.zeros(1, 3), log_z=torch.zeros(1), z_variance=torch.zeros(1),
        ess=torch.zeros(5, 1), parents=parents,
    )  # fmt: skip
    assert made.lineage()[:, 0].tolist() == [[2, 0, 0], [2, 1, 1], [2, 0, 0], [2, 0, 0]]


def test_particles_descend_from_the_initial_states_that_the_lineage_names() -> None:
    """A frozen coordinate: the model predicts the data from it, so it marks the ancestor."""

    class Marked(ss.denoisers.AbstractDenoiser):
        def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
            return torch.stack([x[:, 0] * 0.5, x[:, 1].round()], dim=1)

    n = 10
    plan = ss.plan.Plan((
        ss.plan.Row(1.0, evaluates=True, node=0),
        ss.plan.Row(0.5, x=((0, 1.0),), z=((0, 1e-3),), evaluates=True, node=1),
        ss.plan.Row(0.2, x=((1, 1.0),), z=((1, 1e-3),), evaluates=True, node=2),
        ss.plan.Row(0.0, d=((2, 1.0),), node=3),
    ))  # fmt: skip
    x = torch.stack([torch.linspace(-2, 2, n), 1.0 + torch.arange(n)], dim=1)[None].double()
    reward = Reward(lambda x0: 5 * x0[:, 0])
    run = steer(Marked(SDE), reward, x, plan, particles=n, resample=Resampling("multinomial", 1.0), seed=0)
    assert torch.equal(run.x[0, :, 1].long() - 1, run.lineage()[0, 0])
    assert len(run.lineage()[0, 0].unique()) < n


# Batches of problems and seeds.


def test_problems_are_independent_of_the_batch_and_keyed_by_the_seed() -> None:
    means = torch.linspace(-1, 1, 4, dtype=F64)

    class Shifted(ss.denoisers.Wrapped):
        """The model with one mean for each problem."""

        per_sample = ("shift",)

        def __init__(self, shift: Tensor) -> None:
            super().__init__(NORMAL)
            self.shift = shift

        def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
            return NORMAL.x0(x, t) + self.shift[:, None]

    class Slope:
        """A reward with one slope for each problem."""

        def __init__(self, slope: Tensor) -> None:
            self.slope = slope

        def rows(self, index: Tensor) -> Slope:
            return Slope(self.slope[index])

        def __call__(self, x: Tensor) -> Tensor:
            return self.slope * x[:, 0]

    model, slopes = Shifted(means), torch.linspace(0.2, 2.0, 4, dtype=F64)
    for proposal in (None, "gradient"):
        options: dict[str, Any] = {"particles": 9, "proposal": proposal, "start": DOUBLE}
        whole = steer(model, Reward(Slope(slopes)), (4, 1), PLAN, seed=5, **options)
        for p in range(4):
            index = torch.tensor([p])
            part = steer(
                model.rows(index), Reward(Slope(slopes[index])), (1, 1), PLAN, seed=ss.Noise(5, offset=p), **options
            )
            for name in ("x", "log_weights", "log_potential", "log_z", "z_variance"):
                torch.testing.assert_close(getattr(part, name)[0], getattr(whole, name)[p], rtol=1e-10, atol=1e-10)
            assert torch.equal(part.parents[:, 0], whole.parents[:, p])
        again = steer(model, Reward(Slope(slopes)), (4, 1), PLAN, seed=5, **options)
        assert torch.equal(again.x, whole.x) and torch.equal(again.log_weights, whole.log_weights)
        other = steer(model, Reward(Slope(slopes)), (4, 1), PLAN, seed=[5, 6, 7, 8], **options)
        swapped = steer(
            model.rows(torch.tensor([1, 0])), Reward(Slope(slopes[[1, 0]])), (2, 1), PLAN, seed=[6, 5], **options
        )
        torch.testing.assert_close(swapped.log_z, other.log_z[[1, 0]])


def test_more_particles_do_not_change_the_first_ones() -> None:
    """Until the first resampling: particle n has its own numbers."""
    never = Resampling(threshold=0.0)
    few, many = (steer(NORMAL, LINEAR, (2, 1), PLAN, particles=n, resample=never, seed=3) for n in (5, 30))
    torch.testing.assert_close(many.x[:, :5], few.x)


def test_particles_may_be_given_and_paths_may_be_brownian() -> None:
    x = SDE.prior().sample((2, 6, 1), ss.Noise(4), dtype=F64)
    a, b = (steer(NORMAL, LINEAR, x, PLAN, particles=6, seed=ss.Noise(5, path=path)) for path in (False, True))
    assert a.x.shape == b.x.shape == (2, 6, 1) and not torch.equal(a.x, b.x)
    start = ss.Gaussian(SDE, torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64))
    run = steer(NORMAL, LINEAR, (400, 1), PLAN, particles=12, start=start, seed=6)
    v = gaussian(PLAN)
    assert abs(z_score(run, 0.5 * SLOPE**2 * v)) < 3.5


# Black boxes, constraints, errors.


def test_a_black_box_steers_and_its_gradient_is_refused() -> None:
    box = Reward(lambda x: (x[:, 0].detach() > 0.5).to(x) * 2)
    run = steer(NORMAL, box, (500, 1), PLAN, particles=12, seed=7, start=DOUBLE)
    sd = gaussian(PLAN) ** 0.5
    inside = 0.5 * math.erfc(0.5 / sd / 2**0.5)
    assert abs(z_score(run, math.log(1 + inside * (math.e**2 - 1)))) < 3.5
    with pytest.raises(ValueError, match="has no gradient with respect to the state"):
        steer(NORMAL, box, (2, 1), PLAN, particles=3, proposal="gradient")


def test_a_hard_constraint_holds_exactly() -> None:
    class Positive(steering.Potential):
        def log_value(self, x0: Tensor) -> Tensor:
            return torch.where(x0[:, 0] > 0, 0.0, -torch.inf)

        def twist(self, x: Tensor, x0: Tensor, t: float | Tensor, sde: ss.SDE) -> Tensor:
            return 2 * x0[:, 0].clamp_max(0)

    run = steer(NORMAL, Positive(), (500, 1), PLAN, particles=12, seed=8, start=DOUBLE)
    assert abs(z_score(run, math.log(0.5))) < 3.5
    assert bool((run.x[run.log_weights.exp() > 0] > 0).all())


def test_a_problem_without_any_weight_warns() -> None:
    nothing = Reward(lambda x: torch.full((len(x),), -torch.inf, dtype=x.dtype))
    with pytest.warns(UserWarning, match="no particle has weight in 2 of 2 problems, the first is problem 0"):
        run = steer(NORMAL, nothing, (2, 1), PLAN, particles=3, seed=0)
    assert run.log_z.tolist() == [-math.inf] * 2 and bool(run.log_weights.isfinite().all())


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(
        ValueError, match="`solver` must be stochastic, because its noise makes the particles differ, got"
    ):
        steer(NORMAL, LINEAR, (1, 1), ss.DDIM())
    with pytest.raises(ValueError, match="`proposal` must be one of 'gradient'"):
        steer(NORMAL, LINEAR, (1, 1), proposal="gradients")
    with pytest.raises(ValueError, match="`schedule` must be one of 'difference', 'max', 'sum', got 'maximum'"):
        steer(NORMAL, LINEAR, (1, 1), schedule="maximum")
    with pytest.raises(ValueError, match="a plan has its own grid; drop `grid`"):
        steer(NORMAL, LINEAR, (1, 1), PLAN, grid=4)
    with pytest.raises(ValueError, match=r"`fn` must return one number for each sample, \(3,\), got \(3, 1\)"):
        steer(NORMAL, Reward(lambda x: x), (1, 1), PLAN, particles=3)
    with pytest.raises(
        ValueError, match=r"must have shape \(P, N, \*event\) with N = `particles` = 4, got \(2, 3, 1\)"
    ):
        steer(NORMAL, LINEAR, torch.zeros(2, 3, 1), PLAN, particles=4)
    with pytest.raises(ValueError, match="`proposal` is on"):
        steer(NORMAL, LINEAR, (1, 1), PLAN, proposal=NORMAL.under(ss.Flow()))
    with pytest.raises(ValueError, match=r"`potential`, a Reward, is NaN.* for 1 of 6 particles at t = 1, where the"):
        steer(
            NORMAL,
            Reward(lambda x: torch.where(torch.arange(len(x)) == 4, math.nan, x[:, 0])),
            (2, 1),
            PLAN,
            particles=3,
        )


def test_the_potential_is_blamed_only_where_the_model_is_finite() -> None:
    root = Reward(lambda x: torch.where(x[:, 0] > 0, x[:, 0].sqrt(), 0.0))  # its gradient is not a number below 0
    with pytest.raises(ValueError, match=r"`potential`, a Reward, is NaN or .*, or its gradient is"):
        steer(NORMAL, root, (1, 1), PLAN, particles=6, proposal="gradient", seed=0)

    class Broken(ss.denoisers.AbstractDenoiser):
        def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
            return x * math.nan

    with (
        pytest.warns(UserWarning, match="the samples are not all finite"),
        pytest.raises(ValueError, match="the log-weights of the particles are not all finite"),
    ):
        steer(Broken(SDE), LINEAR, (1, 1), PLAN, particles=6, seed=0)


def test_a_collapse_warns_and_good_twists_do_not() -> None:
    """A sharp reward far in the tail: its twist at high noise leaves one particle."""
    sharp = Reward(lambda x: -200 * (x[:, 0] - 1.5).square())
    with pytest.warns(UserWarning, match=r"collapsed in 1 of 1 problems: .* of 50.*Reward\(fn, anneal=.*Smoothed"):
        run = steer(NORMAL, sharp, (1, 1), PLAN, particles=50, seed=0)
    assert float(run.ess.min()) < 2 or bool(run.log_z_error.isnan())
    run = steer(NORMAL, steering.Smoothed(sharp, points=64), (1, 1), PLAN, particles=2000, seed=0)  # no warning
    assert float(run.ess.min()) >= 2 and bool(run.log_z_error.isfinite())


def test_a_function_as_potential_and_other_words_get_the_fix() -> None:
    with pytest.raises(
        TypeError, match=r"`potential` must be a Potential such as .*; wrap the function, ss.steering.R"
    ):
        steer(NORMAL, lambda x: x[:, 0], (1, 1))  # type: ignore[arg-type]
    for word in ("nfe", "steps"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{word}'; use `grid`, a number of steps"):
            steer(NORMAL, LINEAR, (1, 1), **{word: 10})  # type: ignore[arg-type]
