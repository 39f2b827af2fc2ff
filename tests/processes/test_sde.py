"""Processes: what follows from α and σ does follow, to the last digits."""

from __future__ import annotations

import math

import mpmath as mp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instances import EXACT, SDES, VP_BY_HAND, inner_times
from torch import Tensor

import scoresde as ss
from scoresde.processes.sde import derivative

ALL = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())


class Half(ss.denoisers.AbstractDenoiser):
    """A denoiser that needs nothing but the state."""

    def x0(self, x: Tensor, t: float | Tensor, **cond: object) -> Tensor:
        return x / 2


def relative(a: Tensor, b: Tensor, scale: float = 0.0) -> float:
    return float(((a - b).abs() / (b.abs() + scale).clamp_min(1e-300)).max())


@ALL
def test_f_and_g2_equal_automatic_differentiation(sde: ss.SDE) -> None:
    t = inner_times(sde)
    f = derivative(lambda s: sde.alpha(s).log(), t)
    sigma2 = derivative(lambda s: sde.sigma(s) ** 2, t)
    g2 = sigma2 - 2 * f * sde.sigma(t) ** 2
    assert relative(sde.f(t), f, scale=1e-6) < 1e-9, sde
    # The subtraction above cancels where SubVP's noise is small; compare at the size of its terms.
    size = sigma2.abs() + (2 * f * sde.sigma(t) ** 2).abs()
    assert float(((sde.g2(t) - g2).abs() / size).max()) < 1e-9, sde
    lam = derivative(lambda s: sde.lam(s), t)
    assert relative(sde.g2(t), -2 * sde.sigma(t) ** 2 * lam) < 1e-9, sde


@ALL
def test_f_and_g2_equal_finite_differences(sde: ss.SDE) -> None:
    t = inner_times(sde, 37)
    h = (1e-4 * t).clamp_max(1e-3)
    f = (sde.log_alpha(t + h) - sde.log_alpha(t - h)) / (2 * h)
    g2 = -(sde.sigma(t) ** 2) * (sde.lam(t + h) - sde.lam(t - h)) / h
    assert relative(sde.f(t), f, scale=1e-3) < 1e-6, sde
    assert relative(sde.g2(t), g2) < 1e-6, sde


@ALL
def test_lam_falls_and_its_inverse_returns_it(sde: ss.SDE) -> None:
    # α = 0 at T leaves λ = −∞ there; a float time next to T can tell λ apart down to about −12.
    first, last = sde.lam(1e-7 * sde.T), max(sde.lam(sde.T), -12.0)
    lam = torch.linspace(last, first, 501, dtype=torch.float64)
    t = sde.t_of_lam(lam)
    assert bool((t.diff() < 0).all()), sde
    assert float((sde.lam(t) - lam).abs().max()) < 1e-10, sde
    sigma = sde.sigma(torch.linspace(1e-6, 1, 101, dtype=torch.float64) * sde.T)
    assert relative(sde.sigma(sde.t_of_sigma(sigma)), sigma) < 1e-10, sde


@ALL
def test_inverse_of_the_ends_is_the_ends(sde: ss.SDE) -> None:
    assert sde.sigma(0.0) == 0.0, "no noise at data"
    assert sde.alpha(0.0) == 1.0
    assert sde.lam(0.0) == math.inf
    assert sde.t_of_lam(math.inf) == 0.0
    assert math.isclose(sde.t_of_lam(sde.lam(sde.T)), sde.T, rel_tol=1e-12)


@ALL
def test_numbers_scalars_and_vectors_agree(sde: ss.SDE) -> None:
    t = inner_times(sde, 5)
    for name in ("alpha", "sigma", "log_alpha", "log_sigma", "lam", "f", "g", "g2", "alpha_dot", "sigma_dot"):
        fn = getattr(sde, name)
        vector = fn(t)
        assert vector.shape == t.shape and vector.dtype == torch.float64
        for i, s in enumerate(t.tolist()):
            assert type(fn(s)) is float
            scalar = fn(torch.tensor(s, dtype=torch.float64))
            assert scalar.shape == ()
            assert math.isclose(fn(s), vector[i].item(), rel_tol=1e-13, abs_tol=1e-300), (sde, name)
            assert scalar.item() == fn(s), (sde, name)
        assert fn(t.float()).dtype == torch.float32


