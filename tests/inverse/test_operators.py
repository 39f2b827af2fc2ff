"""Operators: adjoints, pseudo-inverses and solves against their dense matrices."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.inverse.krylov import conjugate_gradients, minimal_residual
from scoresde.inverse.likelihoods import Counts
from scoresde.inverse.measurements import Measurement
from scoresde.inverse.operators import (
    Blur,
    Downsample,
    FourierMask,
    Grey,
    Linear,
    Mask,
    Matrix,
    Operator,
)

F64 = torch.float64


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


KERNEL = torch.tensor([[0.0, 1.0, 0.5], [1.0, 3.0, 1.0], [0.2, 1.0, 0.0]], dtype=F64) / 7.7
OPERATORS: dict[str, Linear] = {
    "mask": Mask(rand(3, 4, 6) > 0.2),
    "mask that broadcasts": Mask(rand(4, 6, seed=1) > 0, (3, 4, 6)),
    "down-sampling": Downsample(2, (3, 4, 6)),
    "down-sampling a signal": Downsample(3, (2, 6), dims=1),
    "grey": Grey((3, 4, 6)),
    "grey of two": Grey((2, 5), [0.7, -0.1]),
    "blur": Blur(KERNEL, (3, 4, 6)),
    "blur of a signal": Blur(torch.tensor([0.5, 0.3, 0.2]), (7,)),
    "Fourier mask": FourierMask(rand(4, 6, seed=2) > 0, (2, 4, 6)),
    "matrix": Matrix(rand(5, 12), (3, 4)),
    "low-rank matrix": Matrix(rand(6, 2) @ rand(2, 9, seed=1)),
    "function": Linear(lambda x: torch.stack([x.sum(-1), x.cumsum(-2)[..., 0]], 1), (4, 5)),
    "function with adjoint": Linear(lambda x: x.flip(1) * 2, (4, 5), adjoint=lambda y: y.flip(1) * 2),
}
each = pytest.mark.parametrize("name", list(OPERATORS))


@each
def test_the_adjoint_is_the_transpose(name: str) -> None:
    A = OPERATORS[name]
    x, y = rand(3, *A.event), rand(3, *A.out, seed=1)
    left, right = (A(x) * y).flatten(1).sum(1), (x * A.adjoint(y)).flatten(1).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    M = A.matrix()
    assert M.shape == (math.prod(A.out), math.prod(A.event))
    torch.testing.assert_close(A(x).flatten(1), x.flatten(1) @ M.mT, rtol=1e-12, atol=1e-12)
    assert A(x.float()).dtype == torch.float32
    torch.testing.assert_close(A.adjoint(y.float()).double(), A.adjoint(y), rtol=1e-4, atol=1e-5)


@each
def test_the_pseudo_inverse_is_that_of_the_matrix(name: str) -> None:
    A = OPERATORS[name]
    y = rand(3, *A.out, seed=1)
    truth = y.flatten(1) @ torch.linalg.pinv(A.matrix(), rtol=1e-10).mT
    torch.testing.assert_close(A.pinv(y).flatten(1), truth, rtol=1e-8, atol=1e-8)


@each
def test_solving_is_solving_the_matrix(name: str) -> None:
    A = OPERATORS[name]
    y = rand(3, *A.out, seed=1)
    M = A.matrix()
    eye = torch.eye(len(M), dtype=F64)
    for a, b in ((1.0, 0.3), (0.0, 2.0)):
        truth = torch.linalg.solve(a * M @ M.mT + b * eye, y.flatten(1).mT).mT
        torch.testing.assert_close(A.solve(y, a, b).flatten(1), truth, rtol=1e-8, atol=1e-8)
    rows = torch.tensor([0.5, 1.0, 2.0], dtype=F64).reshape(3, *[1] * len(A.out))
    many = A.solve(y, rows, 0.1)
    torch.testing.assert_close(many[1:2], A.solve(y[1:2], 1.0, 0.1), rtol=1e-8, atol=1e-8)


@each
def test_the_spectrum_is_a_singular_value_decomposition(name: str) -> None:
    A = OPERATORS[name]
    s, of_state, to_state, of_data = A.spectrum()
    c = rand(3, len(s), seed=1)
    torch.testing.assert_close(of_state(to_state(c)), c, rtol=1e-10, atol=1e-10)
    x = rand(3, *A.event)
    torch.testing.assert_close(of_data(A(x)), s * of_state(x), rtol=1e-9, atol=1e-9)
    truth = torch.linalg.svdvals(A.matrix())
    torch.testing.assert_close(s.sort(descending=True).values, truth[: len(s)], rtol=1e-9, atol=1e-9)
    assert bool((truth[len(s) :] < 1e-9).all())


def test_the_adjoint_by_differentiation_can_be_differentiated() -> None:
    A = Linear(lambda x: x.cumsum(1), (5,))
    y = rand(2, 5).requires_grad_()
    (g,) = torch.autograd.grad(A.adjoint(y).square().sum(), y)
    torch.testing.assert_close(g, 2 * y.detach() @ A.matrix() @ A.matrix().mT)
    with torch.no_grad():
        assert not A.adjoint(y).requires_grad


def test_blurring_is_convolution() -> None:
    x = rand(2, 1, 6, 6)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
    truth = torch.nn.functional.conv2d(padded, KERNEL.flip(0, 1)[None, None])
    torch.testing.assert_close(Blur(KERNEL, (1, 6, 6))(x), truth)


def test_conjugate_gradients_leave_solved_rows_alone() -> None:
    S = torch.diag(torch.tensor([1.0, 2.0, 50.0], dtype=F64))
    y = torch.stack([torch.zeros(3), torch.tensor([1.0, 0.0, 0.0]), torch.ones(3)]).double()
    torch.testing.assert_close(conjugate_gradients(lambda u: u @ S, y), y / S.diagonal())
    torch.testing.assert_close(conjugate_gradients(lambda u: u @ S, y, iterations=1)[1], y[1])


def test_minimal_residuals_solve_any_matrix_and_never_do_harm() -> None:
    S, y = rand(5, 5), rand(7, 5, seed=1)  # neither symmetric nor positive
    torch.testing.assert_close(minimal_residual(lambda u: u @ S.mT, y, 5), torch.linalg.solve(S, y.mT).mT)
    last = y.norm(dim=1)
    for k in range(1, 5):
        krylov = torch.stack([y @ torch.linalg.matrix_power(S, j).mT for j in range(k)], 2)
        best = torch.linalg.lstsq(S @ krylov, y[..., None]).solution
        u = minimal_residual(lambda u: u @ S.mT, y, k)
        torch.testing.assert_close(u, (krylov @ best)[..., 0], rtol=1e-6, atol=1e-6)
        left = (y - u @ S.mT).norm(dim=1)
        assert bool((left <= last + 1e-12).all())
        last = left
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64)  # y is orthogonal to S y
    assert not minimal_residual(lambda u: u @ turn.mT, y[:, :2], 1).any()
    torch.testing.assert_close(minimal_residual(lambda u: u @ turn.mT, y[:, :2], 3), y[:, :2] @ turn)
    assert torch.equal(minimal_residual(lambda u: 0 * u, y, 3), torch.zeros_like(y))
    done = minimal_residual(lambda u: u @ S.mT.float(), y.float() * torch.tensor([1.0] * 6 + [0.0])[:, None], 12)
    assert done.isfinite().all() and not done[-1].any()


def test_a_measurement_moves_and_casts_as_a_module() -> None:
    seen = Measurement(OPERATORS["matrix"], rand(1, 5), 0.1)
    x = rand(4, 3, 4)
    assert seen.to(torch.float32).residual(x.float()).dtype == torch.float32
    truth = torch.distributions.Normal(seen.operator(x), 0.1).log_prob(seen.y.double()).sum(1)
    torch.testing.assert_close(seen.log_prob(x), truth, rtol=1e-5, atol=1e-5)


# One mask for each sample.

EACH = rand(4, 3, 5, seed=6) > torch.tensor([-0.5, 0.0, 0.5, 1.0], dtype=F64)[:, None, None]


def test_a_mask_of_each_sample_has_the_rows_of_single_masks() -> None:
    A, x = Mask(EACH, (3, 5)), rand(4, 3, 5, seed=7)
    counts = EACH.flatten(1).sum(1)
    assert A.out == (int(counts.max()),) and len(set(counts.tolist())) == 3
    assert isinstance(A.entries, Tensor) and torch.equal(A.entries, counts)
    y = A(x) + 0.1 * rand(4, *A.out, seed=8)
    seen = Measurement(A, y, 0.3)
    for i, m in enumerate(counts.tolist()):
        one = Mask(EACH[i])
        alone = Measurement(one, y[i : i + 1, :m], 0.3)
        part = x[i : i + 1]
        assert torch.equal(A(x)[i : i + 1, :m], one(part)) and not A(x)[i, m:].any()
        assert torch.equal(A.adjoint(y)[i : i + 1], one.adjoint(y[i : i + 1, :m]))
        assert torch.equal(A.pinv(y)[i : i + 1], one.pinv(y[i : i + 1, :m]))
        assert torch.equal(A.solve(y, 2.0, 0.5)[i : i + 1, :m], one.solve(y[i : i + 1, :m], 2.0, 0.5))
        assert torch.equal(seen.rows(torch.tensor([i])).log_prob(part), seen.log_prob(x)[i : i + 1])
        torch.testing.assert_close(seen.log_prob(x)[i : i + 1], alone.log_prob(part))
        torch.testing.assert_close(A.rows(torch.tensor([i])).matrix()[:m], one.matrix())
    left, right = (A(x) * y).flatten(1).sum(1), (x * A.adjoint(y)).flatten(1).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    s, of_state, to_state, of_data = A.spectrum()
    torch.testing.assert_close(of_data(A(x)), s * of_state(x))
    torch.testing.assert_close(to_state(of_state(x)), torch.where(EACH, x, 0.0))
    assert not seen.y[:, int(counts.min()) :][counts == counts.min()].any(), "padding of y is set to zero"


def test_a_mask_of_each_sample_broadcasts_and_names_a_wrong_batch() -> None:
    rows = torch.tensor([[True, False, True], [False, False, True]])
    A = Mask(rows[:, None], (4, 3))
    assert torch.equal(A.mask, rows[:, None].expand(2, 4, 3)) and A.out == (8,)
    assert A.rows(torch.tensor([1])).mask.shape == (1, 4, 3)
    with pytest.raises(ValueError, match="`mask` has 2 rows and the batch has 3; give one mask for all samples"):
        A(rand(3, 4, 3))
    with pytest.raises(ValueError, match="`mask` has 2 rows and the batch has 1"):
        Measurement(A, torch.zeros(1, 8), 0.1)
    with pytest.raises(ValueError, match=r"no single matrix; select one, as in `A.rows\(index\)`"):
        A.matrix()


def test_replacement_takes_a_mask_of_each_sample() -> None:
    prior = ss.GaussianMixture(ss.VP(), torch.zeros(1, 3, 5), std=1.0)
    A, x = Mask(EACH, (3, 5)), rand(4, 3, 5, seed=7)
    hook = ss.inverse.Replacement(prior.sde, Measurement(A, A(x), 0.0), seed=1)
    out = ss.sample(prior, (4, 3, 5), steps=4, seed=0, watch=ss.Watch(hook=hook), start=ss.Start(dtype=F64))
    assert torch.equal(out[EACH], x[EACH]) and not torch.isclose(out[~EACH], x[~EACH]).any()


# How operators and measurements print.

TEXTS = {
    "Mask(event=(2, 3), known=4)": lambda: Mask(torch.tensor([[True, False, True]] * 2)),
    "Mask(event=(3, 5), known=11, rows=4)": lambda: Mask(EACH, (3, 5)),
    "Downsample(2, event=(3, 4, 6), dims=2)": lambda: Downsample(2, (3, 4, 6)),
    "Grey(event=(3, 4, 6), weights=(0.299, 0.587, 0.114))": lambda: Grey((3, 4, 6)),
    "Blur(kernel=(3, 3), event=(3, 4, 6))": lambda: Blur(KERNEL, (3, 4, 6)),
    "FourierMask(event=(2, 4), known=3 of 4)": lambda: FourierMask(torch.tensor([True, True, False, True]), (2, 4)),
    "Matrix(A=(5, 12), event=(3, 4))": lambda: Matrix(rand(5, 12), (3, 4)),
    "Linear(cumsum, event=(4,), out=(4,))": lambda: Linear(cumsum, (4,)),
    "Operator(<Linear, 15 parameters>, event=(4,), out=(3,))": lambda: Operator(torch.nn.Linear(4, 3), (4,)),
    "Operator(cumsum, event=(4,), out=(4,))": lambda: Operator(functools.partial(cumsum, dim=1), (4,)),
    "Measurement(Mask(event=(2,), known=1), y=(5, 1), std=0.3)": lambda: Measurement(
        Mask(torch.tensor([True, False])), torch.zeros(5, 1), 0.3
    ),
    "Counts(Mask(event=(2,), known=1), y=(5, 1), floor=0.01)": lambda: Counts(
        Mask(torch.tensor([True, False])), torch.zeros(5, 1)
    ),
}


def cumsum(x: Tensor, dim: int = 1) -> Tensor:
    return x.cumsum(dim)


@pytest.mark.parametrize("text", TEXTS)
def test_operators_and_measurements_print_on_one_line(text: str) -> None:
    assert repr(TEXTS[text]()) == text


def test_posterior_denoisers_print_without_tensors_or_addresses() -> None:
    prior = ss.GaussianMixture(ss.VP(), torch.zeros(1, 2), std=1.0)
    seen = Measurement(Mask(torch.tensor([True, False])), torch.zeros(5, 1), 0.3)
    texts = {
        "DPS(scale=<5 float32>": ss.inverse.DPS(prior, seen, torch.ones(5)),
        "DPS(scale=cos": ss.inverse.DPS(prior, seen, torch.cos),
        "PiGDM(data_std=1, through_net=True": ss.inverse.PiGDM(prior, seen),
        "MMPS(iterations=5": ss.inverse.MMPS(prior, seen),
        "TMPD(model=": ss.inverse.TMPD(prior, seen),
        "DDNM(model=": ss.inverse.DDNM(prior, seen),
        "DiffPIR(weight=1": ss.inverse.DiffPIR(prior, seen),
    }
    for text, model in texts.items():
        assert repr(model).startswith(text), repr(model)
        assert f"measurement={seen!r}" in repr(model)
        assert " at 0x" not in repr(model) and "tensor(" not in repr(model) and "\n" not in repr(model)
    hook = ss.inverse.Replacement(ss.VP(), seen, seed=1)
    assert repr(hook) == f"Replacement(sde={ss.VP()!r}, measurement={seen!r}, seed=1, fresh=True)"


def test_errors_name_what_is_wrong() -> None:
    A = OPERATORS["mask"]
    with pytest.raises(TypeError, match=r"`mask` must be a bool tensor, .* got float32; use mask > 0.5"):
        Mask(torch.ones(3))
    with pytest.raises(TypeError, match=r"`mask` must be a bool tensor, .* got int64"):
        FourierMask(torch.ones(3, dtype=torch.int64), (3,))
    with pytest.raises(ValueError, match="`mask` has no True entry"):
        Mask(torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="does not broadcast"):
        Mask(torch.ones(3, dtype=torch.bool), (4,))
    with pytest.raises(ValueError, match=r"`x` must have the operator's shape \(B, 3, 4, 6\), got \(1, 3, 4, 5\)"):
        A(torch.zeros(1, 3, 4, 5))
    with pytest.raises(ValueError, match=r"`y` must have shape .* the output of the operator"):
        Measurement(A, torch.zeros(1, 3, 4, 6), 0.1)
    with pytest.raises(ValueError, match="`std` must be finite and at least 0, got -1"):
        Measurement(A, torch.zeros(1, *A.out), -1)
    with pytest.raises(TypeError, match="`operator` must be an Operator"):
        Measurement(lambda x: x, torch.zeros(1, 3), 0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`std` must be greater than 0 for log_prob"):
        Measurement(A, torch.zeros(1, *A.out), 0).log_prob(torch.zeros(1, 3, 4, 6))
    with pytest.raises(ValueError, match="`y` has 2 rows and the state has 3"):
        Measurement(A, torch.zeros(2, *A.out), 0).residual(torch.zeros(3, 3, 4, 6))
    with pytest.raises(ValueError, match="`forward` is not linear"):
        Linear(lambda x: x**2, (3,))
    with pytest.raises(ValueError, match=r"`forward` failed on a float32 state.*give `out`"):
        Linear(lambda x: x @ rand(3, 2), (3,))
    assert Linear(lambda x: x @ rand(3, 2), (3,), out=(2,)).pinv(rand(1, 2)).shape == (1, 3)
    with pytest.raises(TypeError, match="`operator` must be Linear"):
        Measurement(Operator(torch.square, (3,)), torch.zeros(1, 3), 0.1).linear  # noqa: B018
    with pytest.raises(ValueError, match="`k` = 4 must divide"):
        Downsample(4, (3, 6, 8))
    with pytest.raises(ValueError, match="`kernel` of shape"):
        Blur(torch.ones(2, 2), (3, 4, 4))
    with pytest.raises(ValueError, match="`A` must have shape"):
        Matrix(torch.ones(2, 3), (4,))
    with pytest.raises(ValueError, match="`weights` must be one for each of 3 channels"):
        Grey((3, 4, 4), [1.0, 2.0])
    assert ss.inverse.Mask is Mask
