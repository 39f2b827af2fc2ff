"""What belongs to samples follows them: measurements of their own under every method that splits a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scoresde as ss
from scoresde.inverse.denoisers import DDNM, DPS, MMPS, TMPD, DiffPIR, LinearPosteriorDenoiser, PiGDM, PosteriorDenoiser
from scoresde.inverse.likelihoods import Counts
from scoresde.inverse.measurements import Measurement
from scoresde.inverse.operators import Downsample, Linear, Mask, Matrix, Operator
from scoresde.inverse.samplers import daps, ddrm, red_diff

F64 = torch.float64
DOUBLE = ss.Start(dtype=F64)
VP = ss.VP()
B, D = 5, 6


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Smooth(nn.Module):
    """An elementwise network with float64 parameters: it has the same arithmetic in batches of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=F64))

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        wide = (-1, *[1] * (x.ndim - 1))
        out = self.weight * x * (0.5 + 0.5 * t.to(x).reshape(wide)) + 0.2 * (x + 0.3).tanh()
        return out if shift is None else out + shift.to(x).reshape(wide)


def network(predicts: str = "eps") -> ss.Denoiser:
    return ss.Denoiser(Smooth().requires_grad_(False), VP, predicts=predicts)


def mixture() -> ss.GaussianMixture:
    return ss.GaussianMixture(VP, 1.2 * rand(3, D), std=0.4)


EACH = Mask(torch.arange(B * D).reshape(B, D) % torch.tensor([2, 3, 4, 2, 5])[:, None] == 0, (D,))
MEASUREMENTS = {
    "mask": Measurement(Mask(torch.arange(D) % 2 == 0), rand(B, 3, seed=3), 0.3),
    "mask of each sample": Measurement(EACH, rand(B, *EACH.out, seed=3), 0.3),
    "down-sampling": Measurement(Downsample(2, (D,), dims=1), rand(B, 3, seed=3), 0.3),
    "function": Measurement(Linear(lambda x: x.cumsum(1)[:, ::2], (D,)), rand(B, 3, seed=3), 0.3),
    "one for all": Measurement(Mask(torch.arange(D) % 2 == 0), rand(1, 3, seed=3), 0.3),
}
SCALE = torch.linspace(0.2, 0.6, B, dtype=F64)
METHODS: dict[str, Callable[[ss.denoisers.AbstractDenoiser, Measurement], PosteriorDenoiser]] = {
    "DPS": lambda model, seen: DPS(model, seen, SCALE),
    "DPS of time": lambda model, seen: DPS(model, seen, lambda t: SCALE),
    "DPS norm": lambda model, seen: DPS(model, seen, 0.3, norm=True),
    "PiGDM": PiGDM,
    "PiGDM no gradient": lambda model, seen: PiGDM(model, seen, through_net=False),
    "MMPS": MMPS,
    "TMPD": TMPD,
    "DDNM": DDNM,
    "DiffPIR": DiffPIR,
}
each_method = pytest.mark.parametrize("method", METHODS)
each_measurement = pytest.mark.parametrize("name", MEASUREMENTS)


def index(*rows: int) -> Tensor:
    return torch.tensor(rows)


# Rows of one evaluation.


@each_measurement
@each_method
def test_rows_are_rows_of_the_batch(method: str, name: str) -> None:
    model = METHODS[method](network(), MEASUREMENTS[name])
    x = rand(B, D, seed=1)
    for t in (0.4, torch.linspace(0.1, 0.9, B, dtype=F64)):
        whole = model.x0(x, t)
        for rows in (index(3), index(4, 0), index(2, 2, 1), torch.arange(B)):
            part = model.rows(rows).x0(x[rows], t[rows] if isinstance(t, Tensor) else t)
            if name == "function":  # conjugate gradients sum in an order that depends on the batch
                torch.testing.assert_close(part, whole[rows], rtol=1e-9, atol=1e-9)
            else:
                assert torch.equal(part, whole[rows]), rows