@ALL
def test_gradients_with_respect_to_time_flow_through(sde: ss.SDE) -> None:
    t = inner_times(sde, 7).requires_grad_()
    (got,) = torch.autograd.grad(sde.sigma(t).sum(), t)
    assert relative(got, sde.sigma_dot(t.detach())) < 1e-12
    lam = sde.lam(t.detach()).requires_grad_()
    (dt,) = torch.autograd.grad(sde.t_of_lam(lam).sum(), lam)
    assert relative(1 / dt, derivative(sde.lam, t.detach())) < 1e-8, sde


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_derivatives_work_where_gradients_are_off(mode: type) -> None:
    want = VP_BY_HAND.g2(0.3)
    with mode():
        assert VP_BY_HAND.g2(0.3) == want
        assert VP_BY_HAND.g2(torch.tensor([0.3], dtype=torch.float64)).item() == want


@pytest.mark.parametrize("name", EXACT)
def test_alpha_and_sigma_equal_high_precision_arithmetic(name: str) -> None:
    sde = SDES[name]
    with mp.workdps(60):
        for k in range(61):
            t = float(sde.T * 10 ** (-6 + k / 10)) if k < 60 else sde.T
            alpha, sigma = EXACT[name](mp.mpf(t))
            assert abs(mp.mpf(sde.sigma(t)) / sigma - 1) < 1e-12, (name, t)
            if alpha > 1e-40:
                # Near T the float t itself decides how well a vanishing α is known.
                slack = 1e-12 + 4e-16 * t / (1 - t) if name in ("Trig", "Polynomial", "Cosine") and t < 1 else 1e-12
                assert abs(mp.mpf(sde.alpha(t)) / alpha - 1) < slack, (name, t)


@pytest.mark.parametrize("N", [10, 1000])
def test_sigma_of_a_discrete_process_equals_high_precision_arithmetic(N: int) -> None:
    betas = ss.processes.betas("linear", N)
    sde = ss.Discrete(betas)
    with mp.workdps(60):
        product = mp.mpf(1)
        for i, beta in enumerate(betas.tolist()):
            product *= 1 - mp.mpf(beta)
            assert abs(mp.mpf(sde.sigma(i + 1.0)) / mp.sqrt(1 - product) - 1) < 1e-12, i
            assert abs(mp.mpf(sde.alpha(i + 1.0)) / mp.sqrt(product) - 1) < 1e-12, i


def test_float32_keeps_sigma_near_data() -> None:
    t = torch.logspace(-5, -1, 100)
    for name in ("VP", "SubVP", "VE", "Cosine", "Flow", "Trig"):
        sde = SDES[name]
        assert relative(sde.sigma(t).double(), sde.sigma(t.double())) < 2e-6, name
        assert float((sde.lam(t).double() - sde.lam(t.double())).abs().max()) < 3e-6, name


@ALL
def test_forward_simulation_reproduces_the_moments(sde: ss.SDE) -> None:
    # Mean m and variance v of dx = f x dt + g dw obey m' = f m, v' = 2 f v + g²: integrate both by Gauss–Legendre
    # collocation between two times and compare with the exact transition. No Monte Carlo, so the test is sharp.
    s, end = 0.05 * sde.T, 0.9 * sde.T
    edges = torch.linspace(s, end, 4001, dtype=torch.float64)
    if isinstance(sde, ss.Discrete):  # β jumps at the steps: end the cells there
        edges = torch.cat([edges, torch.arange(math.ceil(s), math.floor(end) + 1, dtype=torch.float64)]).unique()
    h, mid = edges.diff(), (edges[1:] + edges[:-1]) / 2
    node = h[:, None] / 2 / math.sqrt(3) * torch.tensor([-1.0, 1.0], dtype=torch.float64)
    t = (mid[:, None] + node).reshape(-1)
    area = (h[:, None] / 2).expand(-1, 2).reshape(-1)
    f, g2 = sde.f(t), sde.g2(t)
    log_scale = (f * area).sum()
    later = sde.log_alpha(edges[-1]) - sde.log_alpha(t)  # ∫ f from t to the end
    variance = (g2 * (2 * later).exp() * area).sum()
    scale, std = sde.transition(s, end)
    assert math.isclose(log_scale.exp().item(), scale, rel_tol=1e-6), sde
    assert math.isclose(variance.item(), std**2, rel_tol=1e-6), sde


