"""β lists: the textbook's quantities, and their lift to continuous time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import scoresde as ss

KINDS = ("linear", "quadratic", "scaled_linear", "sigmoid", "cosine")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("N", [1, 2, 50, 1000])
def test_beta_lists_are_valid_and_lift_to_a_process(kind: str, N: int) -> None:
    beta = ss.processes.betas(kind, N)
    assert beta.shape == (N,) and beta.dtype == torch.float64
    assert bool((beta > 0).all() and (beta < 1).all())
    sde = ss.Discrete(beta)
    assert sde.T == N
    assert bool((sde.lam(torch.arange(1, N + 1, dtype=torch.float64)).diff() < 0).all())


def test_beta_lists_equal_their_formulas() -> None:
    assert np.allclose(ss.processes.betas("linear"), np.linspace(1e-4, 0.02, 1000), rtol=1e-14)
    assert np.allclose(ss.processes.betas("quadratic"), np.linspace(1e-4**0.5, 0.02**0.5, 1000) ** 2, rtol=1e-13)
    assert np.allclose(
        ss.processes.betas("scaled_linear"), np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, rtol=1e-13
    )
    sigmoid = 1 / (1 + np.exp(-np.linspace(-6, 6, 1000)))
    assert np.allclose(ss.processes.betas("sigmoid"), 1e-4 + sigmoid * (0.02 - 1e-4), rtol=1e-12)
    bar = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    assert np.allclose(ss.processes.betas("cosine"), np.minimum(1 - bar[1:] / bar[:-1], 0.999), rtol=1e-9)
    assert ss.processes.betas("linear", 10, beta_start=0.1, beta_end=0.2).tolist()[::9] == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize("N", [1, 7, 49, 100, 1000, 4001])
def test_label_of_index_i_is_exactly_i(N: int) -> None:
    sde = ss.Discrete(ss.processes.betas("linear", N))
    for i in range(N):
        assert sde.index_of_t(sde.t_of_index(i)) == i
    index = torch.arange(N)
    assert torch.equal(sde.index_of_t(sde.t_of_index(index)), index.float())
    seen = []
    model = ss.Denoiser(lambda x, t: seen.append(t) or x, sde, predicts="eps")
    for i in {0, N // 3, N - 1}:
        model.x0(torch.zeros(2, 3), sde.t_of_index(i))
        assert seen[-1].tolist() == [float(i)] * 2


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
def test_textbook_quantities_equal_their_definitions(kind: str) -> None:
    beta = ss.processes.betas(kind, 200).numpy()
    sde = ss.Discrete(ss.processes.betas(kind, 200))
    bar = np.cumprod(1 - beta)
    before = np.append(1.0, bar[:-1])
    t = torch.arange(1, 201)
    assert np.allclose(sde.beta(t), beta, rtol=1e-12)
    assert np.allclose(sde.alpha_bar(t), bar, rtol=1e-12)
    assert np.allclose(sde.posterior_variance(t), beta * (1 - before) / (1 - bar), rtol=1e-9)
    assert sde.posterior_variance(1) == 0.0
    x_t, x0 = (ss.Noise(i).normal((200, 2), 0, dtype=torch.float64) for i in (0, 1))
    mean = (np.sqrt(before) * beta / (1 - bar))[:, None] * x0.numpy()
    mean += (np.sqrt(1 - beta) * (1 - before) / (1 - bar))[:, None] * x_t.numpy()
    assert np.allclose(sde.posterior_mean(x_t, x0, t), mean, rtol=1e-9, atol=1e-12)
    assert torch.allclose(sde.posterior_mean(x_t, x0, t)[6:7], sde.posterior_mean(x_t[6:7], x0[6:7], 7))
    # The general posterior of any two times of a process is the same thing.
    of_xt, of_x0, variance = sde.posterior(6.0, 7.0)
    assert torch.allclose(of_xt * x_t + of_x0 * x0, sde.posterior_mean(x_t, x0, torch.full((200,), 7)), rtol=1e-9)
    assert math.isclose(variance, sde.posterior_variance(7), rel_tol=1e-9)


def test_one_step_after_another_is_any_step_at_once() -> None:
    sde = ss.Discrete(ss.processes.betas("linear", 20))
    noise = ss.Noise(0)
    n = 50_000
    x = x0 = torch.full((n, 1), 2.0, dtype=torch.float64)
    for t in range(1, 21):
        x = sde.q_step(x, t, noise.like(x, t))
    direct = sde.q_sample(x0, 20, noise.like(x, 0))
    std = (1 - sde.alpha_bar(20)) ** 0.5
    assert abs(x.mean().item() - 2 * sde.alpha_bar(20) ** 0.5) < 5 * std / n**0.5
    assert abs(x.std().item() / std - 1) < 5 / n**0.5
    assert abs(direct.mean().item() - x.mean().item()) < 7 * std / n**0.5
    assert torch.equal(direct, sde.perturb(x0, 20.0, noise.like(x, 0)))
    t = torch.randint(1, 21, (n,), generator=torch.Generator().manual_seed(0))
    eps = noise.like(x, 99)
    assert torch.allclose(sde.q_sample(x0, t, eps), sde.perturb(x0, t.double(), eps), rtol=1e-12)


def test_first_alpha_bar_keeps_its_digits() -> None:
    # A float32 cumulative product loses 1 − ᾱ_1 to 1.7e-4.
    sde = ss.Discrete(ss.processes.betas("linear"))
    assert math.isclose(sde.sigma(1.0) ** 2, 1e-4, rel_tol=1e-12)
    assert math.isclose(sde.sigma(torch.tensor(1.0)).item() ** 2, 1e-4, rel_tol=1e-6)


def test_zero_terminal_snr() -> None:
    beta = ss.processes.betas("scaled_linear", 1000)
    new = ss.processes.zero_terminal_snr(beta)
    bar, old = (1 - new).cumprod(0), (1 - beta).cumprod(0)
    assert new[-1] == 1.0 and bar[-1] == 0.0
    assert math.isclose(bar[0], old[0], rel_tol=1e-12)
    root, was = bar.sqrt(), old.sqrt()
    assert torch.allclose(root, (was - was[-1]) * was[0] / (was[0] - was[-1]), rtol=1e-9, atol=1e-15)
    sde = ss.Discrete(new)
    assert sde.alpha(1000.0) == 0.0 and sde.sigma(1000.0) == 1.0 and sde.lam(1000.0) == -math.inf
    assert 0 < sde.alpha(999.5) < sde.alpha(999.0)
    assert sde.posterior_variance(1000) == pytest.approx(1 - bar[-2].item())
    with pytest.raises(ValueError, match="α = 0"):
        ss.Denoiser(lambda x, t: x, sde, predicts="eps")
    model = ss.Denoiser(lambda x, t: x, sde, predicts="v")
    x = torch.ones(1, 2)
    assert torch.equal(model.x0(x, 1000.0), -x), "at α = 0, x0 = −v"


def test_the_whole_list_of_a_checkpoint_is_used() -> None:
    # No entry is clipped off and no label is rescaled, however small ᾱ gets.
    sde = ss.Discrete(ss.processes.betas("cosine", 1000))
    assert sde.index_of_t(sde.t_of_index(500)) == 500.0
    assert sde.index_of_t(sde.t_of_lam(sde.lam(501.0))) == pytest.approx(500, abs=1e-9)
    assert sde.index_of_t(sde.T) == 999.0
    assert math.isclose(sde.alpha_bar(1000), (1 - ss.processes.betas("cosine", 1000)).log().sum().exp(), rel_tol=1e-9)


def test_processes_of_lists_are_values() -> None:
    a, b = (ss.Discrete(ss.processes.betas("linear", 10)) for _ in range(2))
    assert a == b and hash(a) == hash(b)
    assert a != ss.Discrete(ss.processes.betas("linear", 11))
    assert (
        a
        == ss.Discrete(ss.processes.betas("linear", 10).tolist())
        == ss.Discrete(ss.processes.betas("linear", 10).numpy())
    )
    assert "10 betas" in repr(a)


def step_of(t: object) -> Tensor:
    return ss.Discrete(ss.processes.betas("linear", 10)).q_sample(torch.zeros(2, 3), t)  # type: ignore[arg-type]


BAD = {
    "negative beta": (lambda: ss.Discrete([0.1, -0.1]), ValueError, r"betas\[1\] = -0.1"),
    "zero beta": (lambda: ss.Discrete([0.0, 0.1]), ValueError, r"betas\[0\] = 0"),
    "beta of 1 before the end": (lambda: ss.Discrete([1.0, 0.1]), ValueError, r"betas\[0\] = 1"),
    "nan beta": (lambda: ss.Discrete([0.1, math.nan, 0.1]), ValueError, r"`betas\[1\]` must be finite, got nan"),
    "no betas": (lambda: ss.Discrete([]), ValueError, "list of N numbers"),
    "matrix of betas": (lambda: ss.Discrete(torch.ones(2, 2) / 2), ValueError, r"\(2, 2\)"),
    "unknown kind": (
        lambda: ss.processes.betas("squared"),
        ValueError,
        "`kind` must be one of 'linear'.*got 'squared'",
    ),
    "no steps": (lambda: ss.processes.betas("linear", 0), ValueError, "`N` must be at least 1"),
    "steps as float": (lambda: ss.processes.betas("linear", 10.0), TypeError, "`N` must be an integer"),  # type: ignore[arg-type]
    "ends of cosine": (lambda: ss.processes.betas("cosine", beta_end=0.1), ValueError, "no meaning for kind='cosine'"),
    "beta above 1": (lambda: ss.processes.betas("linear", beta_end=1.5), ValueError, "`beta_end`.*at most 1"),
    "step 0": (lambda: step_of(0), ValueError, r"step in 1 … 10.*got 0"),
    "step past the end": (lambda: step_of(11), ValueError, "got 11"),
    "step as float": (lambda: step_of(1.5), TypeError, "`t` must be an integer"),
    "step as float tensor": (lambda: step_of(torch.ones(2)), TypeError, "integer tensor"),
    "one step out of many": (lambda: step_of(torch.tensor([1, 11])), ValueError, "got 1 … 11"),
    "wrong number of steps": (lambda: step_of(torch.tensor([1, 2, 3])), ValueError, "3 entries.*2 rows"),
    "index past the end": (lambda: ss.Discrete([0.1]).t_of_index(1), ValueError, "0 … 0"),
    "index as float": (lambda: ss.Discrete([0.1]).t_of_index(torch.ones(1)), TypeError, "integer tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