@each_method
def test_rows_leave_the_model_as_it_is(method: str) -> None:
    model = METHODS[method](network(), MEASUREMENTS["mask of each sample"])
    x = rand(B, D, seed=1)
    before = model.x0(x, 0.4)
    part = model.rows(index(1, 4))
    assert len(part.measurement.y) == 2 and len(model.measurement.y) == B
    assert part.model is model.model, "nothing of the network is copied"
    assert torch.equal(model.x0(x, 0.4), before)
    twice = part.rows(index(1))
    assert torch.equal(twice.x0(x[4:], 0.4), before[4:])


def test_one_measurement_for_all_needs_no_copy() -> None:
    model = MMPS(network(), MEASUREMENTS["one for all"])
    assert model.rows(index(1, 2)) is model


def test_rows_reach_conditions_and_counts() -> None:
    y = torch.poisson(3 * torch.ones(B, D, dtype=F64))
    seen = Counts(Operator(lambda x: 3 * (x + 4), (D,)), y)
    model = DPS(network().given(shift=torch.linspace(-1, 1, B, dtype=F64)), seen, SCALE)
    x, rows = rand(B, D, seed=1), index(3, 1)
    assert torch.equal(model.rows(rows).x0(x[rows], 0.4), model.x0(x, 0.4)[rows])
    assert torch.equal(seen.rows(rows).log_prob(x[rows]), seen.log_prob(x)[rows])


def test_a_posterior_denoiser_of_ones_own_names_what_belongs_to_samples() -> None:
    class Landweber(LinearPosteriorDenoiser):
        per_sample = (*LinearPosteriorDenoiser.per_sample, "step")
        step: Tensor

        def __init__(self, model: ss.denoisers.AbstractDenoiser, measurement: Measurement, step: Tensor) -> None:
            super().__init__(model, measurement)
            self.register_buffer("step", step)

        def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
            x0 = self.model.x0(x, t, **cond)
            return x0 + self.step[:, None] * self.A.adjoint(self.measurement.residual(x0))

    model = Landweber(network(), MEASUREMENTS["mask"], SCALE)
    x, rows = rand(B, D, seed=1), index(3, 1)
    whole = model.x0(x, 0.4)
    assert torch.equal(model.rows(rows).x0(x[rows], 0.4), whole[rows])
    assert torch.equal(model.x0(x, 0.4), whole), "a buffer of the model is not replaced"


def test_an_operator_of_ones_own_names_what_belongs_to_samples() -> None:
    class Gains(Linear):
        """A gain of its own for each sample."""

        gains: Tensor
        per_sample = ("gains",)

        def __init__(self, gains: Tensor) -> None:
            nn.Module.__init__(self)
            self.register_buffer("gains", gains)
            self.event = self.out = (D,)

        def evaluate(self, x: Tensor) -> Tensor:
            return self.gains.to(x)[:, None] * x

        def transpose(self, y: Tensor) -> Tensor:
            return self.evaluate(y)

        def extra_repr(self) -> str:
            return f"gains={tuple(self.gains.shape)}"

    seen = Measurement(Gains(SCALE), rand(B, D, seed=3), 0.3)
    assert f"{seen!r}" == "Measurement(Gains(gains=(5,)), y=(5, 6), std=0.3)"
    x, rows = rand(B, D, seed=1), index(3, 1)
    for make in (DPS, PiGDM, MMPS, TMPD, DiffPIR):
        model = make(network(), seen)
        torch.testing.assert_close(model.rows(rows).x0(x[rows], 0.4), model.x0(x, 0.4)[rows], rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"the operator has 5 rows and so no single matrix.*`A.rows\(index\)`"):
        DDNM(network(), seen).x0(x, 0.4)
    one = seen.rows(index(2))
    torch.testing.assert_close(one.linear.matrix(), SCALE[2] * torch.eye(D, dtype=F64))


@pytest.mark.parametrize("predicts", ["eps", "v", "x0"])
@each_method
def test_the_kind_of_the_network_is_seen(method: str, predicts: str) -> None:
    model = METHODS[method](network(predicts).given(shift=torch.zeros(1)), MEASUREMENTS["mask"])
    for part in (model, model.rows(index(0, 2)), model.counted(ss.denoisers.base.Counter())):
        assert part.kind.predicts == predicts and part.kind.sde == VP and not part.kind.exact
    exact = METHODS[method](mixture(), MEASUREMENTS["mask"])
    assert exact.kind.exact