@pytest.mark.parametrize("name", ["VP", "SubVP", "VE", "EDM", "Flow", "two functions"])
def test_simulated_paths_have_the_mean_and_variance_of_the_marginal(name: str) -> None:
    sde = SDES[name]
    n, steps, end = 20_000, 400, 0.6 * sde.T
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 2 * end
    noise = ss.Noise(3)
    x = torch.full((n, 1), 1.5, dtype=torch.float64)
    for i, (s, t) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
        m = (s + t) / 2  # drift and diffusion at the middle of the step: the bias is O(h²)
        half = x + sde.f(m) * x * (t - s) / 2
        x = x + sde.f(m) * half * (t - s) + sde.g(m) * (t - s) ** 0.5 * noise.like(x, i)
    sigma = sde.sigma(end)
    assert abs(x.mean().item() - 1.5 * sde.alpha(end)) < 5 * sigma / n**0.5
    assert abs(x.var().item() / sigma**2 - 1) < 5 * (2 / n) ** 0.5 + 1e-3


@ALL
def test_transitions_compose_and_posteriors_are_bayes(sde: ss.SDE) -> None:
    r, s, t = (u * sde.T for u in (0.1, 0.37, 0.8))
    (a, p), (b, q), (c, v) = sde.transition(r, s), sde.transition(s, t), sde.transition(r, t)
    assert math.isclose(a * b, c, rel_tol=1e-12)
    assert math.isclose((b * p) ** 2 + q**2, v**2, rel_tol=1e-10)
    assert math.isclose(sde.transition(0.0, s)[1], sde.sigma(s), rel_tol=1e-12)
    assert sde.transition(s, s) == (1.0, 0.0)
    # Bayes: precision of x_s given x_t and x_0 is 1/σ_s² + b²/q².
    of_xt, of_x0, variance = sde.posterior(s, t)
    precision = 1 / sde.sigma(s) ** 2 + b**2 / q**2
    assert math.isclose(variance, 1 / precision, rel_tol=1e-9)
    assert math.isclose(of_xt, b / q**2 / precision, rel_tol=1e-9)
    assert math.isclose(of_x0, sde.alpha(s) / sde.sigma(s) ** 2 / precision, rel_tol=1e-9)
    # Into data, the posterior is data.
    assert sde.posterior(0.0, t) == (0.0, 1.0, 0.0)


@ALL
@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 2, 3), (6, 1, 2, 3), (6, 1, 2, 2, 3)])
def test_states_of_any_shape_with_one_time_or_one_for_each_row(sde: ss.SDE, shape: tuple[int, ...]) -> None:
    x0, eps = (ss.Noise(i).normal(shape, 0, dtype=torch.float64) for i in range(2))
    t = 0.4 * sde.T
    vector = torch.full((6,), t, dtype=torch.float64)
    model = Half(sde)
    for fn in (
        lambda t: sde.perturb(x0, t, eps),
        lambda t: ss.denoisers.Reverse(model, 0.5).drift(x0, t),
        lambda t: ss.denoisers.Reverse(model, 0.0).drift(x0, t),
    ):
        assert fn(t).shape == shape
        assert relative(fn(vector), fn(t)) < 1e-12
        assert relative(fn(torch.tensor(t, dtype=torch.float64)), fn(t)) < 1e-12
    mixed = torch.linspace(0.1, 0.9, 6, dtype=torch.float64) * sde.T
    rows = torch.stack([sde.perturb(x0[i : i + 1], mixed[i].item(), eps[i : i + 1])[0] for i in range(6)])
    assert relative(sde.perturb(x0, mixed, eps), rows) < 1e-12


def test_empty_single_strided_and_float32_states() -> None:
    sde = ss.VP()
    assert sde.perturb(torch.zeros(0, 3), 0.5).shape == (0, 3)
    assert sde.perturb(torch.zeros(0, 3), torch.zeros(0)).shape == (0, 3)
    x = torch.arange(12.0).reshape(3, 4).T
    eps = torch.ones(4, 3)
    assert torch.equal(sde.perturb(x, 0.5, eps), sde.perturb(x.contiguous(), 0.5, eps))
    t64 = torch.full((4,), 0.5, dtype=torch.float64)
    assert sde.perturb(x, t64, eps).dtype == torch.float32, "a float64 time does not change the state's dtype"


