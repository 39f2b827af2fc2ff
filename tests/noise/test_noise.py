"""Noise: known answers, sample i is sample i however it is asked for, and the numbers are normal and independent."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scoresde.noise import numbers, philox
from scoresde.noise.keyed import Ahead, Laid, Noise

F64 = torch.float64
MASK = 2**32 - 1
EVENTS = [(), (1,), (2,), (3,), (4,), (5,), (21,), (64,), (3, 5, 7), (1, 2, 3, 4, 5)]
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
ALL_EVENTS = pytest.mark.parametrize("event", EVENTS, ids=str)


# The numbers, from their definition in integers.


def philox_by_hand(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """Philox-4x32-7 as its paper writes it (Salmon et al., 2011, section 3.3), on Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(7):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


def words_by_hand(seed: int, index: int, draw: int, block: int) -> list[int]:
    return philox_by_hand((block, draw, index & MASK, index >> 32), (seed & MASK, seed >> 32))


ORDER = (1, 0, 3, 2)  # of the words of a counter


def normal_by_hand(seed: int, index: int, draw: int, position: int) -> float:
    words = [words_by_hand(seed, index, draw, position // 4)[k] for k in ORDER]
    radius, angle = words[position % 2], words[2 + position % 2]
    turn = math.cos if position % 4 < 2 else math.sin
    u = float((np.float32(radius) + np.float32(0.5)) * np.float32(2.0**-32))
    return math.sqrt(-2 * math.log(u)) * turn(2 * math.pi * (angle - 2**32 * (angle >= 2**31)) / 2**32)


def words_of(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    c, k = ([torch.tensor([w]) for w in words] for words in (counter, key))
    return [int(w) for w in philox.philox((c[0], c[1], c[2], c[3]), (k[0], k[1]))]


KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((MASK,) * 4, (MASK,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    assert words_of(counter, key) == philox_by_hand(counter, key) == list(words)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("columns", [1, 5, 31, 32, 70])
@pytest.mark.parametrize(("draws", "keys"), [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_all_implementations_of_philox_give_the_same_words(rows: int, columns: int, draws: int, keys: int) -> None:
    source = np.random.default_rng(0)

    def random_words(*shape: int) -> Any:
        return source.integers(0, 2**32, shape).astype(np.uint64)

    block, draw, index = random_words(1, columns), random_words(min(draws, rows), 1), random_words(2, rows, 1)
    key = random_words(2, min(keys, rows), 1)
    given = [a.copy() for a in (block, draw, index, key)]
    packed = philox.words(block, draw, index, key)
    assert np.array_equal(packed, philox.words(block, draw, index, key, np.empty(7 * packed.size, np.uint64)))
    assert all(np.array_equal(a, b) for a, b in zip(given, (block, draw, index, key), strict=True))
    whole = [np.broadcast_to(a, (rows, columns)) for a in (block, draw, *index, *key)]
    counters = list(zip(*(a.ravel().tolist() for a in whole[:4]), strict=True))
    first, second = philox.few(counters, (whole[4] + (whole[5] << np.uint64(32))).ravel().tolist())
    assert packed.reshape(2, -1).tolist() == [first, second]
    c0, c1, c2, c3, k0, k1 = (torch.from_numpy(a.astype(np.int64)) for a in (block, draw, *index, *key))
    four = [w.flatten().tolist() for w in philox.philox((c0, c1, c2, c3), (k0, k1))]
    halves = [
        [w >> 32 for w in first],
        [w & MASK for w in first],
        [w >> 32 for w in second],
        [w & MASK for w in second],
    ]
    assert four == halves
    by_hand = philox_by_hand(counters[-1], (int(whole[4][-1, -1]), int(whole[5][-1, -1])))
    assert by_hand == [w[-1] for w in four]


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
)
def test_every_number_is_a_function_of_seed_sample_draw_and_position(seed: int, index: int, draw: int, n: int) -> None:
    noise = Noise(seed, indices=[index])
    want = [normal_by_hand(seed, index, draw, i) for i in range(n)]
    z = noise.normal((1, n), draw, dtype=F64)[0]
    assert torch.allclose(z, torch.tensor(want, dtype=F64), rtol=1e-13, atol=1e-14)
    words = [words_by_hand(seed, index, draw, i // 4)[ORDER[i % 4]] for i in range(n)]
    u = noise.uniform((1, n), draw, dtype=F64)[0]
    assert u.tolist() == [(w + 0.5) / 2**32 for w in words]


def test_numbers_do_not_drift_between_versions() -> None:
    # The words behind the numbers are integers, the same on every machine; float64 uniforms hold all their bits.
    u = Noise(2026).uniform((1024, 1024), 7, dtype=F64)
    words = (u * 2**32 - 0.5).to(torch.int64).numpy().astype("<u4")
    assert words[5, 6] == words_by_hand(2026, 5, 7, 1)[3]
    assert hashlib.sha256(words.tobytes()).hexdigest() == (
        "ceea76b30b73e7dec07bb129a33721754127a98482f0c613c5c67d6f079c7ec7"
    )
    assert Noise(2026).fork(3).seed == 16663863713715602102
    assert Noise(2026).fork(3).fork(2**64 - 1).seed == 10013241220285940469


def test_words_at_both_ends_give_finite_numbers_in_both_precisions() -> None:
    ends = [0, 1, 2, 2**24, 2**31 - 1, 2**31, 2**32 - 2**24, MASK - 128, MASK - 1, MASK]
    words = np.array(list(itertools.product(ends, ends)), np.uint64).T
    packed = np.ascontiguousarray(words << np.uint64(32) | words)[:, None]
    fine, coarse = (numbers.numbers_of(packed, dtype, normal=True) for dtype in (F64, torch.float32))
    assert np.isfinite(fine).all() and np.abs(fine).max() == pytest.approx(math.sqrt(66 * math.log(2)))
    assert np.abs(coarse - fine).max() < 6e-6
    length, rough = (np.hypot(z[0, 0::4], z[0, 2::4].astype(np.float64)) for z in (fine, coarse))
    assert np.allclose(rough, length, rtol=5e-7, atol=0), "both ends of the radius keep digits"
    assert length[words[0] == MASK].tolist() == [0.0] * len(ends), "the largest words round to u = 1"
    for dtype in (torch.float32, F64):
        u = numbers.numbers_of(packed, dtype, normal=False)
        assert u.min() == 2.0**-33 and u.max() < 1


# The same numbers elsewhere.


@BOTH
@pytest.mark.parametrize("normal", [True, False])
def test_numbers_of_other_devices_are_those_of_the_host(normal: bool, dtype: torch.dtype) -> None:
    for noise in (Noise(3, offset=2**33), Noise(range(7)), Noise(3, indices=range(7, 0, -1))):
        for draw in (5, torch.arange(7)[:, None]):
            for n in (1, 4, 21, 300):
                host = numbers.on_host(noise._host_rows(7, draw), n, dtype, normal=normal)
                device = noise._device_rows(7, draw, torch.device("cpu"))
                for compute in (numbers.on_device, numbers.by_position):
                    other = compute(device, n, dtype, normal=normal)
                    assert other.shape == host.shape and other.dtype == dtype
                    if normal:
                        assert float((host - other).abs().max()) < (2e-6 if dtype == torch.float32 else 1e-13)
                    else:
                        assert torch.equal(host, other), "integers are the same everywhere"


def test_a_compiled_draw_is_one_graph_of_the_same_numbers() -> None:
    noise, x = Noise(3, offset=2), torch.zeros(6, 3, 5)
    draw = torch.compile(lambda x: x + noise.like(x, 4), backend="aot_eager", fullgraph=True)
    assert torch.allclose(draw(x), noise.like(x, 4), rtol=0, atol=2e-6)


# Sample i is sample i.


@ALL_EVENTS
@BOTH
def test_sample_is_the_same_in_any_batch_size_and_chunk(event: tuple[int, ...], dtype: torch.dtype) -> None:
    whole = Noise(7).normal((64, *event), 3, dtype=dtype)
    assert whole.shape == (64, *event) and whole.dtype == dtype and whole.is_contiguous()
    for B in (1, 4, 7, 64):
        parts = [Noise(7, offset=b).normal((min(B, 64 - b), *event), 3, dtype=dtype) for b in range(0, 64, B)]
        assert torch.equal(torch.cat(parts), whole), B
        assert torch.equal(Noise(7).normal((B, *event), 3, dtype=dtype), whole[:B]), B


@ALL_EVENTS
@BOTH
def test_sample_is_the_same_in_any_order(event: tuple[int, ...], dtype: torch.dtype) -> None:
    whole = Noise(7).normal((64, *event), 3, dtype=dtype)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for indices in (order, order.tolist(), tuple(order.tolist())):
        assert torch.equal(Noise(7, indices=indices).normal((64, *event), 3, dtype=dtype), whole[order])
    repeated = [5, 5, 63, 0]
    assert torch.equal(Noise(7, indices=repeated).normal((4, *event), 3, dtype=dtype), whole[repeated])


@ALL_EVENTS
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_sample_is_the_same_on_any_rank(event: tuple[int, ...], ranks: int) -> None:
    whole = Noise(11).normal((20, *event), 0)
    for r in range(ranks):
        mine = range(r, 20, ranks)  # every third sample, as samplers of data sets deal them out
        assert torch.equal(Noise(11, indices=mine).normal((len(mine), *event), 0), whole[r::ranks])
        size = -(-20 // ranks)  # a block of samples
        block = whole[r * size : (r + 1) * size]
        assert torch.equal(Noise(11, offset=r * size).normal((len(block), *event), 0), block)


@ALL_EVENTS
def test_rows_of_a_source_are_the_rows_of_its_draws(event: tuple[int, ...]) -> None:
    sources = {
        "seed": Noise(7),
        "offset": Noise(7, offset=100),
        "indices": Noise(7, indices=[9, 4, 4, 0, 2**40, 1, 3]),
        "seeds": Noise([3, 1, 4, 1, 2**64 - 1, 9, 2]),
    }
    mask = torch.tensor([True, False, False, True, True, False, True])
    for name, noise in sources.items():
        whole = noise.normal((7, *event), 2)
        for rows in ([6, 0, 0, 3], torch.tensor([2, 5]), mask, range(1, 6, 2), []):
            index = list(rows) if isinstance(rows, range) else rows
            part = noise[rows]
            n = int(mask.sum()) if rows is mask else len(rows)
            assert torch.equal(part.normal((n, *event), 2), whole[index]), (name, rows)
        for cut in (slice(2, 5), slice(0, 7), slice(None, 3), slice(1, 7, 3), slice(3, 3)):
            assert torch.equal(noise[cut].normal((len(whole[cut]), *event), 2), whole[cut]), (name, cut)
        again = noise[[1, 3, 5]][[2, 0]]
        assert torch.equal(again.normal((2, *event), 2), whole[[5, 1]]), name


@ALL_EVENTS
def test_seed_of_a_row_is_its_own_whatever_the_other_rows_are(event: tuple[int, ...]) -> None:
    seeds = [5, 0, 2**64 - 1, 2**32, 5, 77]
    many = Noise(seeds).normal((6, *event), 1)
    for b, seed in enumerate(seeds):
        assert torch.equal(Noise(seed).normal((1, *event), 1)[0], many[b]), "as sample 0 of that seed alone"
    assert torch.equal(Noise(torch.tensor([5, 0])).normal((2, *event), 1), many[:2])
    assert torch.equal(many[0], many[4]) and not torch.equal(many[0], many[1])


@BOTH
def test_longer_events_begin_with_the_numbers_of_shorter_ones(dtype: torch.dtype) -> None:
    block = 4 * numbers.BLOCK
    whole = Noise(3).normal((2, 2 * block + 5), 0, dtype=dtype)
    sizes = [*range(1, 70), *(k * block + d for k in (1, 2) for d in (-5, -1, 0, 1, 3, 5))]
    for n in sizes:
        assert torch.equal(Noise(3).normal((2, n), 0, dtype=dtype), whole[:, :n]), n
    assert torch.equal(Noise(3, offset=1).normal((1, *whole.shape[1:]), 0, dtype=dtype), whole[1:])
    assert torch.equal(whole[:, :120].reshape(2, 2, 3, 4, 5), Noise(3).normal((2, 2, 3, 4, 5), 0, dtype=dtype))


@BOTH
@pytest.mark.parametrize("block", [1, 2, 3, 8, 61, 1000])
def test_numbers_do_not_depend_on_the_internal_block(
    block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [Noise(7, offset=3), Noise(range(13)), Noise(7, indices=range(26, 0, -2))]
    shapes = [(13,), (13, 1), (13, 5), (13, 21), (13, 3, 11), (13, 129)]
    want = [noise.normal(shape, 1, dtype=dtype) for noise in sources for shape in shapes]
    monkeypatch.setattr(numbers, "BLOCK", block)
    monkeypatch.setattr(numbers, "DEVICE_BLOCK", block)
    for noise in sources:
        for n in (1, 5, 33, 129):
            rows = noise._device_rows(13, 1, torch.device("cpu"))
            whole = numbers.on_host(noise._host_rows(13, 1), n, F64, normal=False)
            assert torch.equal(numbers.on_device(rows, n, F64, normal=False), whole)
    got = [noise.normal(shape, 1, dtype=dtype) for noise in sources for shape in shapes]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b), a.shape


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@BOTH
def test_numbers_do_not_depend_on_threads(two_threads: None, dtype: torch.dtype) -> None:
    shapes = [(1, 140_001), (9_001, 3)]
    got = [Noise(1).normal(shape, 0, dtype=dtype) for shape in shapes]
    torch.set_num_threads(1)
    for z, shape in zip(got, shapes, strict=True):
        assert torch.equal(z, Noise(1).normal(shape, 0, dtype=dtype)), shape


@BOTH
@pytest.mark.parametrize("width", [1, 4, 5, 33])
def test_every_function_on_the_cpu_gives_the_same_bits(width: int, dtype: torch.dtype) -> None:
    whole = torch.stack([Noise(9).normal((9, width), draw, dtype=dtype) for draw in range(3)])
    assert torch.equal(Noise(9).normals((9, width), torch.arange(3), dtype=dtype), whole)
    assert torch.equal(Noise(9).normal((9, width), torch.full((9,), 2), dtype=dtype), whole[2]), "a draw for each row"
    ahead = Ahead(Noise(9), 3)
    assert torch.equal(torch.stack([ahead.like(whole[0], draw) for draw in range(3)]), whole)
    for first, last in itertools.combinations(range(10), 2):
        some = Noise(9, offset=first)
        laid = Laid(some, last - first, torch.device("cpu"))
        for source in (some, laid, Noise(9)[first:last], Noise(9, indices=range(first, last))):
            assert torch.equal(source.normal((last - first, width), 1, dtype=dtype), whole[1, first:last])
        assert torch.equal(laid.normals((last - first, width), torch.arange(3), dtype=dtype), whole[:, first:last])


def test_surroundings_make_no_difference() -> None:
    want = Noise(1).normal((3, 5), 0)
    x = torch.empty(5, 3).T
    assert torch.equal(Noise(1).like(x, 0), want)
    assert Noise(1).like(x.double(), 0).dtype == F64
    contexts: list[Any] = [
        torch.no_grad(),
        torch.inference_mode(),
        torch.device("meta"),  # a default device is the user's, not this one's
        torch.autocast("cpu", dtype=torch.bfloat16),
    ]
    for context in contexts:
        with context:
            z = Noise(1).normal((3, 5), 0)
            assert z.device.type == "cpu" and Noise(1).fork(2).seed == Noise(1).fork(2).seed
        assert torch.equal(z, want), context
    torch.set_default_dtype(F64)
    try:
        assert torch.equal(Noise(1).normal((3, 5), 0), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_float32_is_float64_rounded() -> None:
    coarse, fine = (Noise(5).normal((1024, 1024), 0, dtype=dtype).double() for dtype in (torch.float32, F64))
    error = (coarse - fine).abs()
    assert float(error.max()) < 5e-6 and float(error.square().mean().sqrt()) < 3e-7
    coarse, fine = (Noise(5).uniform((1024, 1024), 0, dtype=dtype).double() for dtype in (torch.float32, F64))
    assert float((coarse - fine).abs().max()) <= 2.0**-24


def test_equal_calls_are_equal_and_leave_every_global_generator_alone() -> None:
    def states() -> tuple[bytes, str, object]:
        return torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state()), random.getstate()  # noqa: NPY002

    x = torch.zeros(4, 3)
    calls: list[Callable[[], Tensor]] = [
        lambda: Noise(1).normal((4, 3), 0),
        lambda: Noise(1).uniform((4, 3), 0, dtype=F64),
        lambda: Noise(1).like(x, 0),
        lambda: Noise(1).fork(3)[1:3].like(x[1:3], 0),
        lambda: Noise([1, 2, 3, 4]).fork(0)[[3, 1]].normal((2, 3), 5),
        lambda: Noise(Noise(None).seed and 8, indices=[4, 2]).normal((2, 3), 0),
    ]
    before = states()
    for i, call in enumerate(calls):
        first = call()
        assert states() == before, i
        torch.manual_seed(i)
        assert torch.equal(call(), first), i
        before = states()


# Normal and independent.

N = 2**24


@pytest.fixture(scope="module")
def z() -> Tensor:
    """2²⁴ numbers: 4096 samples of 4096 positions."""
    return Noise(0).normal((4096, 4096), 0, dtype=F64)


def test_moments_of_2_to_the_24_draws(z: Tensor) -> None:
    power = torch.ones_like(z)
    for k, (exact, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96), (0, 945), (15, 10170)], start=1):
        power = power.mul_(z)  # E z^2k = (2k − 1)!!, and the variance of z^k is E z^2k − (E z^k)²
        assert abs(float(power.mean()) - exact) < 5 * math.sqrt(variance / N), k
    mean, var = float(z.mean()), float(z.var())
    centred = z - mean
    assert abs(float((centred**3).mean()) / var**1.5) < 5 * math.sqrt(6 / N), "skewness"
    assert abs(float((centred**4).mean()) / var**2 - 3) < 5 * math.sqrt(24 / N), "kurtosis"


def test_distribution_of_2_to_the_24_draws(z: Tensor) -> None:
    cells = 2**16
    counts = torch.bincount((torch.special.ndtr(z) * cells).long().flatten(), minlength=cells).double()
    assert len(counts) == cells
    gap = float((counts.cumsum(0) / N - torch.arange(1, cells + 1) / cells).abs().max())
    assert gap * math.sqrt(N) < 2.5, "Kolmogorov–Smirnov: passed by chance once in 10⁵"
    for width in (1, 16, 1024):  # finer cells see a wrong digit, coarser ones a slow drift
        c = counts.reshape(-1, width).sum(1)
        chi2, freedom = float((c - N / len(c)).square().sum() / (N / len(c))), len(c) - 1
        assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom), (width, chi2)


@pytest.mark.parametrize("at", [3.0, 4.0, 4.5, 5.0])
def test_tails_of_2_to_the_24_draws(z: Tensor, at: float) -> None:
    expected = N * math.erfc(at / math.sqrt(2)) / 2
    for side in (z, -z):
        assert abs(int((side > at).sum()) - expected) < 5 * math.sqrt(expected) + 1
    assert float(z.abs().max()) < 6.5


def test_no_sample_and_no_position_is_special(z: Tensor) -> None:
    for axis in (0, 1):
        for t, scale in ((z, 1.0), (z**2 - 1, math.sqrt(2))):
            means = t.mean(axis) * math.sqrt(4096) / scale  # 4096 numbers, each normal up to 1/√4096
            assert float(means.abs().max()) < 6
            assert abs(float((means**2).sum()) - 4096) < 6 * math.sqrt(2 * 4096), axis


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard errors: of the numbers or, where that is more, of their squares."""
    first = float((a * b).mean())
    second = float(((a**2 - 1) * (b**2 - 1)).mean()) / 2
    return max(abs(first), abs(second)) * math.sqrt(a.numel())


def test_neighbours_are_independent(z: Tensor) -> None:
    squares = (z**2 - 1) / math.sqrt(2)
    for lag in (1, 2, 3, 4, 64):
        for t in (z, squares):
            positions, samples = t[:, lag:] * t[:, :-lag], t[lag:] * t[:-lag]
            assert abs(float(positions.mean())) * math.sqrt(positions.numel()) < 5, lag
            assert abs(float(samples.mean())) * math.sqrt(samples.numel()) < 5, lag


def test_numbers_of_one_counter_are_independent(z: Tensor) -> None:
    # Box–Muller makes pairs of one radius, Philox fours of one counter: also their products carry nothing.
    four = z.reshape(-1, 4)
    for t in (four, (four**2 - 1) / math.sqrt(2)):
        off = t.T @ t / math.sqrt(N / 4)
        assert float(off.fill_diagonal_(0).abs().max()) < 5
    product = four.prod(1)
    assert abs(float(product.mean())) * math.sqrt(N / 4) < 5
    third = (four[:, 0] * four[:, 1] * four[:, 2]).mean()
    assert abs(float(third)) * math.sqrt(N / 4) < 5


def test_draws_seeds_and_forks_are_independent() -> None:
    base = Noise(0)
    sources = {
        "draw 0": (base, 0),
        "draw 1": (base, 1),
        "draw 2": (base, 2),
        "draw 2**31": (base, 2**31),
        "last draw": (base, MASK),
        "seed 1": (Noise(1), 0),
        "seed 2**32": (Noise(2**32), 0),
        "last seed": (Noise(2**64 - 1), 0),
        "other samples": (Noise(0, offset=2**20), 0),
        "samples past 2**32": (Noise(0, offset=2**32), 0),
        "fork 0": (base.fork(0), 0),
        "fork 1": (base.fork(1), 0),
        "fork of seed 1": (Noise(1).fork(0), 0),
        "fork of fork": (base.fork(0).fork(0), 0),
    }
    numbers = {name: noise.normal((1024, 512), draw, dtype=F64) for name, (noise, draw) in sources.items()}
    for (a, x), (b, y) in itertools.combinations(numbers.items(), 2):
        assert correlation(x, y) < 5, (a, b)
        assert correlation(x[:, 1:], y[:, :-1]) < 5, (a, b)
    seeds = Noise(range(2**12)).normal((2**12, 256), 0, dtype=F64)  # neighbouring seeds, one for each row
    for lag in (1, 2, 3, 16):
        assert correlation(seeds[lag:], seeds[:-lag]) < 5, lag
    total = torch.stack(list(numbers.values())).sum(0) / math.sqrt(len(numbers))
    assert abs(float(total.var()) - 1) < 5 * math.sqrt(2 / total.numel()), "nor are they dependent all together"


def test_every_bit_is_fair_and_independent_of_its_neighbour() -> None:
    n = 2**19
    words = (Noise(9).uniform((512, n // 512), 0, dtype=F64) * 2**32 - 0.5).long().flatten()
    bits = ((words[:, None] >> torch.arange(32)) & 1).double() * 2 - 1
    assert float(bits.mean(0).abs().max()) * math.sqrt(n) < 5
    within = bits.T @ bits / n - torch.eye(32, dtype=F64)
    across = bits[1:].T @ bits[:-1] / (n - 1)
    assert float(within.abs().max()) * math.sqrt(n) < 6 and float(across.abs().max()) * math.sqrt(n) < 6


def test_nothing_ever_repeats() -> None:
    seeds = [0, 1, 2, 2**32 - 1, 2**32, 2**63, 2**64 - 1]
    sources = [s for seed in seeds for s in (Noise(seed), Noise(seed).fork(0), Noise(seed).fork(1))]
    sources += [Noise(0, offset=2**32), Noise(0, offset=2**40), Noise(0).fork(0).fork(0), Noise(range(100, 164))]
    draws = [0, 1, 2, 2**16, MASK]
    numbers = [s.uniform((64, 256), d, dtype=F64) for s in sources for d in draws]
    words = (torch.stack(numbers) * 2**32 - 0.5).long().numpy().astype("<u4").reshape(-1, 4)
    # Four words make one counter's worth, 128 bits: two equal ones among 10⁵ would be no accident.
    assert len(words) > 5e5 / 5 and len(np.unique(words.view("V16"))) == len(words)
    forks = [Noise(seed).fork(stream).seed for seed in seeds for stream in (*range(500), 2**32, 2**64 - 1)]
    assert len({*forks, *seeds}) == len(forks) + len(seeds)
    assert Noise(0).fork(1).fork(2).seed != Noise(0).fork(2).fork(1).seed


# Sources.


def test_fork_keeps_the_rows() -> None:
    whole = Noise(3).fork(2).normal((9, 5), 0)
    assert torch.equal(Noise(3, offset=4).fork(2).normal((5, 5), 0), whole[4:])
    assert torch.equal(Noise(3, indices=[8, 1]).fork(2).normal((2, 5), 0), whole[[8, 1]])
    assert torch.equal(Noise(3)[[8, 1]].fork(2).normal((2, 5), 0), whole[[8, 1]])
    seeds = Noise([3, 4]).fork(2).normal((2, 5), 0)
    assert torch.equal(seeds[0], whole[0]) and torch.equal(seeds[1], Noise(4).fork(2).normal((1, 5), 0)[0])


def test_no_seed_is_a_fresh_one_that_can_be_told() -> None:
    a, b = Noise(), Noise(None)
    assert isinstance(a.seed, int) and a.seed != b.seed
    assert str(a.seed) in repr(a)
    assert torch.equal(a.normal((2, 3), 0), Noise(a.seed).normal((2, 3), 0))
    assert not torch.equal(a.normal((2, 3), 0), b.normal((2, 3), 0))


def test_a_source_is_a_value() -> None:
    seeds, indices = [1, 2], torch.tensor([3, 4])
    by_seed, by_index = Noise(seeds), Noise(0, indices=indices)
    want = by_seed.normal((2, 3), 0), by_index.normal((2, 3), 0)
    seeds[0], indices[0] = 9, 9
    assert torch.equal(by_seed.normal((2, 3), 0), want[0]) and torch.equal(by_index.normal((2, 3), 0), want[1])
    with pytest.raises(AttributeError):
        by_seed.seed = 3  # type: ignore[misc]
    for seed in (np.int64(7), np.uint64(7), torch.tensor(7)):
        assert torch.equal(Noise(seed).normal((2, 3), 0), Noise(7).normal((2, 3), 0))  # type: ignore[arg-type]


def test_nothing_of_nothing() -> None:
    for shape in ((0,), (0, 3), (2, 0), (2, 3, 0, 4)):
        for draw in (Noise(0).normal, Noise(0).uniform):
            assert draw(shape, 0).shape == shape
    assert Noise([]).normal((0, 3), 0).shape == (0, 3)
    assert Noise([]).fork(1).seed == ()
    assert Noise(0, indices=[]).normal((0, 3), 0).shape == (0, 3)
    assert Noise(0).like(torch.zeros(0, 3), 0).shape == (0, 3)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "negative seed": (lambda: Noise(-1), ValueError, "`seed` must be at least 0, got -1"),
    "seed too large": (
        lambda: Noise(2**64),
        ValueError,
        r"`seed` must lie in \[0, 2\*\*64\), got 18446744073709551616",
    ),
    "one negative of many": (lambda: Noise([1, -2]), ValueError, "`seed` must be at least 0, got -2"),
    "float seed": (lambda: Noise(1.0), TypeError, "`seed` must be an integer, .*, got 1.0"),  # type: ignore[arg-type]
    "bool seed": (lambda: Noise(True), TypeError, "`seed` must be an integer, .*, got True"),
    "float tensor of seeds": (lambda: Noise(torch.ones(2)), TypeError, "`seed` must be an integer"),
    "matrix of seeds": (lambda: Noise(torch.ones(2, 2, dtype=torch.int64)), TypeError, "`seed` must be an integer"),
    "string": (lambda: Noise("1"), TypeError, "`seed` must be an integer"),  # type: ignore[arg-type]
    "generator": (lambda: Noise(torch.Generator()), TypeError, "`seed` must be an integer"),  # type: ignore[arg-type]
    "negative offset": (lambda: Noise(0, offset=-1), ValueError, "`offset` must be at least 0"),
    "offset too large": (lambda: Noise(0, offset=2**63), ValueError, r"`offset` must lie in \[0, 2\*\*63\)"),
    "float offset": (lambda: Noise(0, offset=1.5), TypeError, "`offset` must be an integer"),  # type: ignore[arg-type]
    "negative index": (lambda: Noise(0, indices=[0, -1]), ValueError, "`indices` must be at least 0, got -1"),
    "index too large": (lambda: Noise(0, indices=[2**63]), ValueError, r"`indices` must lie in \[0, 2\*\*63\)"),
    "seeds and offset": (lambda: Noise([1, 2], offset=3), ValueError, "drop them"),
    "seeds and indices": (lambda: Noise([1, 2], indices=[0, 1]), ValueError, "drop them"),
    "indices and offset": (lambda: Noise(1, offset=1, indices=[0, 1]), ValueError, "drop `offset`"),
    "seeds for other rows": (lambda: Noise([1, 2]).normal((3, 4), 0), ValueError, "`seed` has 2 entries.*3 rows"),
    "seeds for no rows": (lambda: Noise([1, 2]).normal((0, 4), 0), ValueError, "`seed` has 2 entries.*0 rows"),
    "indices for other rows": (
        lambda: Noise(0, indices=[1, 2]).normal((1, 4), 0),
        ValueError,
        "`indices` has 2 entries.*1 rows",
    ),
    "half": (lambda: Noise(0).normal((1, 2), 0, dtype=torch.float16), TypeError, "`dtype`.*float16; draw, then cast"),
    "integers": (lambda: Noise(0).uniform((1, 2), 0, dtype=torch.int64), TypeError, "`dtype`.*int64"),
    "half state": (lambda: Noise(0).like(torch.zeros(2).half(), 0), TypeError, "float16"),
    "scalar state": (lambda: Noise(0).like(torch.tensor(0.0), 0), ValueError, "scalar tensor"),
    "negative draw": (lambda: Noise(0).normal((1, 2), -1), ValueError, "`draw` must be at least 0"),
    "draw too large": (lambda: Noise(0).normal((1, 2), 2**32), ValueError, r"`draw`.*2\*\*32\).*`fork`"),
    "float draw": (lambda: Noise(0).normal((1, 2), 0.5), TypeError, "`draw` must be an integer"),  # type: ignore[arg-type]
    "scalar shape": (lambda: Noise(0).normal((), 0), ValueError, r"`shape` must be \(B, \*event\), got \(\)"),
    "number as shape": (lambda: Noise(0).normal(3, 0), ValueError, "`shape`.*got 3"),  # type: ignore[arg-type]
    "negative size": (lambda: Noise(0).normal((2, -1), 0), ValueError, "`shape` must be at least 0, got -1"),
    "float size": (lambda: Noise(0).normal([2.0, 1], 0), TypeError, "`shape` must be an integer"),  # type: ignore
    "negative stream": (lambda: Noise(0).fork(-1), ValueError, "`stream` must be at least 0"),
    "stream too large": (lambda: Noise(0).fork(2**64), ValueError, r"`stream` must lie in \[0, 2\*\*64\)"),
    "row before the first": (lambda: Noise(0, offset=5)[[-1]], ValueError, "`rows` must be at least 0, got -1"),
    "mask as list": (lambda: Noise(0, offset=5)[[True, False]], TypeError, "`rows` must be an integer, got True"),
    "float rows": (lambda: Noise(0)[torch.ones(2)], TypeError, "`rows` must be an integer"),
    "one row": (lambda: Noise(0)[3], TypeError, r"`rows`.*one row is \[row\]"),  # type: ignore[index]
    "open slice": (lambda: Noise(0)[2:], ValueError, "ends that are not negative"),
    "slice from the end": (lambda: Noise(0)[:-1], ValueError, "ends that are not negative"),
    "row past the last": (lambda: Noise([1, 2])[[2]], IndexError, "index out of range"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the same numbers on both is not checked")
def test_gpu_and_cpu_agree() -> None:
    for shape in ((1, 4), (7, 21), (64, 3, 32, 32), (3, 4 * numbers.BLOCK + 5)):
        for noise in (Noise(3, offset=2**33), Noise(range(shape[0])), Noise(3, indices=range(shape[0], 0, -1))):
            u, z = (fn(shape, 5, dtype=F64, device="cuda").cpu() for fn in (noise.uniform, noise.normal))
            assert torch.equal(u, noise.uniform(shape, 5, dtype=F64)), "integers are the same everywhere"
            assert float((z - noise.normal(shape, 5, dtype=F64)).abs().max()) < 1e-13
            z32 = noise.normal(shape, 5, device="cuda")
            assert float((z32.cpu() - noise.normal(shape, 5)).abs().max()) < 5e-6
            assert torch.equal(noise[[0]].normal((1, *shape[1:]), 5, device="cuda"), z32[:1])


@pytest.mark.parametrize("shape", [(3, 5), (64, 32), (4, 100, 100)], ids=str)
def test_draws_ahead_are_the_same_numbers(shape: tuple[int, ...]) -> None:
    noise, x = Noise(3, offset=2), torch.zeros(shape)
    ahead = Ahead(noise, 37)
    for draw in (0, 1, 2, 20, 36, 36, 3):
        assert torch.equal(ahead.like(x, draw), noise.like(x, draw))
    with pytest.raises(TypeError, match="`x`"):
        ahead.like([0.0], 0)
