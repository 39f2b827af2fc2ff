r"""Measurement operators A.

An operator is a function from states (B, *event) to outputs (B, *out). A linear operator has an adjoint,
:math:`\langle Ax, y\rangle = \langle x, A^T y\rangle`, by automatic differentiation unless it is given. It solves
:math:`(a A A^T + b) u = y`, in closed form if there is one and otherwise by conjugate gradients.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._printing import short
from scoresde.denoisers.base import select
from scoresde.inverse.krylov import conjugate_gradients

_DENSE = 1 << 26  # largest number of entries of a dense matrix

_Module = TypeVar("_Module", bound=nn.Module)
_Operator = TypeVar("_Operator", bound="Operator")


def module_rows(module: _Module, names: Sequence[str], index: Tensor) -> _Module:
    """A shallow copy of a module for some samples of the batch; the module itself if nothing changes.

    Arguments:
        module: Module with attributes that hold one entry for each sample.
        names: Names of these attributes: buffers, modules with a method ``rows(index)``, or others.
        index: Numbers of the samples, an integer tensor (b,).
    """
    selected = {name: select(getattr(module, name), index) for name in names}
    if all(value is getattr(module, name) for name, value in selected.items()):
        return module
    twin = copy.copy(module)
    twin._modules, twin._buffers = dict(module._modules), dict(module._buffers)
    for name, value in selected.items():
        setattr(twin, name, value)
    return twin


@checked
class Operator(nn.Module):
    """Any differentiable function of a state, linear or not.

    A subclass with data of its own sets `event` and `out`, writes :meth:`evaluate`, and lists in `per_sample` the
    attributes that hold one entry for each sample.

    Arguments:
        forward: Function ``forward(x)``, (B, *event) to (B, *out), that treats rows independently.
        event: Shape of a state.
        out: Shape of an output; by default from one evaluation at a float32 state of zeros on the CPU.
    """

    event: tuple[int, ...]
    out: tuple[int, ...]
    per_sample: tuple[str, ...] = ()
    """Names of attributes that hold one entry for each sample; :meth:`rows` selects them."""

    __call__: Callable[..., Tensor]

    def __init__(
        self, forward: Callable[[Tensor], Tensor], event: Sequence[int], *, out: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        if not callable(forward):
            raise TypeError(f"`forward` must be a function (B, *event) to (B, *out), got {type(forward).__name__}.")
        self._function = forward
        self.event = tuple(check.integer("event", n, at_least=1) for n in event)
        self.out = self._output_shape() if out is None else tuple(check.integer("out", n, at_least=1) for n in out)

    def _output_shape(self) -> tuple[int, ...]:
        try:
            with torch.no_grad():
                y = self.evaluate(torch.zeros(1, *self.event))
        except RuntimeError as error:
            raise ValueError(
                f"`forward` failed on a float32 state of zeros on the CPU ({error}); use the dtype and device of its "
                f"input, as in x @ M.to(x), or give `out`, the shape of its output."
            ) from error
        if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != 1:
            got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"`forward` must map (B, *event) to (B, *out), got {got} for one state.")
        return tuple(y.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        """A x, (B, *event) to (B, *out)."""
        check.state("x", x)
        if tuple(x.shape[1:]) != self.event:
            raise ValueError(
                f"`x` must have the operator's shape (B, {', '.join(map(str, self.event))}), got {tuple(x.shape)}."
            )
        return self.evaluate(x)

    def evaluate(self, x: Tensor) -> Tensor:
        """A x without a check of the shape."""
        return self._function(x)

    @property
    def entries(self) -> int | Tensor:
        """Number of entries of an output, (B,) if it differs between samples."""
        return math.prod(self.out)

    @property
    def known_entries(self) -> Tensor | None:
        """Entries of an output that are not padding, bool, (B, *out); None if all are."""
        return None

    @property
    def samples(self) -> int:
        """Number of samples that the operator holds values of, 1 if it is the same for all."""
        values = [getattr(self, name) for name in self.per_sample]
        return max([_samples_of(value) for value in values], default=1)

    def rows(self: _Operator, index: Tensor) -> _Operator:
        """This operator for some samples of the batch.

        Arguments:
            index: Numbers of the samples, an integer tensor (b,).
        """
        twin = module_rows(self, self.per_sample, index)
        if twin is not self:
            twin.__dict__.pop("_svd", None)  # the decomposition of another matrix
        return twin

    def extra_repr(self) -> str:
        return f"{short(self._function)}, event={self.event}, out={self.out}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def as_output(self, y: Tensor) -> Tensor:
        """Return `y`; raise an error unless its shape is (B, *out)."""
        check.state("y", y)
        if tuple(y.shape[1:]) != self.out:
            event = tuple(self.event)
            state = {
                event: "; for data give y = operator(y[None])",
                (len(y), *event): "; for data give y = operator(y)",
            }
            raise ValueError(
                f"`y` must have shape (B, {', '.join(map(str, self.out))}), the output of the operator, got "
                f"{tuple(y.shape)}{state.get(tuple(y.shape), '')}."
            )
        return y


def _samples_of(value: object) -> int:
    """Number of samples that an attribute in `per_sample` holds values of."""
    if isinstance(value, Operator):
        return value.samples
    if isinstance(value, nn.ModuleList):
        return max(map(_samples_of, value))
    return len(value) if isinstance(value, Tensor) and value.ndim else 1


class Spectrum(NamedTuple):
    """Singular value decomposition A = U diag(s) Vᵀ of rank r.

    Arguments:
        s: Positive singular values, (r,).
        of_state: Function x ↦ Vᵀx, (B, *event) to (B, r).
        to_state: Function c ↦ V c, (B, r) to (B, *event).
        of_data: Function y ↦ Uᵀy, (B, *out) to (B, r).
    """

    s: Tensor
    of_state: Callable[[Tensor], Tensor]
    to_state: Callable[[Tensor], Tensor]
    of_data: Callable[[Tensor], Tensor]


@checked
class Linear(Operator):
    """Linear operator given by a function; the adjoint uses automatic differentiation.

    Arguments:
        forward: Linear function ``forward(x)``, (B, *event) to (B, *out).
        event: Shape of a state.
        adjoint: Function ``adjoint(y)``, (B, *out) to (B, *event), if a cheaper one is available.
        out: Shape of an output, see :class:`Operator`; if given, linearity is not checked.

    Example:
        >>> import torch
        >>> radon = Linear(lambda x: torch.stack([x.sum(-1), x.sum(-2)], 1), (8, 8))  # projections at two angles
        >>> radon.out, radon.adjoint(torch.ones(1, 2, 8)).shape
        ((2, 8), torch.Size([1, 8, 8]))
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        event: Sequence[int],
        adjoint: Callable[[Tensor], Tensor] | None = None,
        *,
        out: Sequence[int] | None = None,
    ) -> None:
        super().__init__(forward, event, out=out)
        self._own_adjoint = adjoint
        if out is None:
            self._check_linear()

    def _check_linear(self) -> None:
        x = torch.linspace(-1, 1, 2 * math.prod(self.event), dtype=torch.float64).cos().reshape(2, *self.event)
        with torch.no_grad():
            x = x.float()
            whole, parts = self(2 * x[:1] - x[1:]), 2 * self(x[:1]) - self(x[1:])
        if not torch.allclose(whole, parts, rtol=1e-4, atol=1e-4 * float(parts.abs().max()) + 1e-30):
            raise ValueError(
                "`forward` is not linear: A(2x − z) differs from 2Ax − Az; use `Operator` and a method that needs no "
                "adjoint."
            )

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y, (B, *out) to (B, *event)."""
        return self.transpose(self.as_output(y))

    def transpose(self, y: Tensor) -> Tensor:
        """Aᵀ y without a check of the shape; a subclass may have a cheaper one."""
        if self._own_adjoint is not None:
            return self._own_adjoint(y)
        differentiable = torch.is_grad_enabled() and y.requires_grad
        with torch.enable_grad():
            x = torch.zeros(len(y), *self.event, dtype=y.dtype, device=y.device, requires_grad=True)
            return torch.autograd.grad(self.evaluate(x), x, y, create_graph=differentiable)[0]

    def matrix(self) -> Tensor:
        """A as a dense matrix, (M, D), float64."""
        own = self.samples
        if own > 1:
            raise ValueError(f"the operator has {own} rows and so no single matrix; select one, as in `A.rows(index)`.")
        D, M = math.prod(self.event), math.prod(self.out)
        if D * M > _DENSE:
            raise ValueError(f"the dense matrix would have {M} × {D} entries, too many; use `forward` and `adjoint`.")
        with torch.no_grad():
            eye = torch.eye(D, dtype=torch.float64, device=self.device).reshape(D, *self.event)
            return self.evaluate(eye).reshape(D, M).mT.contiguous()

    def spectrum(self) -> Spectrum:
        """Singular value decomposition, from the dense matrix; a subclass may have a closed form."""
        if "_svd" not in self.__dict__:
            A = self.matrix()
            U, s, Vh = torch.linalg.svd(A, full_matrices=False)
            rank = int((s > s[0] * max(A.shape) * torch.finfo(A.dtype).eps).sum())
            self.__dict__["_svd"] = U[:, :rank], s[:rank], Vh[:rank]
        U, s, Vh = self.__dict__["_svd"]
        return Spectrum(
            s,
            lambda x: x.flatten(1) @ Vh.mT.to(x),
            lambda c: (c @ Vh.to(c)).reshape(-1, *self.event),
            lambda y: y.flatten(1) @ U.to(y),
        )

    def pinv(self, y: Tensor) -> Tensor:
        """A⁺ y, the least-squares solution of minimal norm, (B, *out) to (B, *event)."""
        s, _, to_state, of_data = self.spectrum()
        return to_state(of_data(self.as_output(y)) / s.to(y))

    def solve(self, y: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
        """(a A Aᵀ + b)⁻¹ y for a and b numbers or tensors (B, 1, …), by conjugate gradients."""
        return conjugate_gradients(lambda u: a * self.evaluate(self.transpose(u)) + b * u, self.as_output(y))

    @property
    def device(self) -> torch.device:
        """Device of the buffers, the CPU without any."""
        first = next(self.buffers(), None)
        return torch.device("cpu") if first is None else first.device


class ScaledIsometry(Linear):
    """Linear operator with A Aᵀ = g I: all singular values are √g."""

    gram: float

    def spectrum(self) -> Spectrum:
        root = math.sqrt(self.gram)  # U = I, V = Aᵀ/√g
        s = torch.full((math.prod(self.out),), root, dtype=torch.float64, device=self.device)
        return Spectrum(
            s,
            lambda x: self.evaluate(x).flatten(1) / root,
            lambda c: self.transpose(c.reshape(-1, *self.out)) / root,
            lambda y: y.flatten(1),
        )

    def pinv(self, y: Tensor) -> Tensor:
        return self.adjoint(y) / self.gram

    def solve(self, y: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
        return self.as_output(y) / (a * self.gram + b)


def linear_operator(operator: Operator) -> Linear:
    """Return `operator`; raise an error if it is not linear."""
    if not isinstance(operator, Linear):
        raise TypeError(
            f"`operator` must be Linear for this method, got {type(operator).__name__}; DPS and ClassifierGuidance "
            f"accept any differentiable operator."
        )
    return operator


@checked
class Mask(ScaledIsometry):
    """Inpainting: the m entries of a state where the mask is True, (B, m).

    Arguments:
        mask: Boolean tensor, True where the state is known; or (B, ...), one mask for each sample. Then m is the
            largest number of known entries, and outputs with fewer are padded with zeros.
        event: Shape of a state, to which the mask broadcasts; by default the shape of `mask`. It must be given with one
            mask for each sample.

    Example:
        >>> import torch
        >>> left, both = Mask(torch.tensor([True, False])), Mask(torch.tensor([[True, False], [True, True]]), (2,))
        >>> left(torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
        tensor([[3.],
                [5.]])
        >>> both(torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
        tensor([[3., 0.],
                [5., 6.]])
    """

    mask: Tensor
    index: Tensor
    known: Tensor
    gram = 1.0

    def __init__(self, mask: Tensor, event: Sequence[int] | None = None) -> None:
        check_mask(mask, "the state")
        shape = tuple(mask.shape if event is None else event)
        each = mask.ndim == len(shape) + 1
        try:
            whole = mask.expand((len(mask), *shape) if each else shape)
        except RuntimeError:
            raise ValueError(f"`mask` of shape {tuple(mask.shape)} does not broadcast to `event` = {shape}.") from None
        counts = whole.flatten(1).sum(1) if each else whole.sum()
        if not bool(counts.any()):
            raise ValueError("`mask` has no True entry; set it to True where the state is known.")
        nn.Module.__init__(self)
        self.register_buffer("mask", whole.contiguous())
        m = int(counts.max())
        if each:
            self.per_sample = ("mask", "index", "known")
            index = whole.flatten(1).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :m]
            self.register_buffer("known", torch.arange(m, device=mask.device) < counts[:, None])
        else:
            index = whole.flatten().nonzero()[:, 0]
        self.register_buffer("index", index)
        self.event, self.out = shape, (m,)

    @property
    def entries(self) -> int | Tensor:
        return self.known.sum(1) if self.per_sample else self.out[0]

    @property
    def known_entries(self) -> Tensor | None:
        return self.known if self.per_sample else None

    def extra_repr(self) -> str:
        if self.per_sample:
            return f"event={self.event}, known={self.out[0]}, rows={len(self.mask)}"
        return f"event={self.event}, known={self.out[0]}"

    def as_output(self, y: Tensor) -> Tensor:
        """Return `y` with zeros in its padding; raise an error unless its shape is (B, m)."""
        y = super().as_output(y)
        return torch.where(self._of_rows(self.known, y), y, 0.0) if self.per_sample else y

    def evaluate(self, x: Tensor) -> Tensor:
        if not self.per_sample:
            return x.flatten(1)[:, self.index]
        y = x.flatten(1).gather(1, self._of_rows(self.index, x))
        return torch.where(self._of_rows(self.known, x), y, 0.0)

    def transpose(self, y: Tensor) -> Tensor:
        x = y.new_zeros(len(y), math.prod(self.event))
        if not self.per_sample:
            return x.index_copy(1, self.index, y).reshape(-1, *self.event)
        y = torch.where(self._of_rows(self.known, y), y, 0.0)
        return x.scatter(1, self._of_rows(self.index, y), y).reshape(-1, *self.event)

    def _of_rows(self, value: Tensor, x: Tensor) -> Tensor:
        if len(value) not in (1, len(x)):
            raise ValueError(
                f"`mask` has {len(value)} rows and the batch has {len(x)}; give one mask for all samples or one for "
                f"each sample."
            )
        return value.expand(len(x), -1)


def check_mask(mask: Tensor, known: str) -> None:
    """Raise an error unless `mask` is a bool tensor; `known` is what it selects, for the message."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = str(mask.dtype)[6:] if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"`mask` must be a bool tensor, True where {known} is known, got {got}; use mask > 0.5.")


@checked
class Downsample(ScaledIsometry):
    """Super-resolution: means over blocks of size k along the last axes.

    Arguments:
        k: Size of a block along each axis.
        event: Shape of a state.
        dims: Number of last axes to downsample: 2 for images, 1 for signals.
    """

    def __init__(self, k: int, event: Sequence[int], dims: int = 2) -> None:
        check.integer("k", k, at_least=1)
        check.integer("dims", dims, at_least=1)
        shape = tuple(event)
        if len(shape) < dims or any(n % k for n in shape[-dims:]):
            raise ValueError(f"`k` = {k} must divide the last {dims} axes of `event` = {shape}; crop or pad the data.")
        nn.Module.__init__(self)
        self.k, self.dims, self.gram = k, dims, float(k) ** -dims
        self.event, self.out = shape, (*shape[:-dims], *(n // k for n in shape[-dims:]))

    def extra_repr(self) -> str:
        return f"{self.k}, event={self.event}, dims={self.dims}"

    def evaluate(self, x: Tensor) -> Tensor:
        lead = x.shape[: x.ndim - self.dims]
        blocks = [m for n in x.shape[x.ndim - self.dims :] for m in (n // self.k, self.k)]
        return x.reshape(*lead, *blocks).mean(tuple(range(-2 * self.dims + 1, 0, 2)))

    def transpose(self, y: Tensor) -> Tensor:
        for axis in range(-self.dims, 0):
            y = y.repeat_interleave(self.k, dim=axis)
        return y * self.gram


@checked
class Grey(ScaledIsometry):
    """Colourisation: a weighted sum of the channels, the first axis of an event.

    Arguments:
        event: Shape of a state, (C, ...).
        weights: Weight of each channel; by default the luma weights for three channels, otherwise 1/C.
    """

    weights: Tensor

    def __init__(self, event: Sequence[int], weights: Sequence[float] | None = None) -> None:
        if weights is None:
            weights = (0.299, 0.587, 0.114) if event[0] == 3 else [1 / event[0]] * event[0]
        if len(weights) != event[0]:
            raise ValueError(f"`weights` must be one for each of {event[0]} channels, got {len(weights)}.")
        nn.Module.__init__(self)
        self._numbers = tuple(float(w) for w in weights)
        self.register_buffer("weights", torch.tensor(self._numbers, dtype=torch.float64))
        self.gram = sum(w**2 for w in self._numbers)
        self.event, self.out = tuple(event), (1, *event[1:])

    def extra_repr(self) -> str:
        return f"event={self.event}, weights=({', '.join(f'{w:.4g}' for w in self._numbers)})"

    def evaluate(self, x: Tensor) -> Tensor:
        return (x * self._columns(x)).sum(1, keepdim=True)

    def transpose(self, y: Tensor) -> Tensor:
        return y * self._columns(y)

    def _columns(self, x: Tensor) -> Tensor:
        return self.weights.to(x).reshape(1, -1, *[1] * (x.ndim - 2))


@checked
class Blur(Linear):
    """Periodic convolution with a kernel along the last axes.

    Arguments:
        kernel: Centred kernel of odd sizes, with one axis for each blurred axis.
        event: Shape of a state.
    """

    kernel: Tensor

    def __init__(self, kernel: Tensor, event: Sequence[int]) -> None:
        nn.Module.__init__(self)
        n, shape = kernel.ndim, tuple(event)
        if n > len(shape) or any(k % 2 == 0 or k > m for k, m in zip(kernel.shape, shape[-n:], strict=False)):
            raise ValueError(f"`kernel` of shape {tuple(kernel.shape)} must have odd sizes, at most `event` = {shape}.")
        centred = torch.zeros(shape[-n:], dtype=torch.float64)
        centred[tuple(slice(0, k) for k in kernel.shape)] = kernel.double()
        self._axes = tuple(range(-n, 0))
        centred = centred.roll([-(k // 2) for k in kernel.shape], self._axes)
        # Real and imaginary parts, because Module.to() casts complex buffers with a warning.
        self.register_buffer("kernel", torch.view_as_real(torch.fft.rfftn(centred)))
        self.event = self.out = shape
        self._sizes = tuple(kernel.shape)

    def extra_repr(self) -> str:
        return f"kernel={self._sizes}, event={self.event}"

    def evaluate(self, x: Tensor) -> Tensor:
        return self._filter(x, self._kernel(x))

    def transpose(self, y: Tensor) -> Tensor:
        return self._filter(y, self._kernel(y).conj())

    def pinv(self, y: Tensor) -> Tensor:
        k = self._kernel(self.as_output(y))  # frequencies with k ≈ 0 are set to 0
        power = k.abs().square()
        positive = power > power.max() * torch.finfo(y.dtype).eps
        return self._filter(y, torch.where(positive, k.conj() / torch.where(positive, power, 1.0), 0.0))

    def solve(self, y: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
        self.as_output(y)
        return self._filter(y, 1 / (a * self._kernel(y).abs().square() + b))

    def _kernel(self, x: Tensor) -> Tensor:
        return torch.view_as_complex(self.kernel.to(x))

    def _filter(self, x: Tensor, gain: Tensor) -> Tensor:
        sizes = self.event[-len(self._axes) :]
        out: Tensor = torch.fft.irfftn(torch.fft.rfftn(x, dim=self._axes) * gain, s=sizes, dim=self._axes)
        return out


@checked
class FourierMask(Linear):
    """Some frequencies of a state, as in magnetic resonance imaging: orthonormal FFT, (B, ..., m, 2) as (real, imag).

    Arguments:
        mask: Boolean tensor of the shape of the last axes, in the order of ``torch.fft.fftn`` (frequency 0 first).
        event: Shape of a state.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, event: Sequence[int]) -> None:
        check_mask(mask, "a frequency")
        shape, n = tuple(event), mask.ndim
        if n > len(shape) or tuple(mask.shape) != shape[-n:]:
            raise ValueError(
                f"`mask` must have the shape of the last axes of `event` = {shape}, got {tuple(mask.shape)}."
            )
        nn.Module.__init__(self)
        self.register_buffer("mask", mask)
        self.event, self.out = shape, (*shape[:-n], int(mask.sum()), 2)

    def extra_repr(self) -> str:
        return f"event={self.event}, known={self.out[-2]} of {self.mask.numel()}"

    def evaluate(self, x: Tensor) -> Tensor:
        z = torch.fft.fftn(x, dim=tuple(range(-self.mask.ndim, 0)), norm="ortho")
        return torch.view_as_real(z[..., self.mask])

    def transpose(self, y: Tensor) -> Tensor:
        z = torch.view_as_complex(y.contiguous())
        whole = z.new_zeros(len(y), *self.event)
        whole[..., self.mask] = z
        out: Tensor = torch.fft.ifftn(whole, dim=tuple(range(-self.mask.ndim, 0)), norm="ortho").real
        return out


@checked
class Matrix(Linear):
    """Dense matrix that multiplies the flattened state.

    Arguments:
        A: Matrix, (M, D).
        event: Shape of a state with D entries; (D,) by default.
    """

    A: Tensor

    def __init__(self, A: Tensor, event: Sequence[int] | None = None) -> None:
        check.state("A", A)
        shape = (A.shape[-1],) if event is None else tuple(event)
        if A.ndim != 2 or A.shape[1] != math.prod(shape):
            raise ValueError(f"`A` must have shape (M, D) with D the size of `event` = {shape}, got {tuple(A.shape)}.")
        nn.Module.__init__(self)
        values, vectors = torch.linalg.eigh((A @ A.mT).double())
        self.register_buffer("A", A)
        self.register_buffer("_values", values.clamp_min(0))
        self.register_buffer("_vectors", vectors)
        self.event, self.out = shape, (len(A),)

    def extra_repr(self) -> str:
        return f"A={tuple(self.A.shape)}, event={self.event}"

    _values: Tensor
    _vectors: Tensor

    def evaluate(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.A.mT.to(x)

    def transpose(self, y: Tensor) -> Tensor:
        return (y @ self.A.to(y)).reshape(-1, *self.event)

    def solve(self, y: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
        u = self._vectors.to(self.as_output(y))
        gain: Tensor = a * self._values.to(y) + b
        return ((y @ u) / gain) @ u.mT