@ALL
def test_reverse_family_keeps_a_gaussian_marginal(sde: ss.SDE) -> None:
    # With data N(0, c) the marginal variance is V = α²c + σ²; its reverse drift is k(t) x and dV/dt = 2 k V − η² g².
    c, t = 0.7, 0.43 * sde.T
    V = lambda s: sde.alpha(s) ** 2 * c + sde.sigma(s) ** 2  # noqa: E731
    tensor = torch.tensor([t], dtype=torch.float64)
    dV = derivative(V, tensor).item()
    x = torch.ones(1, 1, dtype=torch.float64)
    data = ss.GaussianMixture(sde, [[0.0]], std=c**0.5)
    for eta in (0.0, 0.3, 1.0, 2.0):
        reverse = ss.denoisers.Reverse(data, eta)
        k, g = reverse.drift(x, t).item(), reverse.diffusion(t)
        assert isinstance(g, float)
        assert math.isclose(2 * k * V(t) - g**2, dV, rel_tol=1e-9, abs_tol=1e-9 * abs(2 * k * V(t))), (sde, eta)
    assert torch.equal(ss.denoisers.Reverse(data, 0.0).drift(x, t), data.velocity(x, t))
    assert ss.denoisers.Reverse(data).diffusion(t) == sde.g(t)


@pytest.mark.parametrize("name", ["VP", "VE", "Flow"])
@pytest.mark.parametrize("start", [1.0, 0.7, 0.3])
def test_prior_has_the_moments_of_the_marginal_at_the_real_start(name: str, start: float) -> None:
    sde = SDES[name]
    mean, std = 0.8, 0.5
    alpha, sigma = sde.alpha(start), sde.sigma(start)
    visible = (alpha * std / sigma) ** 2 > 0.01
    if visible:
        with pytest.warns(UserWarning, match="too high for a Gaussian prior"):
            prior = sde.prior(start, mean=mean, std=std)
    else:
        prior = sde.prior(start, mean=mean, std=std)
    assert math.isclose(prior.snr, (alpha * std / sigma) ** 2)
    n = 40_000
    z = prior.sample((n, 2), ss.Noise(1), dtype=torch.float64)
    x0 = mean + std * ss.Noise(2).normal((n, 2), 0, dtype=torch.float64)
    x = sde.perturb(x0, start, ss.Noise(3).normal((n, 2), 0, dtype=torch.float64))
    scale = x.std().item()
    assert abs(z.mean().item() - x.mean().item()) < 5 * scale / n**0.5
    assert abs(z.std().item() / scale - 1) < 5 / n**0.5
    normal = torch.distributions.Normal(*torch.tensor([prior.mean, prior.std], dtype=torch.float64))
    assert torch.allclose(prior.log_prob(z), normal.log_prob(z).sum(1), rtol=1e-12)


def test_prior_of_pure_noise_and_of_no_samples() -> None:
    assert ss.EDM().prior(std=0.0).std == 80.0
    prior = ss.Flow().prior()
    assert (prior.mean, prior.std, prior.snr) == (0.0, 1.0, 0.0)
    assert prior.log_prob(torch.zeros(0, 3)).shape == (0,)


def test_polynomial_of_degree_one_is_flow_and_shift_on_flow_is_the_published_time_shift() -> None:
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    for name in ("alpha", "sigma", "f", "g2", "lam"):
        assert torch.allclose(getattr(ss.processes.Polynomial(), name)(t), getattr(ss.Flow(), name)(t), rtol=1e-12)
    shifted = SDES["Shifted"]
    assert torch.allclose(shifted.base_time(t), 3 * t / (1 + 2 * t), rtol=1e-12)
    assert math.isclose(shifted.lam(0.3), ss.Flow().lam(0.3) - math.log(3), rel_tol=1e-12)


def test_shifted_process_ends_where_its_base_ends() -> None:
    base, shifted = ss.VP(), ss.processes.Shifted(ss.VP(), 2.0)
    assert shifted.T < 1
    assert math.isclose(shifted.lam(shifted.T), base.lam(base.T), rel_tol=1e-12)
    assert math.isclose(shifted.lam(shifted.t_min), base.lam(base.t_min), rel_tol=1e-12)
    assert ss.processes.Shifted(ss.Flow(), 3.0).T == 1.0


@given(st.floats(0.05, 5.0), st.floats(0.1, 30.0), st.floats(1e-4, 1.0))
def test_vp_of_any_beta_inverts(beta_min: float, beta_max: float, t: float) -> None:
    sde = ss.VP(beta_min=beta_min, beta_max=beta_max)
    assert math.isclose(sde.lam(sde.t_of_lam(sde.lam(t))), sde.lam(t), abs_tol=1e-10)
    assert math.isclose(sde.alpha(t) ** 2 + sde.sigma(t) ** 2, 1.0, rel_tol=1e-14)


