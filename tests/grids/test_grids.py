"""Grids: N steps are N steps, ends are to the bit, and every rule is its published formula."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from instances import SDES
from torch import Tensor

import scoresde as ss
from scoresde import grids
from scoresde.grids.spacings import beta_inverse

F64 = torch.float64
Builder = Callable[..., Tensor]

# Rules in t reach 0 themselves; rules in λ or σ/α step to t_min and then to 0.
IN_TIME: dict[str, Builder] = {
    "uniform_t": grids.uniform_t,
    "power_t": grids.power_t,
    "power_t 5": functools.partial(grids.power_t, exponent=5.0),
    "beta_quantile": grids.beta_quantile,
    "beta_quantile 2 1": functools.partial(grids.beta_quantile, a=2.0, b=1.0),
    "cosine": grids.cosine,
    "shifted": functools.partial(grids.shifted, shift=3.0),
    "flow_time": grids.flow_time,
    "flow_time 2": functools.partial(grids.flow_time, exponent=2.0),
    "log_noise": grids.log_noise,
    "log_noise 1.5": functools.partial(grids.log_noise, scale=2.0, exponent=1.5),
    "log_noise of power 7": functools.partial(grids.log_noise, scale=0.1, exponent=1.5, power=7.0),
}
IN_LAM: dict[str, Builder] = {
    "uniform_lam": grids.uniform_lam,
    "polyexponential": functools.partial(grids.polyexponential, rho=2.0),
    "polyexponential 0.5": functools.partial(grids.polyexponential, rho=0.5),
    "karras": grids.karras,
    "karras 1": functools.partial(grids.karras, rho=1.0),
    "quadratic_vp": grids.quadratic_vp,
}
BUILDERS = {**IN_TIME, **IN_LAM}
EVERY = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
EVERY_IN_LAM = pytest.mark.parametrize("build", IN_LAM.values(), ids=IN_LAM.keys())
ALL = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())

SLOW = "VP by drift"  # inverted by bisection of a quadrature
FAST = {name: sde for name, sde in SDES.items() if name != SLOW}
MOST = pytest.mark.parametrize("sde", FAST.values(), ids=FAST.keys())
NO_SIGNAL_LEFT = [name for name, sde in SDES.items() if sde.alpha(sde.T) == 0]
STEPS = (1, 2, 3, 17, 61, 103, 121, 1000)


def is_grid(times: Tensor, steps: int, start: float, end: float) -> bool:
    """What every grid owes."""
    shape = times.shape == (steps + 1,) and times.dtype == F64 and times.device.type == "cpu"
    ends = times[0].item() == start and times[-1].item() == end  # to the bit
    return shape and ends and bool(times.isfinite().all()) and bool((times.diff() < 0).all())


@ALL
@EVERY
def test_n_steps_are_n_steps_from_the_first_to_the_last_time(build: Builder, sde: ss.SDE) -> None:
    for n in (1, 3) if sde is SDES[SLOW] else STEPS:
        times = build(sde, n)
        assert is_grid(times, n, sde.T, 0.0), n
        if build in IN_LAM.values() and n > 1:
            assert times[-2].item() == sde.t_min, n
        assert torch.equal(grids.check_grid(sde, times), times), n


@pytest.mark.parametrize(
    ("build", "sde"),
    [
        (grids.uniform_t, ss.Flow()),
        (grids.uniform_lam, ss.VP()),
        (grids.karras, ss.EDM()),
        (functools.partial(grids.shifted, shift=3.0), ss.Flow()),
    ],
)
def test_any_number_of_steps_up_to_1000(build: Builder, sde: ss.SDE) -> None:
    for n in range(1, 1001):
        assert is_grid(build(sde, n), n, sde.T, 0.0), n


@pytest.mark.parametrize("name", FAST)
@EVERY
def test_start_and_stop_anywhere(build: Builder, name: str) -> None:
    sde = SDES[name]
    for start, end in ((0.7, 0.0), (0.31, 1e-4), (1.0, 0.9995), (1e-3, 1e-5)):
        a, b = (sde.T if start == 1 else start * sde.T), end * sde.T
        room = {"t_min": 1e-3 * a} if build in IN_LAM.values() and b == 0 else {}
        for n in (1, 2, 23):
            times = build(sde, n, t_start=a, t_end=b, **room)
            assert is_grid(times, n, a, b), (a, b, n)
            if room and n > 1:
                assert times[-2].item() == 1e-3 * a


@given(
    st.sampled_from(sorted(BUILDERS)),
    st.sampled_from(sorted(FAST)),
    st.integers(1, 200),
    st.floats(1e-3, 1.0),
    st.floats(1e-3, 0.999),
)
def test_any_rule_on_any_process_between_any_times(name: str, sde: str, n: int, start: float, end: float) -> None:
    process = SDES[sde]
    a = start * process.T
    assume(a <= process.T)
    assert is_grid(BUILDERS[name](process, n, t_start=a, t_end=end * a), n, a, end * a)


@EVERY
def test_more_steps_than_floats_are_refused_with_the_index(build: Builder) -> None:
    end = math.nextafter(math.nextafter(0.5, 0), 0)
    with pytest.raises(ValueError, match=r"100 `steps` between 0.5 and 0.5 are too many .*at index \d+ do not.*fewer"):
        build(ss.VP(), 100, t_start=0.5, t_end=end)
    assert is_grid(build(ss.VP(), 1, t_start=0.5, t_end=end), 1, 0.5, end), "one step always fits"


# Formulas.


def inner(times: Tensor) -> Tensor:
    """A λ-type grid without its last step, to 0."""
    return times[:-1]


def even(x: Tensor, rel: float = 1e-9) -> bool:
    steps = x.diff()
    return float((steps / steps.mean() - 1).abs().max()) < rel


@pytest.mark.parametrize("n", [1, 2, 7, 50, 1000])
def test_uniform_and_power_grids_are_linspace_of_a_root_of_t(n: int) -> None:
    for sde in (ss.VP(), ss.EDM(), ss.Cosine()):
        assert np.allclose(grids.uniform_t(sde, n), np.linspace(sde.T, 0, n + 1), rtol=1e-15, atol=1e-15 * sde.T)
        for k in (0.5, 1.0, 2.0, 3.0):
            want = np.linspace(sde.T ** (1 / k), 1e-2 ** (1 / k), n + 1) ** k
            assert np.allclose(grids.power_t(sde, n, k, t_end=1e-2), want, rtol=1e-12), k
        assert torch.equal(grids.power_t(sde, n, 1.0), grids.uniform_t(sde, n)), "power 1 is uniform"


@MOST
def test_uniform_lam_is_even_in_lam_and_geometric_in_sigma_over_alpha(sde: ss.SDE) -> None:
    times = inner(grids.uniform_lam(sde, 40))
    reached = times[1:] if sde.alpha(sde.T) == 0 else times
    assert even(sde.lam(reached)), sde
    ratio = sde.sigma(reached) / sde.alpha(reached)
    assert float((ratio[1:] / ratio[:-1]).log().std()) < 1e-8, sde
    first = sde.lam(0.999 * sde.T if sde.alpha(sde.T) == 0 else sde.T)  # what stands for λ = −∞
    assert math.isclose(sde.lam(reached[-1]) - sde.lam(reached[-2]), (sde.lam(sde.t_min) - first) / 39)
    window = grids.uniform_lam(sde, 10, t_start=0.9 * sde.T, t_end=0.2 * sde.T)
    assert even(sde.lam(window)), "with a positive end every step is even"


@pytest.mark.parametrize("rho", [0.5, 1.0, 3.0])
def test_polyexponential_is_a_power_of_even_steps_in_lam(rho: float) -> None:
    for sde in (ss.VP(), ss.VE(), ss.EDM(), ss.Cosine()):
        last, first = sde.lam(sde.t_min), sde.lam(sde.T)
        want = last - np.linspace(1, 0, 20) ** rho * (last - first)
        assert np.allclose(sde.lam(inner(grids.polyexponential(sde, 20, rho))), want, rtol=1e-9, atol=1e-9), sde
        if rho == 1:
            assert torch.equal(grids.polyexponential(sde, 20, rho), grids.exponential(sde, 20))


@pytest.mark.parametrize(
    ("n", "rho", "low", "high"), [(18, 7.0, 0.002, 80.0), (10, 7.0, 0.03, 14.6), (5, 3.0, 0.1, 1.0)]
)
def test_karras_on_edm_is_the_papers_formula(n: int, rho: float, low: float, high: float) -> None:
    i = np.arange(n)
    sigma = (high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    times = grids.karras(ss.EDM(T=high, t_min=low), n, rho)
    assert np.allclose(times, [*sigma, 0.0], rtol=1e-13)
    assert np.allclose(grids.karras(ss.EDM(), n, rho, t_start=high, t_min=low), [*sigma, 0.0], rtol=1e-13)
    assert np.allclose(grids.karras(ss.EDM(), n - 1, rho, t_start=high, t_end=low), sigma, rtol=1e-13)


@MOST
@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_karras_on_any_process_is_karras_in_sigma_over_alpha(sde: ss.SDE, rho: float) -> None:
    start = 0.95 * sde.T
    times = grids.karras(sde, 12, rho, t_start=start)
    root = (sde.sigma(inner(times)) / sde.alpha(inner(times))) ** (1 / rho)
    assert even(root, 1e-8), sde
    assert math.isclose(root[0] ** rho, sde.sigma(start) / sde.alpha(start), rel_tol=1e-9)


@MOST
@pytest.mark.parametrize("k", [1.0, 1.5])
def test_clocks_of_noise_are_even_down_to_the_last_positive_time(sde: ss.SDE, k: float) -> None:
    lam = sde.lam(inner(grids.flow_time(sde, 12, k)))
    assert even(torch.sigmoid(-lam) ** (1 / k), 1e-7)
    lam = sde.lam(inner(grids.log_noise(sde, 12, 0.5, k)))
    reached = lam[1:] if sde.alpha(sde.T) == 0 else lam
    assert even(torch.log1p((-reached).exp() / 0.5) ** (1 / k), 1e-6)


def test_log_noise_of_a_power_is_even_in_it_and_leads_from_karras_to_the_logarithm() -> None:
    sde = ss.VP()
    times = inner(grids.log_noise(sde, 12, 0.5, 1.5, 4.0))
    rho = sde.sigma(times) / sde.alpha(times)
    assert even((4 * ((1 + rho / 0.5) ** 0.25 - 1)) ** (1 / 1.5), 1e-7)
    assert torch.allclose(grids.log_noise(sde, 12, 0.5, power=1e7), grids.log_noise(sde, 12, 0.5), rtol=1e-5)
    low = 1e-7  # far below the last noise level
    near_karras = grids.log_noise(sde, 12, low, power=7.0, t_end=sde.t_min)
    assert torch.allclose(near_karras, grids.karras(sde, 12, 7.0, t_end=sde.t_min), rtol=1e-3)
    top = [float(sde.lam(inner(grids.log_noise(sde, 12, 0.1, power=p)))[1]) for p in (3.0, 7.0, None)]
    assert top == sorted(top), "a smaller power takes a shorter first step"


def test_flow_time_on_flow_is_uniform_and_stops_at_t_min() -> None:
    flow = ss.Flow()
    assert torch.allclose(grids.flow_time(flow, 20), grids.uniform_t(flow, 20), rtol=1e-12, atol=1e-15)
    assert float(grids.flow_time(flow, 40, 3.0)[-2]) == flow.t_min, "even steps would end below the training times"
    assert float(grids.flow_time(flow, 40, 3.0, t_min=1e-6)[-2]) == pytest.approx(40.0**-3, rel=1e-9)


def test_quadratic_vp_on_vp_is_quadratic_and_the_same_lam_elsewhere() -> None:
    times = grids.quadratic_vp(ss.VP(), 20)
    want = np.linspace(1.0, ss.VP().t_min ** 0.5, 20) ** 2
    assert np.allclose(inner(times), want, rtol=1e-9)
    low, high = (ss.VP().lam(t) for t in (1.0, 1e-3))
    flow = grids.quadratic_vp(ss.Flow(), 20, t_start=ss.Flow().t_of_lam(low), t_min=ss.Flow().t_of_lam(high))
    assert np.allclose(ss.Flow().lam(inner(flow)), ss.VP().lam(inner(times)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("a", "b"), [(0.6, 0.6), (0.5, 0.5), (1.0, 1.0), (0.2, 0.3), (2.0, 5.0), (20.0, 0.5), (0.7, 9.0), (300.0, 200.0)]
)
def test_beta_quantiles_are_scipys(a: float, b: float) -> None:
    for n in (1, 10, 333):
        times = grids.beta_quantile(ss.Flow(), n, a, b)
        want = scipy.stats.beta.ppf(1 - np.linspace(0, 1, n + 1), a, b)
        assert np.allclose(times, want, rtol=1e-12, atol=1e-14), n
    between = grids.beta_quantile(ss.EDM(), 10, a, b, t_start=40.0, t_end=2.0)
    assert np.allclose((between - 2) / 38, grids.beta_quantile(ss.Flow(), 10, a, b), rtol=1e-12, atol=1e-14)


@given(st.floats(0.05, 60.0), st.floats(0.05, 60.0), st.floats(1e-12, 1 - 1e-12))
def test_beta_quantile_inverts_the_distribution(a: float, b: float, q: float) -> None:
    x = beta_inverse(torch.tensor([q], dtype=F64), a, b).item()
    back = scipy.stats.beta.cdf(x, a, b)
    # Next to 1 the float x itself decides how well q is known.
    slack = scipy.stats.beta.cdf(math.nextafter(x, 2), a, b) - scipy.stats.beta.cdf(math.nextafter(x, -1), a, b)
    assert abs(back - q) <= 1e-11 * q + slack


def test_small_beta_quantiles_keep_their_digits() -> None:
    # I_x(a, 1) = x^a exactly; halving an interval of absolute length would lose these.
    q = torch.tensor([1e-3, 0.02, 0.5, 1.0, 0.0], dtype=F64)
    assert torch.allclose(beta_inverse(q, 0.1, 1.0), q**10, rtol=1e-11, atol=0.0)
    assert is_grid(grids.beta_quantile(ss.Flow(), 1000, 0.1, 1.0), 1000, 1.0, 0.0)


def test_cosine_is_the_arcsine_quantile() -> None:
    for sde in (ss.Flow(), ss.EDM()):
        u = np.linspace(0, 1, 31)
        assert np.allclose(grids.cosine(sde, 30), sde.T * np.cos(np.pi * u / 2) ** 2, rtol=1e-13, atol=1e-15 * sde.T)
        assert torch.allclose(grids.cosine(sde, 30), grids.beta_quantile(sde, 30, 0.5, 0.5), rtol=1e-12)


@pytest.mark.parametrize("s", [1.0, 1.15, 3.0, 6.0, 0.5])
def test_shifted_flow_is_the_published_time_shift(s: float) -> None:
    u = torch.linspace(1, 0, 26, dtype=F64)
    assert torch.allclose(grids.shifted(ss.Flow(), 25, s), s * u / (1 + (s - 1) * u), rtol=1e-12)


@pytest.mark.parametrize("name", ["VP", "VE", "EDM", "Cosine", "Discrete", "two functions"])
def test_shifted_is_even_on_the_clock_of_the_shifted_process(name: str) -> None:
    sde = SDES[name]
    times = grids.shifted(sde, 20, 2.0)
    clock = ss.processes.Shifted(sde, 2.0)
    assert even(sde.t_of_lam(sde.lam(times[:-1]) + math.log(2)), 1e-8)
    assert torch.allclose(clock.base_time(torch.linspace(clock.T, 0, 21, dtype=F64)), times, rtol=1e-9)
    assert torch.allclose(grids.shifted(sde, 20, 1.0), grids.uniform_t(sde, 20), rtol=1e-9)


# No signal left at T.


@pytest.mark.parametrize("name", NO_SIGNAL_LEFT)
@EVERY_IN_LAM
def test_grids_in_lam_where_alpha_vanishes(build: Builder, name: str) -> None:
    sde = SDES[name]
    assert sde.lam(sde.T) == -math.inf
    for n in (2, 5, 10, 50, 1000):
        times = build(sde, n)
        assert is_grid(times, n, sde.T, 0.0)
        steps = sde.lam(times[1:-1]).diff()
        assert bool((steps > 0).all()) and bool(steps.isfinite().all())
        if n >= 10:
            # Finite λ starts within a thousandth of T, so that no step swallows the noisy half of the process.
            assert (times[0] - times[1]) < (0.3 if build is IN_LAM["polyexponential 0.5"] else 0.1) * sde.T, n
    late = build(sde, 5, t_end=0.9996 * sde.T)
    assert is_grid(late, 5, sde.T, 0.9996 * sde.T), "also where the end lies after 0.999 T"


def test_there_are_processes_without_signal_at_the_end() -> None:
    assert {"Flow", "Trig", "Cosine to the end", "Discrete zero SNR", "Polynomial"} <= set(NO_SIGNAL_LEFT)


# Indices.


def indices_by_hand(N: int, n: int, spacing: str) -> list[float]:
    """In floats: a ratio of small integers is within rounding of a half only if it is one, and halves go to even."""
    i = np.arange(n)
    if spacing == "linspace":
        return np.rint((N - 1) * i[::-1] / (n - 1)).tolist() if n > 1 else [N - 1.0]
    if spacing == "leading":
        return (i[::-1] * (N // n)).astype(float).tolist()
    return (np.rint(N * (n - i) / n) - 1).tolist()


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("N", [1, 2, 7, 100, 1000])
def test_index_grids_for_every_number_of_steps(N: int, spacing: str) -> None:
    sde = ss.Discrete(ss.processes.betas("linear", N))
    for n in range(1, N + 1):
        times = grids.index_grid(sde, n, spacing)
        assert is_grid(times, n, times[0].item(), 0.0), n
        labels = sde.index_of_t(times[:-1]).tolist()
        assert labels == indices_by_hand(N, n, spacing), n
        assert all(label.is_integer() and 0 <= label < N for label in labels), n
        assert {"linspace": labels[0] == N - 1, "leading": labels[-1] == 0, "trailing": labels[0] == N - 1}[spacing]


@pytest.mark.parametrize("n", [10, 20, 25, 50, 100, 250, 16, 32, 64])
def test_index_grids_are_numpys_where_its_steps_are_exact(n: int) -> None:
    sde = ss.Discrete(ss.processes.betas("linear", 1000))
    numpys = {
        "linspace": np.linspace(0, 999, n).round()[::-1],
        "leading": (np.arange(n) * (1000 // n))[::-1],
        "trailing": np.round(np.arange(1000, 0, -1000 / n)) - 1,
    }
    for spacing, want in numpys.items():
        assert sde.index_of_t(grids.index_grid(sde, n, spacing)[:-1]).tolist() == want.tolist(), spacing


@pytest.mark.parametrize("n", [61, 103, 121])
def test_float_steps_would_run_one_step_more(n: int) -> None:
    assert math.ceil(1000 / (1000 / n)) == n + 1, "the trap is real"
    sde = ss.Discrete(ss.processes.betas("linear", 1000))
    assert len(grids.index_grid(sde, n, "trailing")) == n + 1, "n steps are n + 1 times"


# A user's own grid.


def test_own_grids_are_taken_as_they_are() -> None:
    want = [1.0, 0.7, 0.1, 0.0]
    for times in (want, tuple(want), np.array(want), torch.tensor(want, dtype=F64)):
        grid = grids.check_grid(ss.Flow(), times)
        assert grid.dtype == F64 and grid.tolist() == want, "to the bit, lists too"
    assert grids.check_grid(ss.Flow(), [1, 0]).tolist() == [1.0, 0.0]
    assert grids.check_grid(ss.Flow(), torch.tensor(want)).tolist() == torch.tensor(want).double().tolist()
    assert grids.check_grid(ss.Flow(), [0.6, 0.2]).tolist() == [0.6, 0.2], "any part of [0, T]"


def test_what_float32_rounds_outside_is_taken_back() -> None:
    sde = ss.VP(T=0.1)
    times = torch.tensor([0.1, 0.05, -1e-9])
    assert times[0].item() > sde.T
    assert grids.check_grid(sde, times).tolist()[::2] == [0.1, 0.0]


def test_a_window_of_a_grid() -> None:
    sde = ss.VP()
    grid = grids.karras(sde, 10)
    assert torch.equal(grids.window(sde, grid), grid)
    between = float(grid[3] + grid[4]) / 2
    assert torch.equal(grids.window(sde, grid, between), torch.cat([torch.tensor([between], dtype=F64), grid[4:]]))
    assert torch.equal(grids.window(sde, grid, float(grid[3])), grid[3:]), "a time of the grid is not doubled"
    assert torch.equal(grids.window(sde, grid, t_end=float(grid[7])), grid[:8])
    cut = grids.window(sde, grid, 0.8, 0.05)
    assert is_grid(cut, len(cut) - 1, 0.8, 0.05)
    assert cut[1:-1].tolist() == [t for t in grid.tolist() if 0.05 < t < 0.8]
    part = grids.uniform_t(sde, 4, t_start=0.5, t_end=0.1)
    assert torch.equal(grids.window(sde, part), part), "a grid that stops early stays so"
    assert grids.window(sde, part, 1.0, 0.0).tolist() == [1.0, *part.tolist(), 0.0], "beyond its ends steps are added"
    joined = torch.cat([grids.window(sde, grid, t_end=0.3), grids.window(sde, grid, 0.3)[1:]])
    assert torch.equal(joined, torch.cat([grid[grid > 0.3], joined.new_tensor([0.3]), grid[grid < 0.3]]))


flow = ss.Flow()
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "repeat": (lambda: grids.check_grid(flow, [1.0, 0.5, 0.5, 0.0]), ValueError, r"repeats.*index 2 \(t = 0.5\); drop"),
    "rise": (
        lambda: grids.check_grid(flow, [0.0, 0.5, 1.0]),
        ValueError,
        r"rises at index 1 \(from 0 to 0.5\); give times.flip\(0\)",
    ),
    "above T": (lambda: grids.check_grid(flow, [1.5, 0.0]), ValueError, r"\[0, T\] = \[0, 1\], got 1.5 at index 0"),
    "below 0": (lambda: grids.check_grid(flow, [1.0, -0.1]), ValueError, "got -0.1 at index 1"),
    "nan": (lambda: grids.check_grid(flow, torch.tensor([1.0, math.nan, 0.0])), ValueError, "got nan at index 1"),
    "nan in a list": (lambda: grids.check_grid(flow, [1.0, math.nan]), ValueError, r"`times\[1\]` must be finite"),
    "half": (lambda: grids.check_grid(flow, torch.tensor([1.0, 0.0]).half()), TypeError, "float16: half precision"),
    "bfloat16": (lambda: grids.check_grid(flow, torch.tensor([1.0, 0.0]).bfloat16()), TypeError, "bfloat16"),
    "integers": (lambda: grids.check_grid(flow, torch.tensor([1, 0])), TypeError, "int64: an index is not a time"),
    "bools": (lambda: grids.check_grid(flow, torch.tensor([True, False])), TypeError, "bool"),
    "bools in a list": (lambda: grids.check_grid(flow, [True, False]), TypeError, r"`times\[0\]`.*got True"),
    "complex": (lambda: grids.check_grid(flow, torch.tensor([1.0, 0j])), TypeError, "complex64"),
    "text": (lambda: grids.check_grid(flow, "10"), TypeError, "`times`.*got '10'"),  # type: ignore[arg-type]
    "matrix": (lambda: grids.check_grid(flow, torch.zeros(2, 2)), ValueError, r"at least 2 times, got shape \(2, 2\)"),
    "list of lists": (lambda: grids.check_grid(flow, [[1.0, 0.0]]), TypeError, r"`times\[0\]`.*got \[1.0, 0.0\]"),  # type: ignore[list-item]
    "one time": (lambda: grids.check_grid(flow, [1.0]), ValueError, r"at least 2 times, got shape \(1,\)"),
    "no time": (lambda: grids.check_grid(flow, []), ValueError, r"at least 2 times, got shape \(0,\)"),
    "window that is empty": (lambda: grids.window(flow, [1.0, 0.0], 0.2, 0.5), ValueError, "`t_end`.*below 0.2"),
    "window past T": (lambda: grids.window(flow, [1.0, 0.0], 2.0), ValueError, "`t_start`.*at most 1, got 2.0"),
    "window after the grid": (lambda: grids.window(flow, [0.5, 0.2], 0.1), ValueError, "`t_end`.*below 0.1"),
    "not a process": (lambda: grids.karras(3, 10), TypeError, "`sde` must be an SDE"),  # type: ignore[arg-type]
    "no steps": (lambda: grids.uniform_t(flow, 0), ValueError, "`steps` must be at least 1, got 0"),
    "steps as float": (lambda: grids.uniform_t(flow, 10.0), TypeError, "`steps` must be an integer"),  # type: ignore[arg-type]
    "steps as bool": (lambda: grids.karras(flow, True), TypeError, "`steps` must be an integer, got True"),
    "start past T": (lambda: grids.cosine(flow, 3, t_start=1.1), ValueError, "`t_start`.*at most 1"),
    "start at data": (lambda: grids.cosine(flow, 3, t_start=0.0), ValueError, "`t_start`.*above 0"),
    "end at start": (lambda: grids.karras(flow, 3, t_start=0.5, t_end=0.5), ValueError, "`t_end`.*below 0.5"),
    "end below 0": (lambda: grids.karras(flow, 3, t_end=-0.1), ValueError, "`t_end`.*at least 0"),
    "t_min past the start": (lambda: grids.karras(flow, 3, t_min=2.0), ValueError, "`t_min` must lie between.*got 2"),
    "t_min of 0": (lambda: grids.karras(flow, 3, t_min=0.0), ValueError, "`t_min`.*above 0"),
    "start below t_min": (lambda: grids.karras(flow, 3, t_start=1e-4), ValueError, "`t_min`.*got 0.001; give one"),
    "t_min beside an end": (lambda: grids.karras(flow, 3, t_end=0.1, t_min=0.2), ValueError, "`t_min`.*drop it"),
    "rho": (lambda: grids.karras(flow, 3, 0.0), ValueError, "`rho`.*above 0"),
    "exponent": (lambda: grids.power_t(flow, 3, -1.0), ValueError, "`exponent`.*above 0"),
    "shape of beta": (lambda: grids.beta_quantile(flow, 3, 0.0, 1.0), ValueError, "`a`.*above 0"),
    "shift": (lambda: grids.shifted(ss.VP(), 3, 0.5), ValueError, "`shift` must be at least 1"),
    "indices of a continuous process": (lambda: grids.index_grid(flow, 3), TypeError, "`sde` must be a Discrete"),  # type: ignore[arg-type]
    "more steps than indices": (
        lambda: grids.index_grid(ss.Discrete([0.1, 0.2]), 3),
        ValueError,
        "at most the 2 indices.*got 3; `uniform_t`",
    ),
    "unknown spacing": (lambda: grids.index_grid(ss.Discrete([0.1]), 1, "even"), ValueError, "`spacing`.*'even'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