# Runs: sample i of a batch equals sample i alone, with its own measurement.


def alone(
    model: ss.denoisers.AbstractDenoiser, x: Tensor, solver: Any, **options: Any
) -> tuple[Tensor, list[ss.Solution]]:
    """Each sample in a run of its own."""
    runs = [
        ss.solve(model.rows(index(i)), x[i : i + 1], solver, seed=ss.Noise(0, offset=i), **options)
        for i in range(len(x))
    ]
    return torch.cat([run.x for run in runs]), runs


@each_method
@pytest.mark.parametrize("name", ["mask", "mask of each sample"])
def test_error_control_gives_each_sample_its_own_run(method: str, name: str) -> None:
    seen = MEASUREMENTS[name]
    model = METHODS[method](network("x0").given(shift=torch.linspace(-0.5, 0.5, B, dtype=F64)), seen)
    x = rand(B, D, seed=2)
    whole = ss.solve(model, x, ss.Adaptive(rtol=1e-2, atol=1e-2))
    single, runs = alone(model, x, ss.Adaptive(rtol=1e-2, atol=1e-2))
    torch.testing.assert_close(whole.x, single, rtol=1e-9, atol=1e-9)
    assert whole.stats is not None
    nfe = [int(run.stats.nfe) for run in runs if run.stats is not None]
    assert whole.stats.nfe.tolist() == nfe
    assert method == "DPS norm" or len(set(nfe)) > 1, "samples differ in their steps"