def test_processes_are_values() -> None:
    assert ss.VP() == ss.VP(0.1, 20.0)
    assert ss.VP() != ss.VP(0.1, 19.0)
    assert len({ss.VP(), ss.VP(), ss.EDM()}) == 2
    assert "t_min=0.001" in repr(ss.VP()), "the working interval is visible"
    with pytest.raises(AttributeError):
        ss.VP().beta_max = 3.0  # type: ignore[misc]


def test_a_subclass_needs_two_methods() -> None:
    class Mine(ss.SDE):
        def _alpha(self, t: Tensor) -> Tensor:
            return (1 - t) ** 0.5

        def _sigma(self, t: Tensor) -> Tensor:
            return t**0.5

    sde = Mine()
    assert math.isclose(sde.g2(0.25), 1.0 + 0.25 / 0.75, rel_tol=1e-12)
    assert math.isclose(sde.t_of_lam(0.0), 0.5, rel_tol=1e-12)

    with pytest.raises(TypeError, match="must define `_sigma"):

        class Half(ss.SDE):
            def _alpha(self, t: Tensor) -> Tensor:
                return 1 - t


def test_g2_at_data_is_the_limit_where_sigma_is_a_root() -> None:
    assert math.isclose(VP_BY_HAND.g2(0.0), 0.1, rel_tol=1e-5)
    assert ss.VP().g2(0.0) == 0.1


BAD_TIMES = {
    "above T": (1.1, ValueError, r"`t` must lie in \[0, 1\].*got 1.1"),
    "negative": (-0.1, ValueError, "got -0.1"),
    "nan": (float("nan"), ValueError, "got nan"),
    "one bad of many": (torch.tensor([0.5, 1.5]), ValueError, "got 1.5"),
    "half": (torch.tensor(0.5).half(), TypeError, "float16.*half precision"),
    "bfloat16": (torch.tensor(0.5).bfloat16(), TypeError, "bfloat16"),
    "integer tensor": (torch.tensor([1, 2]), TypeError, "index is not a time"),
    "complex": (torch.tensor(0.5 + 0j), TypeError, "complex64"),
    "matrix": (torch.full((2, 2), 0.5), ValueError, r"shape \(2, 2\)"),
    "string": ("0.5", TypeError, "got str"),
    "none": (None, TypeError, "got NoneType"),
    "bool": (True, TypeError, "got bool"),
}


@pytest.mark.parametrize("case", BAD_TIMES)
def test_bad_times_raise_at_the_door(case: str) -> None:
    t, error, message = BAD_TIMES[case]
    for fn in (ss.VP().alpha, ss.VP().g, ss.VP().lam, lambda t: ss.VP().perturb(torch.zeros(2, 3), t)):
        with pytest.raises(error, match=message):
            fn(t)


def test_rounding_outside_the_interval_is_taken_back() -> None:
    assert ss.Flow().alpha(1.0 + 1e-9) == 0.0
    assert ss.Flow().sigma(-1e-12) == 0.0
    assert ss.EDM().sigma(torch.tensor(80.000004)) == 80.0


