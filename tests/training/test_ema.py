"""Averages of weights: closed forms, exact returns, complete states, and lengths chosen afterwards."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import scoresde as ss
from scoresde.training.ema import EMA, PowerEMA, Snapshot, gamma_of_std, reconstruct, std_of_gamma, swapped


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def fill(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(value)


def test_the_average_of_constant_weights_is_their_closed_form() -> None:
    module = net()
    fill(module, 1.0)
    ema = EMA(module, decay=0.9, warmup=False)
    fill(module, 5.0)
    for _ in range(30):
        ema.update()
    for name, p in module.named_parameters():
        assert torch.allclose(ema.weights[name], 5 - 4 * torch.full_like(p, 0.9**30)), name


def test_warm_up_forgets_faster_when_young() -> None:
    ema = EMA(net(), decay=0.999)
    rates = []
    for _ in range(5):
        rates.append(ema.rate())
        ema.update()
    assert rates == [1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14]
    ema.updates = 10**6
    assert ema.rate() == 0.999 and EMA(net(), 0.999, warmup=False).rate() == 0.999


def test_buffers_are_copied_and_integers_stay_integers() -> None:
    module = net()
    ema = EMA(module, decay=0.99)
    module(torch.randn(8, 3))
    ema.update()
    assert torch.equal(ema.weights["1.running_mean"], module[1].running_mean)  # type: ignore[index]
    assert ema.weights["1.num_batches_tracked"] == 1
    assert ema.weights["1.num_batches_tracked"].dtype == torch.int64
    assert set(ema.weights) == set(module.state_dict())


class Inner(nn.Module):
    """A network with children that have the names of wrappers, beside tensors of the same names."""

    def __init__(self, child: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
        self.add_module(child, nn.Linear(2, 2))
        self.net = nn.ModuleDict({child: nn.Linear(1, 1)})


@pytest.mark.parametrize("child", ["module", "_orig_mod"])
@pytest.mark.parametrize("make", [EMA, PowerEMA])
def test_no_weight_is_lost_under_the_name_of_a_wrapper(child: str, make: type) -> None:
    module = Inner(child)
    average = make(module)
    fill(module, 3.0)
    for _ in range(200):
        average.update()
    weights = average.weights if make is EMA else average.weights[0]
    assert sorted(w.numel() for w in weights.values()) == sorted(p.numel() for p in module.parameters())
    with average.swapped():
        assert all(bool((p > 2.5).all()) for p in module.parameters())
    fill(module, 7.0)
    with average.swapped():
        assert not any(bool((p == 7).any()) for p in module.parameters()), "every weight has its average"


def test_wrappers_of_torch_do_not_change_the_names() -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    names = set(plain.state_dict())
    assert set(EMA(nn.DataParallel(plain)).weights) == names
    inner, outer = nn.Module(), nn.Module()
    inner._orig_mod = plain[1]
    plain[1] = inner
    outer._orig_mod = plain
    assert set(EMA(nn.DataParallel(outer)).weights) == names
    assert set(EMA(Inner("module").net).weights) == {"module.weight", "module.bias"}, "names as in its state_dict"


@pytest.mark.parametrize("make", [EMA, PowerEMA])
def test_no_update_inside_swapped(make: type) -> None:
    average = make(net())
    average.update()
    with average.swapped():
        with pytest.raises(RuntimeError, match="inside `swapped`"):
            average.update()
        with average.swapped():
            pass
        with pytest.raises(RuntimeError, match="inside `swapped`"):
            average.update()
    average.update()
    assert average.updates == 2


@pytest.mark.parametrize("fails", [False, True])
def test_swapping_always_gives_the_weights_back(fails: bool) -> None:
    module = net()
    ema = EMA(module, decay=0.5)
    fill(module, 2.0)
    ema.update()
    before = {name: w.clone() for name, w in module.state_dict().items()}
    pointers = [p.data_ptr() for p in module.parameters()]
    try:
        with ema.swapped() as inside:
            assert inside is module
            assert all(torch.equal(w, ema.weights[name]) for name, w in module.state_dict().items())
            with pytest.raises(RuntimeError, match="inside `swapped`"):
                ema.update()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert all(torch.equal(w, before[name]) for name, w in module.state_dict().items())
    assert [p.data_ptr() for p in module.parameters()] == pointers, "optimisers and graphs still point at them"
    ema.update()


def test_a_half_precision_module_has_a_float32_average() -> None:
    module = nn.Linear(4, 4).bfloat16()
    fill(module, 1.0)
    ema = EMA(module, decay=0.9999, warmup=False)
    fill(module, 2.0)
    for _ in range(100):
        ema.update()
    assert ema.weights["weight"].dtype == torch.float32
    assert torch.allclose(ema.weights["weight"], torch.tensor(2 - 0.9999**100), atol=1e-5)
    with ema.swapped():
        assert module.weight.dtype == torch.bfloat16


def test_shared_and_compiled_weights_are_one() -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    ema = EMA(tied, 0.5, warmup=False)
    fill(tied, 4.0)
    ema.update()
    with ema.swapped():
        assert torch.equal(tied[0].weight, tied[1].weight) and not bool((tied[0].weight == 4).any())
    wrapped = nn.Module()
    wrapped._orig_mod = nn.Linear(2, 2)
    assert set(EMA(wrapped).weights) == {"weight", "bias"}


@pytest.mark.parametrize("make", [EMA, PowerEMA])
def test_a_state_is_complete(make: type) -> None:
    module, twin = net(), net()
    ema = make(module)
    optimiser = torch.optim.SGD(module.parameters(), 0.1)
    for k in range(6):
        if k == 3:
            twin.load_state_dict(module.state_dict())
            other = make(twin)
            other.load_state_dict(ema.state_dict())
        with torch.no_grad():
            for a in module.parameters():
                a.mul_(1.1)
        if k >= 3:
            with torch.no_grad():
                for b in twin.parameters():
                    b.mul_(1.1)
            other.update()
        ema.update()
    assert other.updates == ema.updates == 6 and optimiser is not None
    a, b = (e.weights if isinstance(e.weights, list) else [e.weights] for e in (ema, other))
    assert all(torch.equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x)


def test_states_of_others_are_refused_by_name() -> None:
    ema = EMA(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="missing \\['bias'\\]"):
        ema.load_state_dict({**ema.state_dict(), "weights": {"weight": torch.zeros(2, 2)}})
    with pytest.raises(ValueError, match="`weight` has shape \\(2, 2\\) here and \\(3, 2\\)"):
        ema.load_state_dict(EMA(nn.Linear(2, 3)).state_dict() | {})
    with pytest.raises(ValueError, match="must have weights, updates"):
        ema.load_state_dict({"weights": {}})
    with pytest.raises(ValueError, match="`state` has `stds`="):
        PowerEMA(nn.Linear(2, 2)).load_state_dict(PowerEMA(nn.Linear(2, 2), stds=(0.1,)).state_dict())
    with pytest.raises(ValueError, match="`decay` must be"):
        EMA(nn.Linear(1, 1), decay=1.0)


# Lengths chosen afterwards.


class Track(nn.Module):
    """One weight vector that walks."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(n, dtype=torch.float64))


