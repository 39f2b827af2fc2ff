"""Covariances of Gaussian measurement noise, and the linear maps that whiten it."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from scoresde import _checks as check
from scoresde.inverse.operators import Linear, Matrix, Operator, ScaledIsometry, Spectrum, module_rows


class Covariance(nn.Module):
    r"""Covariance Σ of noise: a variance for each entry, or a full matrix.

    :meth:`whiten` is a linear map W with :math:`W\Sigma W^T = I`. An entry of infinite variance was not measured;
    W maps it to 0.

    Arguments:
        std: Standard deviations, (1, *out) or (B, *out), or None.
        matrix: Covariance, (1, M, M) or (B, M, M) with M the number of entries, or None.
        known: Entries that are measured, bool, (1, *out) or (B, *out), or None for all.
    """

    per_sample: ClassVar[tuple[str, ...]] = ("std", "matrix", "axes", "scale")
    """Names of attributes that hold one entry for each sample; :meth:`rows` selects them."""

    std: Tensor
    matrix: Tensor | None
    axes: Tensor | None
    scale: Tensor

    def __init__(self, std: Tensor | None, matrix: Tensor | None = None, known: Tensor | None = None) -> None:
        super().__init__()
        if matrix is not None:
            matrix = _symmetric(matrix.detach().double())
            if known is not None:  # padded entries have unit variance of their own
                flat = known.flatten(1)
                matrix = torch.where(flat[:, :, None] & flat[:, None], matrix, torch.eye(matrix.shape[-1]).to(matrix))
            values, axes = torch.linalg.eigh(matrix)
            if bool((values <= 1e-14 * values.amax(1, keepdim=True)).any()):
                raise ValueError(
                    f"`cov` must be positive definite, its smallest eigenvalue is {float(values.min()):.3g}; add the "
                    f"variance of each sensor to its diagonal."
                )
            std = matrix.diagonal(dim1=1, dim2=2).sqrt()
            self.register_buffer("axes", axes)
            self.register_buffer("scale", values.sqrt())
        else:
            assert std is not None
            std = std.detach().double()
            if known is not None:
                std = torch.where(known, std, torch.inf)
            self.register_buffer("axes", None)
            self.register_buffer("scale", std.flatten(1))
        self.register_buffer("std", std)
        self.register_buffer("matrix", matrix)

    def rows(self, index: Tensor) -> Covariance:
        """This covariance for some samples of the batch.

        Arguments:
            index: Numbers of the samples, an integer tensor (b,).
        """
        return module_rows(self, self.per_sample, index)

    @property
    def measured(self) -> Tensor:
        """Entries of finite variance, bool, (1, M) or (B, M)."""
        return self.scale.isfinite()

    @property
    def shared(self) -> bool:
        """Whether one covariance holds for all samples."""
        return len(self.scale) == 1

    def rotate(self, flat: Tensor) -> Tensor:
        """Qᵀ r in the eigenvectors Q of Σ, (B, M) to (B, M); 0 for entries that were not measured."""
        if self.axes is not None:
            return (flat[:, None] @ self.axes.to(flat))[:, 0]
        return torch.where(self.measured.to(flat.device), flat, 0.0)

    def rotate_back(self, flat: Tensor) -> Tensor:
        """Q u, (B, M) to (B, M)."""
        if self.axes is not None:
            return (self.axes.to(flat) @ flat[..., None])[..., 0]
        return torch.where(self.measured.to(flat.device), flat, 0.0)

    def whiten(self, r: Tensor) -> Tensor:
        """W r, (B, *out) to (B, M)."""
        return self.rotate(r.flatten(1)) / self.scale.to(r)

    def transpose(self, u: Tensor) -> Tensor:
        """Wᵀ u, (B, M) to (B, M)."""
        return self.rotate_back(u / self.scale.to(u))

    def color(self, z: Tensor) -> Tensor:
        """Noise with this covariance from standard normals `z`, (B, M) to (B, M); 0 where nothing was measured."""
        return self.rotate_back(torch.where(self.measured.to(z.device), z * self.scale.to(z), 0.0))

    def log_volume(self) -> Tensor:
        """Logarithm of the absolute determinant of W, (1,) or (B,)."""
        return -torch.where(self.measured, self.scale, 1.0).log().sum(1)

    def ones(self, like: Tensor) -> Tensor:
        """1 for the entries that were measured and 0 for the others, in the shape of `like`, (B, *out)."""
        if self.matrix is not None:
            return torch.ones_like(like)
        return self.std.isfinite().to(like).expand_as(like)

    def mean_precision(self) -> Tensor:
        """Mean of 1/variance over the measured entries, in the eigenvectors of Σ, (1,) or (B,)."""
        return torch.where(self.measured, self.scale**-2, 0.0).sum(1) / self.measured.sum(1).clamp_min(1)

    def solve_plus(self, diagonal: Tensor, r: Tensor) -> Tensor:
        """(Σ + diag(d))⁻¹ r, for d and r of shape (B, *out)."""
        if self.matrix is None:
            return r / (self.std.to(r) ** 2 + diagonal)
        total = self.matrix.to(r) + torch.diag_embed(diagonal.flatten(1))
        out: Tensor = torch.linalg.solve(total, r.flatten(1))
        return out.reshape(r.shape)

    def dense(self) -> Tensor:
        """Σ of the measured entries as a matrix, for one covariance for all samples, (m, m)."""
        if self.matrix is not None:
            return self.matrix[0]
        return self.std.flatten().square()[self.measured[0]].diag()


class Whitened(Linear):
    """The operator W A, whose output has standard normal noise.

    Arguments:
        inner: Operator A.
        noise: Covariance of the noise of the output of A.
    """

    per_sample = ("inner", "noise")

    def __init__(self, inner: Linear, noise: Covariance) -> None:
        nn.Module.__init__(self)
        self.inner, self.noise = inner, noise
        self.event, self.out = inner.event, (math.prod(inner.out),)

    @property
    def entries(self) -> int | Tensor:
        return _entries(self.inner, self.noise)

    def extra_repr(self) -> str:
        return f"{self.inner!r}"

    def evaluate(self, x: Tensor) -> Tensor:
        return self.noise.whiten(self.inner.evaluate(x))

    def transpose(self, y: Tensor) -> Tensor:
        return self.inner.transpose(self.noise.transpose(y).reshape(-1, *self.inner.out))

    def matrix(self) -> Tensor:
        if not self.noise.shared:
            raise ValueError(
                f"the noise has {len(self.noise.scale)} rows and so there is no single matrix; select one, as in "
                f"`measurement.rows(index)`."
            )
        return self.noise.whiten(self.inner.matrix().mT).mT.contiguous()

    def spectrum(self) -> Spectrum:
        inner, noise = self.inner, self.noise
        if not isinstance(inner, ScaledIsometry) or (inner.per_sample and noise.axes is not None):
            return super().spectrum()
        # A Aᵀ = g I, so W A = diag(√g/s) Vᵀ with V = Aᵀ Q/√g; an entry that was not measured has no coordinate.
        root = math.sqrt(inner.gram)
        s = torch.where(noise.measured, root / noise.scale, 1.0)
        return Spectrum(
            s[0] if noise.shared else s,
            lambda x: noise.rotate(inner.evaluate(x).flatten(1)) / root,
            lambda c: inner.transpose(noise.rotate_back(c).reshape(-1, *inner.out)) / root,
            lambda y: torch.where(noise.measured.to(y.device), y, 0.0),
        )

    def pinv(self, y: Tensor) -> Tensor:
        if not isinstance(self.inner, ScaledIsometry) or (self.inner.per_sample and self.noise.axes is not None):
            return super().pinv(y)
        s, _, to_state, of_data = self.spectrum()
        return to_state(of_data(self.as_output(y)) / s.to(y))

    def solve(self, y: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
        if not isinstance(self.inner, ScaledIsometry):
            return super().solve(y, a, b)
        # W A Aᵀ Wᵀ = g W Wᵀ = g diag(1/s²), also for a full covariance: W = diag(1/s) Qᵀ.
        precision = torch.where(self.noise.measured, self.noise.scale**-2, 0.0)
        return self.as_output(y) / (a * self.inner.gram * precision.to(y) + b)

    @property
    def device(self) -> torch.device:
        return self.noise.scale.device


def whitened_operator(inner: Linear, noise: Covariance) -> tuple[Linear, Tensor]:
    """The operator W A and the indices of the outputs that it keeps: all, except those that no sample measured.

    Arguments:
        inner: Operator A.
        noise: Covariance of the noise of the output of A.
    """
    every = torch.arange(math.prod(inner.out), device=noise.scale.device)
    if noise.shared and noise.axes is None and not bool(noise.measured.all()):
        index = noise.measured[0].nonzero()[:, 0]
        kept = Covariance(noise.scale[:, index])
        return Whitened(_Some(inner, index), kept), index
    if noise.shared and isinstance(inner, Matrix):
        return Matrix(noise.whiten(inner.A.mT.double()).mT.contiguous(), inner.event), every
    return Whitened(inner, noise), every


class _Some(Linear):
    """Some entries of the output of an operator.

    Arguments:
        inner: Operator.
        index: Numbers of the entries.
    """

    index: Tensor
    per_sample = ("inner",)

    def __init__(self, inner: Linear, index: Tensor) -> None:
        nn.Module.__init__(self)
        self.inner = inner
        self.register_buffer("index", index)
        self.event, self.out = inner.event, (len(index),)

    def evaluate(self, x: Tensor) -> Tensor:
        return self.inner.evaluate(x).flatten(1)[:, self.index]

    def transpose(self, y: Tensor) -> Tensor:
        whole = y.new_zeros(len(y), math.prod(self.inner.out)).index_copy(1, self.index, y)
        return self.inner.transpose(whole.reshape(-1, *self.inner.out))


def as_covariance(operator: Operator, std: Tensor | None, cov: Tensor | None) -> Covariance:
    """Check `std` or `cov` against an operator.

    Arguments:
        operator: Operator, whose output they describe.
        std: Standard deviations that broadcast to (*out) or (B, *out).
        cov: Covariance, (M, M) or (B, M, M).
    """
    out, M = operator.out, math.prod(operator.out)
    if cov is not None:
        check.state("cov", cov)
        if cov.ndim not in (2, 3) or tuple(cov.shape[-2:]) != (M, M):
            raise ValueError(
                f"`cov` must have shape ({M}, {M}) or (B, {M}, {M}) with {M} the number of entries of y, got "
                f"{tuple(cov.shape)}."
            )
        return Covariance(None, cov.reshape(-1, M, M), operator.known_entries)
    std = check.state("std", std) if not isinstance(std, Tensor) or std.ndim else std
    assert std is not None
    wide = std if std.ndim == len(out) + 1 else std[None]
    try:
        wide = wide.expand(len(wide), *out)
    except RuntimeError:
        raise ValueError(
            f"`std` of shape {tuple(std.shape)} does not broadcast to the output of the operator, {out}, or to "
            f"(B, {', '.join(map(str, out))})."
        ) from None
    if bool((wide < 0).any()) or bool(wide.isnan().any()):
        raise ValueError(f"`std` must not be negative, got {float(wide.min()):g}.")
    return Covariance(wide, None, operator.known_entries)


def _entries(operator: Operator, noise: Covariance) -> int | Tensor:
    """Number of measured entries, (B,) if it differs between samples."""
    if noise.axes is not None:
        return operator.entries
    counts = noise.measured.sum(1)
    return counts if len(counts) > 1 else int(counts)


def _symmetric(matrix: Tensor) -> Tensor:
    if not torch.allclose(matrix, matrix.mT, rtol=1e-5, atol=1e-12):
        raise ValueError("`cov` must be symmetric; give its symmetric part, (cov + cov.mT) / 2.")
    return 0.5 * (matrix + matrix.mT)