x23 = torch.zeros(2, 3)
BAD_CALLS = {
    "wrong number of times": (lambda: ss.VP().perturb(x23, torch.ones(3) / 2), ValueError, "3 entries.*2 rows"),
    "integer state": (lambda: ss.VP().perturb(torch.zeros(2, 3, dtype=torch.int64), 0.5), TypeError, "int64"),
    "half state": (lambda: ss.VP().perturb(x23.half(), 0.5), TypeError, "float16"),
    "complex state": (lambda: ss.VP().perturb(torch.zeros(2, dtype=torch.complex64), 0.5), TypeError, "view_as_real"),
    "scalar state": (lambda: ss.VP().perturb(torch.tensor(1.0), 0.5), ValueError, "scalar"),
    "list as state": (lambda: ss.VP().perturb([1.0], 0.5), TypeError, "got list"),  # type: ignore[arg-type]
    "noise of another shape": (lambda: ss.VP().perturb(x23, 0.5, torch.zeros(2, 1)), ValueError, r"`eps`.*\(2, 3\)"),
    "noise of another device": (
        lambda: ss.VP().perturb(x23, 0.5, torch.zeros(2, 3, device="meta")),
        ValueError,
        "`eps` is on meta and `x0` on cpu",
    ),
    "time of another device": (
        lambda: ss.VP().perturb(x23, torch.zeros(2, device="meta")),
        ValueError,
        "`t` is on meta",
    ),
    "time of another length": (lambda: ss.VP().perturb(x23, torch.zeros(3)), ValueError, "`t` has 3 entries and .* 2"),
    "negative eta": (lambda: ss.denoisers.Reverse(Half(ss.VP()), -1.0), ValueError, "`eta` must be .*at least 0"),
    "negative beta": (lambda: ss.VP(beta_min=-1.0), ValueError, "`beta_min`.*above 0, got -1.0"),
    "beta that becomes negative": (lambda: ss.VP(beta_min=1.0, beta_max=0.1, T=2.0), ValueError, "β negative"),
    "sigma_max below sigma_min": (lambda: ss.VE(sigma_min=2.0, sigma_max=1.0), ValueError, "`sigma_max`.*above 2"),
    "T not positive": (lambda: ss.VP(T=0.0), ValueError, "`T`.*above 0"),
    "T not finite": (lambda: ss.EDM(T=math.inf), ValueError, "`T`.*finite"),
    "T not a number": (lambda: ss.EDM(T="80"), TypeError, r"`T` must be a number, got '80' \(str\)"),  # type: ignore[arg-type]
    "flow past its end": (lambda: ss.Flow(T=1.5), ValueError, "`T`.*at most 1"),
    "t_min past T": (lambda: ss.VP(t_min=2.0), ValueError, "`t_min`.*below 1"),
    "shift of nothing": (lambda: ss.processes.Shifted(ss.Flow(), 0.0), ValueError, "`shift`"),
    "shift that loses the end": (lambda: ss.processes.Shifted(ss.VP(), 0.5), ValueError, "at least 1"),
    "noise falls": (
        lambda: ss.SDE.from_functions(lambda t: 1 - t / 2, lambda t: 1 - t),
        ValueError,
        r"must fall with t.*at t = \d",
    ),
    "data at T": (lambda: ss.SDE.from_functions(lambda t: t, lambda t: 1 - t), ValueError, "reverse its time"),
    "constant as number": (
        lambda: ss.SDE.from_functions(lambda t: 1.0, lambda t: t),  # type: ignore[arg-type, return-value]
        ValueError,
        "full_like",
    ),
    "negative sigma": (
        lambda: ss.SDE.from_functions(lambda t: 1 - t, lambda t: t - 0.1),
        ValueError,
        "`sigma` must be finite and not negative",
    ),
    "drift infinite at the end": (
        lambda: ss.SDE.from_drift(lambda t: -1 / (1 - t), lambda t: (2 * t / (1 - t)).sqrt()),
        ValueError,
        "smaller `T`",
    ),
    "lam out of reach": (lambda: ss.VP().t_of_lam(-10.0), ValueError, r"`lam` must lie in \[-5.0"),
    "sigma out of reach": (lambda: ss.VP().t_of_sigma(1.5), ValueError, "`sigma` must lie in"),
    "transition back in time": (lambda: ss.VP().transition(0.5, 0.2), ValueError, "`s` must not lie after `t`"),
    "prior at data": (lambda: ss.VP().prior(0.0), ValueError, "`t` must be .*above 0"),
    "negative data std": (lambda: ss.VP().prior(std=-1.0), ValueError, "`std`"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_say_what_is_wrong_and_how_to_mend_it(case: str) -> None:
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("base", [ss.Flow(), ss.Trig(), ss.Cosine(T=1.0)], ids=lambda sde: type(sde).__name__)
def test_a_shifted_process_without_signal_at_its_end_has_infinite_coefficients_there(base: ss.SDE) -> None:
    sde = ss.processes.Shifted(base, 3.0)
    assert sde.f(sde.T) == -math.inf and sde.g2(sde.T) == sde.g(sde.T) == math.inf
    t = torch.tensor([0.9, 0.999], dtype=torch.float64)
    u = sde.base_time(t)
    speed = sde.lam(t + 1e-7) - sde.lam(t - 1e-7)
    speed = speed / (base.lam(u + 1e-7) - base.lam(u - 1e-7))
    assert relative(sde.f(t), base.f(u) * speed) < 1e-6 and relative(sde.g2(t), base.g2(u) * speed) < 1e-6