@pytest.mark.parametrize("method", ["DPS", "PiGDM", "MMPS", "DDNM", "DiffPIR"])
def test_adaptive_sde_gives_each_sample_its_own_run(method: str) -> None:
    model = METHODS[method](network("x0"), MEASUREMENTS["mask of each sample"])
    x = rand(B, D, seed=2)
    rule = ss.integrators.AdaptiveSDE(rtol=0.1, atol=0.1, longest=0.5)
    whole = ss.solve(model, x, rule, seed=0)
    single, _ = alone(model, x, rule)
    torch.testing.assert_close(whole.x, single, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", [ss.DDIM(), ss.DDPM(), ss.UniPC(2), None], ids=repr)
@each_method
def test_plans_and_parallel_sweeps_agree(method: str, solver: Any) -> None:
    model = METHODS[method](network("x0"), MEASUREMENTS["mask of each sample"])
    x = rand(B, D, seed=2)
    whole = ss.sample(model, x, solver, steps=6, seed=0)
    single, _ = alone(model, x, solver, steps=6)
    torch.testing.assert_close(whole, single, rtol=1e-12, atol=1e-12)
    sweeps = ss.solve(model, x, ss.sampling.Parallel(solver, tol=0.0), steps=6, seed=0)
    torch.testing.assert_close(sweeps.x, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["DPS", "PiGDM", "MMPS", "TMPD", "DDNM", "DiffPIR"])
def test_likelihoods_are_those_of_each_sample(method: str) -> None:
    model = METHODS[method](network("x0"), MEASUREMENTS["mask of each sample"])
    x = 0.3 * rand(B, D, seed=2)
    whole = ss.log_prob(model, x).value
    single = torch.cat([ss.log_prob(model.rows(index(i)), x[i : i + 1]).value for i in range(B)])
    torch.testing.assert_close(whole, single, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("method", ["DPS", "PiGDM", "DDNM", "DiffPIR"])
def test_fits_in_parts_are_fits_of_the_whole(method: str) -> None:
    n = 12
    mask = EACH.rows(torch.arange(n) % B)
    seen = Measurement(mask, rand(n, *mask.out, seed=3), 0.3)
    make = {**METHODS, "DPS": lambda model, seen: DPS(model, seen, SCALE[torch.arange(n) % B])}[method]
    model = make(network("x0"), seen)
    plan = ss.VelocityAB(2).plan(VP, ss.grids.karras(VP, 4))
    teacher = ss.UniPC(2).plan(VP, ss.grids.karras(VP, 30))
    whole, parts = (
        ss.fit(plan, model, (n, D), steps=3, teacher=teacher, descent=ss.fitting.Descent(batch=batch))
        for batch in (None, 5)
    )
    for word in ("before", "after"):
        errors = [fitted.meta["held_out"][word]["mean_log"] for fitted in (whole, parts)]
        assert errors[0] == pytest.approx(errors[1], rel=1e-6)
    assert [float(row.t) for row in whole.rows] == pytest.approx([float(row.t) for row in parts.rows], rel=1e-6)


@pytest.mark.parametrize("sampler", [ddrm, daps, red_diff], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["mask", "mask of each sample", "down-sampling"])
def test_samplers_give_each_sample_its_own_run(sampler: Any, name: str) -> None:
    seen = MEASUREMENTS[name]
    model = network("x0").given(shift=torch.linspace(-0.5, 0.5, B, dtype=F64))
    whole = sampler(model, seen, (B, D), 5, seed=0)
    assert whole.x.dtype == F64, "the state follows the parameters of the network"
    for i in range(B):
        part = sampler(model.rows(index(i)), seen.rows(index(i)), (1, D), 5, seed=ss.Noise(0, offset=i))
        torch.testing.assert_close(part.x, whole.x[i : i + 1], rtol=1e-12, atol=1e-12)


# Counts of evaluations.


def test_samplers_return_one_solution_and_count_evaluations() -> None:
    seen, calls = Measurement(Matrix(rand(2, D)), rand(1, 2), 0.3), []

    def net(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return 0.5 * x

    model = ss.Denoiser(net, VP, predicts="x0")
    for run, nfe in (
        (lambda: ddrm(model, seen, (B, D), 6, seed=0), 6),
        (lambda: daps(model, seen, (B, D), 4, steps=3, seed=0), 10),
        (lambda: red_diff(model, seen, (B, D), 7, seed=0), 7),
        (lambda: ss.inverse.twisted_smc(model, seen, (B, D), 6, seed=0), 6),
    ):
        calls.clear()
        solution = run()
        assert isinstance(solution, ss.Solution)
        assert solution.nfe == solution.calls == len(calls) == nfe, solution
        assert solution.seed == 0 and solution.times[0] == VP.T and solution.x.dtype == torch.float32
    assert "tensor" not in f"{solution!r}"


def test_samplers_start_where_solve_starts() -> None:
    seen = Measurement(Matrix(rand(2, D)), rand(1, 2), 0.3)
    model = ss.Denoiser(lambda x, t: 0.5 * x, VP, predicts="x0")
    start = ss.Start(data_std=0.5, dtype=F64)
    x = start.draw(model, (B, D), 0.9, ss.Noise(4))
    times = ss.grids.uniform_t(VP, 3, t_start=0.9)
    for sampler in (daps, ss.inverse.twisted_smc):
        a, b = sampler(model, seen, (B, D), times, start=start, seed=4), sampler(model, seen, x, times, seed=4)
        assert a.x.dtype == F64 and torch.equal(a.x, b.x)
    gaussian = ss.Gaussian(VP, torch.zeros(D), torch.full((D,), 0.5))
    for sampler in (ddrm, daps, ss.inverse.twisted_smc):
        assert sampler(model, seen, (B, D), times, start=gaussian, seed=4).x.isfinite().all()
    for sampler in (ddrm, daps, red_diff, ss.inverse.twisted_smc):
        with pytest.raises(TypeError, match=r"`start` must be a Start.* or None"):
            sampler(model, seen, (B, D), 3, start=0.5)
        with pytest.raises(TypeError, match="unexpected keyword argument 'label'"):
            sampler(model, seen, (B, D), 3, label=1)


def test_noise_of_a_stochastic_inner_solver_has_the_seed_of_the_run() -> None:
    seen = Measurement(Matrix(rand(2, D)), rand(1, 2), 0.3)
    a, b, c = (daps(mixture(), seen, (B, D), 3, solver=ss.DDPM(), seed=s).x for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
