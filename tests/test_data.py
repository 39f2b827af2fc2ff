"""The scale of data: there and back, with the exact log-determinant, and warnings where it is off."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import scoresde as ss
from scoresde.data import Standardize, check_scale, suggest_sigma_max

F64 = torch.float64
PER = ("scalar", "channel", "entry")
EVERY = pytest.mark.parametrize("per", PER)
SHAPES = pytest.mark.parametrize("shape", [(50, 3), (50, 1), (40, 3, 4), (30, 2, 3, 4), (2, 2)], ids=str)


def draw(shape: tuple[int, ...], dtype: torch.dtype = F64) -> Tensor:
    """Data whose every entry has a mean and a scale of its own."""
    z = ss.Noise(0).normal(shape, 0, dtype=dtype)
    k = torch.arange(z[0].numel(), dtype=dtype).reshape(shape[1:])
    return 5 - 3 * k + (0.3 + k) * z


@EVERY
@SHAPES
def test_what_comes_out_has_mean_0_and_the_target_scale(per: str, shape: tuple[int, ...]) -> None:
    data = draw(shape)
    for target in (1.0, 0.5):
        scale = Standardize.fit(data, per, target)
        z = scale(data)
        axes = {"scalar": tuple(range(data.ndim)), "channel": (0, *range(2, data.ndim)), "entry": (0,)}[per]
        assert float(z.mean(axes).abs().max()) < 1e-13
        assert float((z.std(axes, correction=0) - target).abs().max()) < 1e-13
        entries = {"scalar": 1, "channel": shape[1], "entry": data[0].numel()}[per]
        assert scale.mean.numel() == scale.std.numel() == entries, "one scale for each of what was asked"


@EVERY
@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["float32", "float64"])
def test_there_and_back(per: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    data = draw(shape, dtype)
    scale = Standardize.fit(data, per, 0.5)
    for x in (data, data[:1], data[:0], -10 * data):
        z = scale(x)
        assert z.shape == x.shape and z.dtype == dtype
        eps = torch.finfo(dtype).eps * float(data.abs().max()) * 100
        assert torch.allclose(scale.inverse(z), x, rtol=1e-5 if dtype == torch.float32 else 1e-13, atol=eps)
    assert scale(data.double()).dtype == F64, "the dtype is the state's"


@EVERY
@pytest.mark.parametrize("shape", [(50, 3), (40, 3, 4), (30, 2, 2, 2)], ids=str)
def test_log_det_is_that_of_the_jacobian(per: str, shape: tuple[int, ...]) -> None:
    data = draw(shape)
    scale = Standardize.fit(data, per, 0.7)
    n = data[0].numel()
    jacobian = torch.autograd.functional.jacobian(lambda x: scale(x[None])[0], data[0]).reshape(n, n)
    sign, log_det = torch.linalg.slogdet(jacobian)
    assert sign == 1
    assert math.isclose(scale.log_det(data), log_det.item(), rel_tol=1e-12)
    back = torch.autograd.functional.jacobian(lambda z: scale.inverse(z[None])[0], scale(data)[0]).reshape(n, n)
    assert math.isclose(-scale.log_det(data), torch.linalg.slogdet(back)[1].item(), rel_tol=1e-12)
    assert scale.log_det(data[:0]) == scale.log_det(data[:1]) == scale.log_det(data), "of one event"
    assert math.isclose(scale.log_det(data.float()), scale.log_det(data)), "in float64 whatever the data is"


@EVERY
def test_log_density_of_data_follows_from_that_of_what_comes_out(per: str) -> None:
    # Correlated Gaussian data: the density of z is Gaussian too, with mean and covariance carried through the map.
    n = 6
    root = ss.Noise(1).normal((n, n), 0, dtype=F64).tril() + 2 * torch.eye(n, dtype=F64)
    mean = torch.arange(n, dtype=F64)
    x = mean + ss.Noise(2).normal((64, n), 0, dtype=F64) @ root.T
    exact = torch.distributions.MultivariateNormal(mean, scale_tril=root).log_prob(x)
    events = x.reshape(64, 2, 3)
    scale = Standardize.fit(events, per, 0.5)
    z = scale(events).flatten(1)
    gain = (0.5 / scale.std).expand(2, 3).flatten()
    shift = ((mean.reshape(2, 3) - scale.mean) * 0.5 / scale.std).flatten()
    of_z = torch.distributions.MultivariateNormal(shift, scale_tril=gain[:, None] * root).log_prob(z)
    assert torch.allclose(of_z + scale.log_det(events), exact, rtol=1e-12)


def test_log_density_of_a_mixture_is_the_same_on_either_scale() -> None:
    means = torch.tensor([[10.0, -4.0], [30.0, 8.0]], dtype=F64)
    sde = ss.VP()
    std = torch.tensor(5.0, dtype=F64)
    raw = ss.GaussianMixture(sde, means, std=std)
    x = raw.sample(200, seed=0)
    scale = Standardize.fit(x, "scalar", 0.5)
    standard = ss.GaussianMixture(sde, scale(means), std=std * 0.5 / scale.std[0])
    assert torch.allclose(standard.log_prob(scale(x), 0.0) + scale.log_det(x), raw.log_prob(x, 0.0), rtol=1e-10)


@given(st.floats(1e-3, 1e3), st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_standardising_forgets_units(unit: float, zero: float, target: float) -> None:
    data = draw((20, 3))
    for per in PER:
        z = Standardize.fit(data, per, target)(data)
        other = data * unit + zero
        assert torch.allclose(Standardize.fit(other, per, target)(other), z, rtol=1e-7, atol=1e-7 * target)


def test_given_by_hand_and_for_broadcast_events() -> None:
    scale = Standardize(torch.tensor([[1.0], [2.0]]), torch.tensor(2.0), 0.5)
    x = draw((5, 2, 3), torch.float32)
    assert torch.allclose(scale(x)[:, 1], (x[:, 1] - 2) / 4)
    assert math.isclose(scale.log_det(x), -6 * math.log(4))
    # One scale for every pixel serves any resolution.
    images = draw((8, 3, 4, 4))
    assert Standardize.fit(images)(draw((2, 3, 9, 9))).shape == (2, 3, 9, 9)
    assert Standardize.fit(images, "channel")(draw((2, 3, 9, 9))).shape == (2, 3, 9, 9)


def test_a_constant_entry_has_no_scale_even_where_its_mean_rounds() -> None:
    data = draw((1000, 3))
    data[:, 1] = 0.1
    rounded = data[:, 1].mean() - 0.1
    assert rounded != 0, "the mean of 1000 times 0.1 is not 0.1"
    with pytest.raises(ValueError, match="is constant, drop this entry, or fit with per='scalar'"):
        Standardize.fit(data, "entry")
    assert Standardize.fit(data, "scalar").std.shape == (1,)


def test_fitting_keeps_no_graph_and_leaves_the_data_alone() -> None:
    data = draw((20, 3)).requires_grad_()
    before = data.detach().clone()
    scale = Standardize.fit(data)
    assert not scale.mean.requires_grad and not scale.std.requires_grad
    (slope,) = torch.autograd.grad(scale(data).sum(), data)
    assert torch.allclose(slope, (1 / scale.std).expand_as(slope)), "but the map itself is differentiable"
    assert torch.equal(data.detach(), before)


# Noise levels that suit the data.


@pytest.mark.parametrize("shape", [(2, 1), (30, 2), (100, 3, 4), (57, 11)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["float32", "float64"])
def test_suggested_sigma_max_is_the_largest_distance(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    data = draw(shape, dtype)
    rows = data.double().flatten(1)
    want = max(float((a - b).norm()) for a in rows for b in rows)
    assert math.isclose(suggest_sigma_max(data), want, rel_tol=1e-6)
    far = data.double() + 1e6
    assert math.isclose(suggest_sigma_max(far), want, rel_tol=1e-6), "far from the origin nothing cancels"


def test_suggested_sigma_max_of_many_data_takes_some_of_them() -> None:
    data = torch.arange(100.0)[:, None]
    assert suggest_sigma_max(data) == suggest_sigma_max(data, max_samples=100) == 99.0
    some = {suggest_sigma_max(data, max_samples=5, seed=seed) for seed in range(20)}
    assert len(some) > 5 and max(some) <= 99.0
    assert suggest_sigma_max(data, max_samples=5, seed=3) == suggest_sigma_max(data, max_samples=5, seed=3)
    state = torch.get_rng_state()
    suggest_sigma_max(data, max_samples=5)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is nobody's"


@pytest.mark.parametrize("factor", [0.51, 1.0, 1.99])
def test_a_fitting_scale_is_passed_in_silence(factor: float) -> None:
    data = Standardize.fit(draw((50, 3)), target=0.5)(draw((50, 3))) * factor + 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isclose(check_scale(data, 0.5), 0.5 * factor)


@pytest.mark.parametrize("factor", [0.0, 0.49, 2.01, 100.0])
def test_a_scale_that_is_off_warns_with_the_fix(factor: float) -> None:
    data = Standardize.fit(draw((50, 3)), target=0.5)(draw((50, 3))) * factor + 7
    with pytest.warns(
        UserWarning, match=r"standard deviation .* assumes 0.5.*Standardize.fit\(data, target=0.5\)"
    ) as w:
        assert math.isclose(check_scale(data, 0.5), 0.5 * factor, abs_tol=1e-9)
    assert w[0].filename == __file__, "the warning points at the caller"


ok = draw((5, 3))
holed = ok.clone()
holed[3, 1] = math.nan
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "one datum": (lambda: Standardize.fit(ok[:1]), ValueError, r"`data`.*N >= 2, got \(1, 3\)"),
    "no event axis": (lambda: Standardize.fit(ok[:, 0]), ValueError, r"\(N, \*event\).*got \(5,\)"),
    "empty events": (lambda: Standardize.fit(torch.zeros(5, 0)), ValueError, r"got \(5, 0\)"),
    "nan": (lambda: Standardize.fit(holed), ValueError, "`data` must be finite, but row 3 is not"),
    "infinite": (lambda: Standardize.fit(ok / 0), ValueError, "row 0 is not"),
    "integers": (lambda: Standardize.fit(ok.long()), TypeError, "`data` must be float32 or float64, got int64"),
    "half": (lambda: Standardize.fit(ok.half()), TypeError, "float16"),
    "complex": (lambda: Standardize.fit(ok + 0j), TypeError, "complex128"),
    "array": (lambda: Standardize.fit(ok.numpy()), TypeError, "`data` must be a torch.Tensor"),  # type: ignore[arg-type]
    "unknown per": (lambda: Standardize.fit(ok, "pixel"), ValueError, "`per` must be one of 'scalar'.*got 'pixel'"),
    "target of 0": (lambda: Standardize.fit(ok, target=0.0), ValueError, "`target`.*above 0"),
    "constant data": (lambda: Standardize.fit(torch.ones(5, 3)), ValueError, "`std` must be positive"),
    "negative std": (lambda: Standardize(torch.zeros(3), -torch.ones(3)), ValueError, "`std` must be positive"),
    "nan mean": (lambda: Standardize(torch.full((3,), math.nan), torch.ones(3)), ValueError, "`mean`.*finite"),
    "number as mean": (lambda: Standardize(0.0, torch.ones(3)), TypeError, "`mean` must be a torch.Tensor, got 0.0"),  # type: ignore[arg-type]
    "other events": (lambda: Standardize.fit(ok, "entry")(torch.zeros(2, 4)), ValueError, r"shape \(4,\).*\(3,\)"),
    "wider events": (lambda: Standardize.fit(ok, "entry")(torch.zeros(2, 1)), ValueError, r"shape \(1,\).*\(3,\)"),
    "other events back": (lambda: Standardize.fit(ok, "entry").inverse(torch.zeros(2, 4)), ValueError, r"\(4,\)"),
    "other events' log_det": (lambda: Standardize.fit(ok, "entry").log_det(torch.zeros(2, 4)), ValueError, r"\(4,\)"),
    "half state": (lambda: Standardize.fit(ok)(ok.half()), TypeError, "`x`.*float16"),
    "distance of one": (lambda: suggest_sigma_max(ok[:1]), ValueError, r"N >= 2, got \(1, 3\)"),
    "distance of nan": (lambda: suggest_sigma_max(holed), ValueError, "row 3 is not"),
    "max_samples of 1": (lambda: suggest_sigma_max(ok, max_samples=1), ValueError, "`max_samples` must be at least 2"),
    "scale of nothing": (
        lambda: check_scale(torch.zeros(0, 3)),
        ValueError,
        r"at least one number, got shape \(0, 3\)",
    ),
    "scale of nan": (lambda: check_scale(holed), ValueError, "row 3 is not"),
    "no sigma_data": (lambda: check_scale(ok, 0.0), ValueError, "`sigma_data`.*above 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