def walk(steps: int, n: int = 32) -> torch.Tensor:
    """A random walk that settles, as weights do."""
    steps_of = ss.Noise(0).normal((steps, n), 0, dtype=torch.float64)
    return (steps_of / (1 + torch.arange(steps)[:, None]) ** 0.7).cumsum(0)


def direct(path: torch.Tensor, gamma: float) -> torch.Tensor:
    """The power-function average of a path, by its definition: weights ((k/t)^{γ+1} − ((k−1)/t)^{γ+1})."""
    t = len(path)
    edge = (torch.arange(t + 1, dtype=torch.float64) / t) ** (gamma + 1)
    return edge.diff() @ path


def test_relative_lengths_and_exponents() -> None:
    assert gamma_of_std(0.05) == pytest.approx(16.97, abs=0.01) and gamma_of_std(0.1) == pytest.approx(6.94, abs=0.01)
    for std in (0.01, 0.05, 0.1, 0.25):
        assert std_of_gamma(gamma_of_std(std)) == pytest.approx(std, rel=1e-9)
    tau = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    for gamma in (3.0, 10.0):
        p = (gamma + 1) * tau**gamma / (len(tau) - 1)
        mean = (p * tau).sum()
        assert float((p * (tau - mean) ** 2).sum() ** 0.5) == pytest.approx(std_of_gamma(gamma), rel=1e-3)
    with pytest.raises(ValueError, match=r"below 0\.288675"):
        gamma_of_std(0.3)


def test_reconstruction_of_any_length() -> None:
    steps, every = 2000, 100
    path, track = walk(steps), Track(32)
    power = PowerEMA(track)
    taken: list[Snapshot] = []
    for k in range(1, steps + 1):
        track.w.data.copy_(path[k - 1])
        power.update()
        if k % every == 0:
            taken += power.snapshot()
    for gamma, weights in zip(power.gammas, power.weights, strict=True):
        assert torch.allclose(weights["w"], direct(path, gamma), atol=1e-12), "the update is the definition"
        exact = reconstruct(taken, std_of_gamma(gamma))["w"]
        assert torch.allclose(exact, weights["w"], atol=1e-9), "the tracked averages are reconstructed"
    distance = direct(path, gamma_of_std(0.05)) - direct(path, gamma_of_std(0.2))
    # Within 1 % between and near the two lengths tracked; at twice the longer one, 4 %.
    for std, share in ((0.03, 0.01), (0.07, 0.01), (0.15, 0.01), (0.2, 0.05)):
        error = reconstruct(taken, std)["w"] - direct(path, gamma_of_std(std))
        assert float(error.norm()) < share * float(distance.norm()), std
    early = reconstruct(taken, 0.08, t=1500)["w"] - direct(path[:1500], gamma_of_std(0.08))
    assert float(early.norm()) < 0.01 * float(distance.norm())
    few = [s for s in taken if s.t % 500 == 0]
    errors = [float((reconstruct(some, 0.07)["w"] - direct(path, gamma_of_std(0.07))).norm()) for some in (taken, few)]
    assert errors[0] < errors[1], "more snapshots, smaller error"
    module = Track(32)
    with swapped(module, reconstruct(taken, 0.15)):
        assert float(module.w.detach().norm()) > 0
    assert float(module.w.detach().norm()) == 0


def test_reconstruction_refuses_what_it_cannot_use() -> None:
    power = PowerEMA(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="at least one"):
        reconstruct([], 0.1)
    with pytest.raises(ValueError, match="updated at least once"):
        reconstruct(power.snapshot(), 0.1)
    for _ in range(3):
        power.update()
    with pytest.raises(ValueError, match="must not lie after the last snapshot, at 3"):
        reconstruct(power.snapshot(), 0.1, t=9)
    later = power.snapshot()
    for _ in range(5):
        power.update()
    later += power.snapshot()
    with pytest.raises(ValueError, match=r"got 6 between 3 and 8.*use t=3 or t=8, or save a snapshot at 6"):
        reconstruct(later, 0.1, t=6)
    assert reconstruct(later, 0.1, t=3).keys() == reconstruct(later, 0.1).keys()
    with pytest.raises(ValueError, match="lies before the first"):
        reconstruct(power.snapshot(), 0.1, t=1)
    assert all(a is not b for a, b in itertools.pairwise(power.snapshot()))
