"""Distances between sets of samples: closed forms, brute force, invariances, and noise floors that are true."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from scoresde.metrics import c2st, compare, distances, energy_distance, frechet, mmd_rbf, moments, sliced_w2, w2_1d
from scoresde.noise.keyed import Noise


def draw(seed: int, *shape: int) -> Tensor:
    return Noise(seed).fork(99).normal(shape, draw=0, dtype=torch.float64)


def max_z(x: Tensor, y: Tensor) -> float:
    return moments(x, y).max_z


def column(x: Tensor, y: Tensor) -> float:
    return w2_1d(x.reshape(len(x), -1)[:, 0], y.reshape(len(y), -1)[:, 0])


fast_c2st = functools.partial(c2st, steps=30, hidden=16)

SYMMETRIC = {  # functions of two sets: order of rows and of sets is nothing to them
    "w2_1d": column,
    "sliced_w2": sliced_w2,
    "energy": energy_distance,
    "mmd": mmd_rbf,
    "mmd, two bandwidths": functools.partial(mmd_rbf, bandwidth=[0.5, 2.0]),
    "max_z": max_z,
    "frechet": frechet,
}
ALL = {**SYMMETRIC, "c2st": fast_c2st}


def close(a: float, b: float, rel: float = 1e-9, tiny: float = 1e-12) -> bool:
    return math.isclose(a, b, rel_tol=rel, abs_tol=tiny)


# What every metric owes


def test_order_of_rows_and_sets() -> None:
    x, y = draw(0, 40, 3), 0.3 + draw(1, 27, 3)
    shuffled_x, shuffled_y = x[torch.arange(40).flip(0)], y.roll(5, 0)
    for name, metric in SYMMETRIC.items():
        value = metric(x, y)
        assert close(metric(shuffled_x, shuffled_y), value), name
        assert close(metric(y, x), value), name


def test_event_shape() -> None:
    x, y = draw(0, 40, 2, 3, 2), draw(1, 27, 2, 3, 2)
    for name, metric in ALL.items():
        assert metric(x, y) == metric(x.flatten(1), y.flatten(1)), name
    x, y = draw(0, 40), draw(1, 27)
    for name, metric in ALL.items():
        assert metric(x, y) == metric(x[:, None], y[:, None]), name


def test_dtypes() -> None:
    x, y = draw(0, 40, 3).float(), 0.3 + draw(1, 27, 3).float()
    for name, metric in ALL.items():
        # Work is done in float64 either way, so nothing at all is lost by giving float32.
        assert metric(x, y) == metric(x.double(), y.double()) == metric(x, y.double()), name
    x, y = draw(0, 40, 3), 0.3 + draw(1, 27, 3)
    for name, metric in SYMMETRIC.items():
        assert close(metric(x, y), metric(x.float(), y.float()), rel=1e-4, tiny=1e-6), name


def test_far_from_origin() -> None:
    # On a grid of 2⁻²⁰ the move by 2²⁴ is exact in float64, and a metric must not see it at all.
    x, y = ((1e-3 * v * 2**20).round() / 2**20 for v in (draw(0, 40, 3), 0.3 + draw(1, 27, 3)))
    for name, metric in ALL.items():
        assert metric(x + 2.0**24, y + 2.0**24) == metric(x, y), name
    assert energy_distance(x, y) > 0


def test_samples_close_together_and_far_apart() -> None:
    # Neighbours 1e-6 apart, in clusters 2e4 apart: expanded squares would lose the neighbours.
    x = torch.tensor([[-1e4, 7.0], [1e4, -3.0]], dtype=torch.float64)
    y = x + 1e-6 * torch.tensor([[1.0, 2.0], [-2.0, 1.0]], dtype=torch.float64)
    within_x, within_y = (math.dist(v[0], v[1]) / 2 for v in (x.tolist(), y.tolist()))
    across = sum(math.dist(a, b) for a in x.tolist() for b in y.tolist()) / 4
    assert math.isclose(energy_distance(x, y), 2 * across - within_x - within_y, rel_tol=1e-4)
    h = 1e-6
    far = 0.0
    near = sum(math.exp(-(math.dist(a, b) ** 2) / (2 * h**2)) for a, b in zip(x.tolist(), y.tolist(), strict=True))
    assert math.isclose(mmd_rbf(x, y, h), far - 2 * near / 4, rel_tol=1e-4)


def test_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draw(0, 40, 3), 0.3 + draw(1, 27, 3)
    whole = {name: metric(x, y) for name, metric in SYMMETRIC.items()}
    floors = {name: compare(SYMMETRIC[name], x, y, 20) for name in ("energy", "mmd")}
    for size in (1, 100, 1000):
        monkeypatch.setattr(distances, "CHUNK", size)
        for name, metric in SYMMETRIC.items():
            assert close(metric(x, y), whole[name]), (name, size)
        for name, floor in floors.items():
            assert close(compare(SYMMETRIC[name], x, y, 20).floor_high, floor.floor_high), (name, size)


def test_inputs_and_the_global_generator_are_left_alone() -> None:
    x, y = draw(0, 40, 3).requires_grad_(), draw(1, 27, 3)
    torch.manual_seed(3)
    before, x_before = torch.get_rng_state(), x.detach().clone()
    for name, metric in ALL.items():
        value = metric(x, y)
        compare(metric, x, y, n_permutations=2)
        assert torch.equal(torch.get_rng_state(), before), name
        assert torch.equal(x, x_before) and x.grad is None, name
        torch.rand(5)  # nor does the state of the generator matter
        assert metric(x, y) == value, name
        torch.manual_seed(3)


def test_without_grad() -> None:
    x, y = draw(0, 40, 3), draw(1, 27, 3)
    values = {name: metric(x, y) for name, metric in ALL.items()}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for name, metric in ALL.items():
                assert metric(x.clone(), y.clone()) == values[name], (name, mode)


def test_seeds() -> None:
    x, y = draw(0, 60, 3), 0.3 + draw(1, 47, 3)
    for metric in (sliced_w2, fast_c2st):
        assert metric(x, y, seed=1) == metric(x, y, seed=1)
        assert metric(x, y, seed=1) != metric(x, y, seed=2)
    assert compare(energy_distance, x, y, seed=1) == compare(energy_distance, x, y, seed=1)
    assert compare(energy_distance, x, y, seed=1).floor != compare(energy_distance, x, y, seed=2).floor


def test_far_clusters() -> None:
    a, b = 1e-3 * draw(0, 50, 4), 1e-3 * draw(1, 60, 4) + torch.tensor([3.0, 0.0, 4.0, 0.0])
    assert math.isclose(energy_distance(a, b), 10.0, rel_tol=1e-2)
    assert math.isclose(mmd_rbf(a, b, 0.5), 2.0, rel_tol=1e-3)
    assert math.isclose(w2_1d(a[:, 2], b[:, 2]), 4.0, rel_tol=1e-2)
    assert c2st(a, b, steps=50) == 1.0
    assert max_z(a, b) > 1e3
    for metric in (sliced_w2, energy_distance, mmd_rbf):
        seen = compare(metric, a, b, n_permutations=30)
        assert seen.p_value == 1 / 31 and seen.value > 2 * abs(seen.floor_high), metric


X, NAN = torch.zeros(4, 2, 3), torch.zeros(4, 2, 3)
NAN[2, 1, 0] = math.nan
WRONG = [
    (lambda f: f(X[:1], X), ValueError, "`x` must hold at least 2 samples, got 1"),
    (lambda f: f(X, X[:0]), ValueError, "`y` must hold at least 2 samples, got 0"),
    (lambda f: f(X, NAN), ValueError, r"`y` must be finite, got nan at index \(2, 1, 0\)"),
    (lambda f: f(1 / X, X), ValueError, r"`x` must be finite, got inf at index \(0, 0, 0\), one of 24"),
    (lambda f: f(X, X[:, :1]), ValueError, r"`y` must have the event shape of `x`, \(2, 3\), got \(1, 3\)"),
    (lambda f: f(X[:, :0], X[:, :0]), ValueError, "`x` must have events of at least one number"),
    (lambda f: f(X, X.numpy()), TypeError, "`y` must be a torch.Tensor"),
    (lambda f: f(X.long(), X), TypeError, "`x` must be float32 or float64"),
    (lambda f: f(X, X.to("meta")), ValueError, "`x` is on cpu and `y` on meta"),
]


def test_wrong_samples() -> None:
    doors = {
        "w2_1d": w2_1d,
        "sliced_w2": sliced_w2,
        "energy": energy_distance,
        "mmd": mmd_rbf,
        "c2st": c2st,
        "moments": moments,
        "compare": functools.partial(compare, lambda x, y: 0.0),
    }
    for (name, door), (call, error, message) in itertools.product(doors.items(), WRONG):
        with pytest.raises(error, match=message):
            pytest.fail(f"{name} took it and returned {call(door)}: {message}")


def test_wrong_options() -> None:
    x, y = draw(0, 4, 2), draw(1, 5, 2)
    for call, error, message in (
        (lambda: w2_1d(x, y), ValueError, "must hold one number for each sample, got 2"),
        (lambda: sliced_w2(x, y, n_projections=0), ValueError, "`n_projections` must be at least 1"),
        (lambda: sliced_w2(x, y, seed=-1), ValueError, "`seed` must be at least 0"),
        (lambda: mmd_rbf(x, y, 0.0), ValueError, "`bandwidth` must be finite and above 0"),
        (lambda: mmd_rbf(x, y, [1.0, -1.0]), ValueError, "`bandwidth` must be finite and above 0"),
        (lambda: mmd_rbf(x, y, []), ValueError, "`bandwidth` .* empty"),
        (lambda: mmd_rbf(x, y, "1"), TypeError, "`bandwidth` must be a number"),
        (lambda: mmd_rbf(X, X), ValueError, "`bandwidth` must be given where all samples coincide"),
        (lambda: mmd_rbf(torch.eye(9), 0 * torch.eye(9)[:8].repeat(9, 1)), ValueError, "where most samples coincide"),
        (lambda: c2st(x, y, folds=1), ValueError, "`folds` must be at least 2"),
        (lambda: c2st(x, y, folds=5), ValueError, "`folds` must be at most 4"),
        (lambda: c2st(x, y, folds=2, steps=0), ValueError, "`steps` must be at least 1"),
        (lambda: c2st(x, y, folds=2, lr=0.0), ValueError, "`lr` must be finite and above 0"),
        (lambda: compare(energy_distance, x, y, 0), ValueError, "`n_permutations` must be at least 1"),
        (lambda: compare(lambda a, b: math.nan, x, y), ValueError, "`metric` must return a number"),
    ):
        with pytest.raises(error, match=message):
            call()


# Transport


def test_w2_of_a_shift() -> None:
    for n, shift in ((2, 0.5), (101, -3.0), (64, 1e-6)):
        x = draw(n, n)
        assert math.isclose(w2_1d(x, x.flip(0) + shift), abs(shift), rel_tol=1e-9), (n, shift)


def test_w2_of_unequal_sizes() -> None:
    for n, m in ((2, 3), (7, 5), (12, 8), (30, 10), (41, 64)):
        x, y = draw(n, n), 2 * draw(m + 100, m) + 1
        # Copies make the sizes equal and leave the distributions as they were.
        a, b = np.sort(np.repeat(x.numpy(), m)), np.sort(np.repeat(y.numpy(), n))
        assert math.isclose(w2_1d(x, y), math.sqrt(((a - b) ** 2).mean()), rel_tol=1e-12), (n, m)
        # The integral of the quantile functions itself, on a grid that has every jump on a cell's end.
        u = (np.arange(n * m) + 0.5) / (n * m)
        gap = np.quantile(x.numpy(), u, method="inverted_cdf") - np.quantile(y.numpy(), u, method="inverted_cdf")
        assert math.isclose(w2_1d(x, y), math.sqrt((gap**2).mean()), rel_tol=1e-12), (n, m)


def test_w2_is_the_cheapest_assignment() -> None:
    x, y = draw(0, 6), draw(1, 6) ** 3
    cheapest = min(float((x - y[list(p)]).square().mean()) for p in itertools.permutations(range(6)))
    assert math.isclose(w2_1d(x, y), math.sqrt(cheapest), rel_tol=1e-12)


def test_sliced_w2_closed_forms() -> None:
    directions = 4096
    for d in (1, 2, 10):
        x = draw(d, 50, d)
        delta = 0.1 + torch.arange(d, dtype=torch.float64)
        # (θ·δ)² has mean |δ|²/D and standard deviation below √2 |δ|²/D.
        value = sliced_w2(x, x + delta, directions) ** 2
        expected = float(delta.square().sum()) / d
        assert abs(value / expected - 1) < 4 * math.sqrt(2 / directions) * (d > 1) + 1e-9, d
        # Scaling transports each projection along itself.
        value = sliced_w2(x, 3 * x, directions) ** 2
        expected = 4 * float(x.square().sum(1).mean()) / d
        assert abs(value / expected - 1) < 4 * math.sqrt(2 / directions) * (d > 1) + 1e-9, d


def test_sliced_w2_of_gaussians() -> None:
    n, d = 4000, 8
    delta = torch.full((d,), 0.7, dtype=torch.float64)
    value = sliced_w2(draw(0, n, d), draw(1, n, d) + delta, 2048)
    assert abs(value / (float(delta.norm()) / math.sqrt(d)) - 1) < 0.06


def test_copies_are_the_same_distribution() -> None:
    x = draw(0, 31, 3)
    for metric in (sliced_w2, energy_distance):
        assert metric(x, x.repeat(3, 1)) < 1e-7, metric
        assert metric(x, x) < 1e-7, metric


# Pairs


def test_energy_distance_of_numbers_is_the_distance_of_their_cdfs() -> None:
    for n, m in ((2, 2), (30, 47), (200, 50)):
        x, y = draw(n, n), 0.2 + 1.5 * draw(m + 100, m)
        ends = np.sort(np.concatenate([x.numpy(), y.numpy()]))
        f, g = (np.searchsorted(np.sort(v.numpy()), ends[:-1], side="right") / len(v) for v in (x, y))
        assert math.isclose(energy_distance(x, y), 2 * float(((f - g) ** 2 * np.diff(ends)).sum()), rel_tol=1e-10), n


def brute_force(x: Tensor, y: Tensor, h: float) -> tuple[float, float]:
    """Energy distance (V) and squared MMD (U) by loops."""

    def mean(a: Tensor, b: Tensor, of: str) -> float:
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if of == "distance" or a is not b or i != j]
        gaps = [math.dist(a[i].tolist(), b[j].tolist()) for i, j in pairs]
        return math.fsum(g if of == "distance" else math.exp(-0.5 * (g / h) ** 2) for g in gaps) / len(pairs)

    def both(of: str) -> float:
        return 2 * mean(x, y, of) - mean(x, x, of) - mean(y, y, of)

    return both("distance"), -both("kernel")


def test_pairs_by_brute_force() -> None:
    for n, m, d in ((2, 3, 1), (9, 5, 4)):
        x, y = draw(n, n, d), 0.5 + draw(m + 100, m, d)
        energy, mmd = brute_force(x, y, 0.8)
        assert math.isclose(energy_distance(x, y), energy, rel_tol=1e-10), (n, m, d)
        assert math.isclose(mmd_rbf(x, y, 0.8), mmd, rel_tol=1e-10), (n, m, d)


def test_energy_floor() -> None:
    # Under equal distributions the mean of the V-statistic is (1/N + 1/M) E|x − x'|, and E|x − x'| = 2/√π in 1-D.
    n, m, repeats = 20, 13, 400
    x, y = draw(0, repeats, n), draw(1, repeats, m)
    values = torch.tensor([energy_distance(a, b) for a, b in zip(x, y, strict=True)])
    expected = (1 / n + 1 / m) * 2 / math.sqrt(math.pi)
    assert abs(float(values.mean()) - expected) < 4 * float(values.std()) / math.sqrt(repeats) < expected


def test_mmd_is_unbiased() -> None:
    n, m, d, h, repeats = 12, 9, 2, 1.0, 500
    for shift in (0.0, 0.5):
        x, y = draw(2, repeats, n, d), shift + draw(3, repeats, m, d)
        values = torch.tensor([mmd_rbf(a, b, h) for a, b in zip(x, y, strict=True)])
        within = (h**2 / (h**2 + 2)) ** (d / 2)
        expected = 2 * within * (1 - math.exp(-d * shift**2 / (2 * (h**2 + 2))))
        error = float(values.std()) / math.sqrt(repeats)
        assert abs(float(values.mean()) - expected) < 4 * error, shift
        # The V-statistic would be off by more than this test allows, so the test can tell.
        assert (1 - within) * (1 / n + 1 / m) > 8 * error, shift


def test_mmd_bandwidths() -> None:
    x, y = draw(0, 40, 3), 0.3 + draw(1, 27, 3)
    several = [0.3, 1.0, 4.0]
    assert close(mmd_rbf(x, y, several), sum(mmd_rbf(x, y, h) for h in several) / 3)
    assert mmd_rbf(x, y, [1.0]) == mmd_rbf(x, y, 1.0) == mmd_rbf(x, y, 1)
    for scale in (1.0, 1e-8, 1e8):
        assert close(mmd_rbf(scale * x, scale * y), mmd_rbf(x, y), rel=1e-3), scale


def test_median_distance() -> None:
    cluster = torch.cat([draw(0, 60, 3), 1e6 + 1e-4 * draw(1, 150, 3)])  # the median is far below the largest
    for z in (draw(2, 100, 5), draw(3, 3, 1), cluster):
        z = z - z.mean(0)
        exact = float(torch.pdist(z).quantile(0.5, interpolation="lower"))
        assert math.isclose(distances._median_distance(z), exact, rel_tol=1e-3), len(z)


# The classifier


def test_c2st_of_equal_distributions() -> None:
    n, d = 400, 5
    values = torch.tensor([c2st(draw(2 * s, n, d), draw(2 * s + 1, n, d), seed=s, steps=100) for s in range(6)])
    assert abs(float(values.mean()) - 0.5) < 4 * 0.6 / math.sqrt(2 * n * 6)


def test_c2st_holds_out() -> None:
    # In 200 dimensions 40 + 40 samples are told apart by heart at once: only held-out samples give 0.5.
    values = [c2st(draw(2 * s, 40, 200), draw(2 * s + 1, 40, 200), seed=s, steps=60) for s in range(4)]
    assert abs(sum(values) / 4 - 0.5) < 4 * 0.6 / math.sqrt(80 * 4)


def test_c2st_is_balanced() -> None:
    value = c2st(draw(0, 1500, 2), draw(1, 100, 2), steps=100)
    assert abs(value - 0.5) < 4 * 0.5 / math.sqrt(200)  # always to answer x would be right in 94 % of cases
    # Half of x lies where all of y does: right on half of x and on all of y, that is 0.55 of the samples.
    coin = (Noise(0).uniform((800,), draw=0) < 0.5).double()
    assert abs(c2st(coin, torch.ones(80), steps=100) - 0.75) < 4 * 0.5 * 0.5 / math.sqrt(800)


def test_c2st_reaches_the_best_accuracy() -> None:
    shift = 2.0
    value = c2st(draw(0, 600, 3), draw(1, 600, 3) + torch.tensor([shift, 0.0, 0.0]))
    best = 0.5 * (1 + math.erf(shift / 2 / math.sqrt(2)))
    assert best - 0.05 < value < best + 0.03


def test_c2st_sees_more_than_moments() -> None:
    x = draw(0, 500, 2)
    y = draw(1, 500, 2)
    ring = math.sqrt(2) * y / y.norm(dim=1, keepdim=True)  # mean 0 and covariance I, as the Gaussian
    assert moments(x, ring).max_z < 5
    assert c2st(x, ring) > 0.65
    assert c2st(torch.zeros(20, 2), torch.zeros(20, 2)) == 0.5


# Moments


def test_moments_are_differences() -> None:
    x, y = draw(0, 50, 4), 2 * draw(1, 70, 4) + 1
    seen = moments(x, y)
    assert np.allclose(seen.mean, y.numpy().mean(0) - x.numpy().mean(0))
    assert np.allclose(seen.cov, np.cov(y.numpy().T) - np.cov(x.numpy().T))
    assert np.allclose(seen.mean_se, np.sqrt(x.numpy().var(0, ddof=1) / 50 + y.numpy().var(0, ddof=1) / 70))
    assert seen.max_z == max(seen.mean_z, seen.cov_z) == pytest.approx(float((seen.cov / seen.cov_se).abs().max()))
    assert f"{seen.cov_z:.2f}" in str(seen)


def test_moments_standard_errors() -> None:
    n, m, repeats = 300, 500, 400
    normals, exponentials = draw(0, repeats, n + m, 2), Noise(1).uniform((repeats, n + m, 2), draw=0).log()
    mixed = torch.stack([normals[..., 0] + normals[..., 1], normals[..., 1]], -1)
    for name, z in {"normal": normals, "correlated": mixed, "skewed": exponentials.double()}.items():
        all_of = [moments(v[:n], v[n:]) for v in z]
        for part in ("mean", "cov"):
            differences = torch.stack([getattr(s, part) for s in all_of])
            promised = torch.stack([getattr(s, f"{part}_se") for s in all_of]).square().mean(0).sqrt()
            # A standard deviation of 400 numbers is known to 3.5 %, and less well where tails are heavy.
            ratio = promised / differences.std(0)
            assert float(ratio.min()) > 0.85 and float(ratio.max()) < 1.15, (name, part, ratio)


def test_moments_of_two_values() -> None:
    # (x − mean)² hardly varies for ±1: the leading term of the standard error nearly vanishes and the next one holds.
    n, repeats = 20, 300
    signs = (Noise(5).uniform((repeats, 2 * n), draw=0) < 0.5).double() * 2 - 1
    z = torch.tensor([moments(s[:n], s[n:]).cov_z for s in signs])
    assert float(z.square().mean()) < 2


def test_moments_floor() -> None:
    n, d, repeats = 400, 4, 400
    x, y = draw(0, repeats, n, d), draw(1, repeats, n, d)
    seen = [moments(a, b) for a, b in zip(x, y, strict=True)]
    rate = sum(s.max_z > s.z_floor for s in seen) / repeats
    assert 0.01 < rate < 0.05 + 4 * math.sqrt(0.05 * 0.95 / repeats)


def test_moments_where_nothing_varies() -> None:
    x, y = draw(0, 30, 3), draw(1, 40, 3)
    x[:, 1] = y[:, 1] = 0.1
    assert moments(x, y).max_z == moments(x[:, ::2], y[:, ::2]).max_z
    y[:, 1] = 0.2
    assert moments(x, y).mean_z == math.inf
    assert moments(x, y).cov_z == pytest.approx(moments(x[:, ::2], y[:, ::2]).cov_z)


# The noise floor


def test_compare_by_hand() -> None:
    x, y = draw(0, 7, 2, 2), draw(1, 5, 2, 2).float().double()
    pool = sorted(torch.cat([x, y]).flatten(1).tolist())
    calls = []

    def metric(a: Tensor, b: Tensor) -> float:
        assert a.shape == x.shape and b.shape == y.shape
        assert sorted(torch.cat([a, b]).flatten(1).tolist()) == pool
        calls.append((a, b, float(a.mean() - b.mean())))
        return calls[-1][2]

    seen = compare(metric, x, y, n_permutations=50, seed=3)
    value, others = calls[0][2], np.array([c[2] for c in calls[1:]])
    assert torch.equal(calls[0][0], x) and torch.equal(calls[0][1], y)
    assert len(others) == 50 and len(set(others)) > 40
    assert seen.value == value
    assert close(seen.floor, float(np.median(others))) and close(seen.floor_high, float(np.quantile(others, 0.95)))
    assert seen.p_value == (1 + int((others >= value).sum())) / 51
    assert f"{seen.p_value:.3g}" in str(seen) and f"{seen.value:.4g}" in str(seen)


def test_compare_shortcut() -> None:
    # Pairs computed once give what one call for each labelling gives.
    x, y = draw(0, 30, 3), 0.3 + draw(1, 22, 3)
    for metric in (energy_distance, mmd_rbf, SYMMETRIC["mmd, two bandwidths"]):
        short, long = compare(metric, x, y, 40), compare(lambda a, b, f=metric: f(a, b), x, y, 40)
        for part in ("value", "floor", "floor_high", "p_value"):
            assert close(getattr(short, part), getattr(long, part)), (metric, part)
        assert close(short.value, metric(x, y))


def test_p_values_are_uniform_under_equality() -> None:
    n, m, permutations = 15, 12, 19
    for metric, count in ((energy_distance, 300), (functools.partial(sliced_w2, n_projections=4), 100)):
        x, y = draw(0, count, n, 2), draw(1, count, m, 2)
        p = torch.tensor([compare(metric, x[r], y[r], permutations, seed=r).p_value for r in range(count)])
        for level in (0.1, 0.25, 0.5, 0.75):  # multiples of 1/20, which p-values reach
            rate = float((p <= level + 1e-9).double().mean())
            assert abs(rate - level) < 4 * math.sqrt(level * (1 - level) / count), (metric, level, rate)


def test_p_values_are_small_under_a_shift() -> None:
    x, y = draw(0, 400, 4), draw(1, 300, 4) + 0.25
    for name in ("energy", "mmd", "sliced_w2", "max_z"):
        seen = compare(SYMMETRIC[name], x, y, n_permutations=60)
        assert seen.p_value <= 2 / 61 and seen.value > seen.floor_high > seen.floor, (name, str(seen))


def test_ties_count() -> None:
    x, y = draw(0, 5, 2), draw(1, 4, 2)
    assert compare(lambda a, b: 1.0, x, y).p_value == 1.0
    # A sum over all samples is the same for every labelling, but for the order of its rounding.
    for sign in (1, -1):
        assert compare(lambda a, b, s=sign: s * float((a / 3).sum() + (b / 3).sum()), x, y).p_value == 1.0, sign
    # Two of the six ways to halve two far pairs keep the pairs together, and both do as well as the truth.
    pairs = torch.tensor([0.0, 0.1]), torch.tensor([10.1, 10.3])
    p = compare(energy_distance, *pairs, n_permutations=400).p_value
    assert abs(p - 1 / 3) < 4 * math.sqrt(2 / 9 / 400)


# Fréchet distance.


def test_frechet_is_the_transport_between_gaussians() -> None:
    # A linear map A = A' > 0 is the optimal transport of a Gaussian, so its cost E|x − A x − b|² is W2², exactly.
    x = draw(0, 500, 4)
    root = draw(1, 4, 4)
    A, b = root @ root.T + torch.eye(4, dtype=torch.float64), draw(2, 4)
    y = x @ A + b
    centred = (x - x.mean(0)) - (y - y.mean(0))
    cost = float(centred.square().sum() / (len(x) - 1) + (x.mean(0) - y.mean(0)).square().sum())
    assert frechet(x, y) == pytest.approx(cost, rel=1e-9)


def test_frechet_bears_more_features_than_samples() -> None:
    x, y = draw(3, 5, 12), draw(4, 6, 12)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)
    turn = torch.linalg.qr(draw(5, 12, 12)).Q
    assert frechet(x @ turn, y @ turn) == pytest.approx(frechet(x, y), rel=1e-9)
