"""Rules of resampling: unbiased, with the spread that each promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scoresde.noise.keyed import Noise
from scoresde.steering import Resampling, effective_size
from scoresde.steering.resampling import RULES

F64 = torch.float64
N, P = 8, 20_000
WEIGHTS = torch.tensor([0.3, 0.0, 0.25, 0.05, 0.1, 0.125, 0.125, 0.05], dtype=F64)


def children(rule: str) -> Tensor:
    """Number of children of each particle, (P, N)."""
    u = Noise(0).uniform((P, N), 0, dtype=F64)
    index = RULES[rule](WEIGHTS.expand(P, N), u)
    assert index.shape == (P, N) and int(index.min()) >= 0 and int(index.max()) < N
    return torch.nn.functional.one_hot(index, N).sum(1).double()


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_unbiased(rule: str) -> None:
    counts = children(rule)
    error = counts.std(0) / P**0.5
    assert bool(((counts.mean(0) - N * WEIGHTS).abs() <= 4 * error + 1e-12).all()), rule
    assert float(counts[:, 1].max()) == 0, "no child without weight"


@pytest.mark.parametrize("rule", RULES)
def test_the_spread_of_the_number_of_children(rule: str) -> None:
    counts = children(rule)
    share = N * WEIGHTS
    if rule == "multinomial":
        torch.testing.assert_close(counts.var(0), share * (1 - WEIGHTS), rtol=0.05, atol=1e-12)
    if rule in ("systematic", "residual"):
        assert bool((counts >= share.floor() - 1e-9).all())
    if rule == "systematic":
        assert bool((counts <= share.ceil() + 1e-9).all())
        assert float(counts[:, 2].var()) == 0, "N W = 2 is an integer"
    if rule == "stratified":
        assert bool(((counts - share).abs() < 2).all())


@pytest.mark.parametrize("rule", RULES)
def test_equal_and_degenerate_weights(rule: str) -> None:
    u = Noise(1).uniform((50, N), 0, dtype=F64)
    one = torch.zeros(50, N, dtype=F64)
    one[:, 3] = 1
    assert bool((RULES[rule](one, u) == 3).all())
    if rule != "multinomial":
        equal = RULES[rule](torch.full((50, N), 1 / N, dtype=F64), u)
        assert torch.equal(equal.sort(1).values, torch.arange(N).expand(50, N))


def test_effective_sizes_have_closed_forms() -> None:
    log = torch.tensor([[0.0, 0.0, 0.0, 0.0], [5.0, -torch.inf, 5.0, -torch.inf], [-torch.inf] * 4], dtype=F64)
    torch.testing.assert_close(effective_size(log), torch.tensor([4.0, 2.0, 0.0], dtype=F64))
    assert effective_size(WEIGHTS.log()[None]) == pytest.approx(1 / float(WEIGHTS.square().sum()))


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="`rule` must be one of 'systematic', 'stratified', 'residual', 'multinomial'"):
        Resampling("sistematic")
    with pytest.raises(ValueError, match=r"`threshold` must be .* at most 1, got 2"):
        Resampling(threshold=2.0)
    with pytest.raises(ValueError, match="`every` must be at least 1, got 0"):
        Resampling(every=0)
    u = torch.full((2, 3), 0.5, dtype=F64)
    with pytest.raises(ValueError, match=r"`rule` must return integer indices of shape \(2, 3\), got \(3,\)"):
        Resampling(lambda w, u: torch.arange(3)).choose(u, u)
