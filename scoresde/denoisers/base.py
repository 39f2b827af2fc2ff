"""The base class of all denoisers, and denoisers that wrap another one."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from scoresde import _checks as check
from scoresde._doors import checked, constant, words
from scoresde._printing import short
from scoresde.denoisers.predictions import Coefficient, Want, as_form, conversion, form_of
from scoresde.plan.folding import Outputs
from scoresde.processes.sde import SDE

if TYPE_CHECKING:
    from scoresde.denoisers.card import Card
    from scoresde.denoisers.gaussian import Gaussian

_MEMO = 4096  # largest number of entries in the cache of a denoiser


T = TypeVar("T")

# Hints for the names that other libraries give to conditions.
CONDITIONS = words("""
label labels class_label class_labels classes y cond condition conditions context: conditions belong to the model, \
as in model.given(label=y)
encoder_hidden_states prompt prompt_embeds text: conditions belong to the model, as in model.given(text=...)
guidance_scale cfg_scale cfg guidance w: guidance is a denoiser, ss.ClassifierFree(model, scale, null={"label": ...})
""")

Condition = Any  # a tensor (B, ...), a tree of tensors, or any value that the network accepts


@dataclass(frozen=True)
class Shared:
    """A condition without a batch axis: the network receives `value` as it is, whatever the batch.

    Arguments:
        value: Any value, such as a table of text embeddings that all samples share.
    """

    value: object

    def __repr__(self) -> str:
        return f"Shared({short(self.value)})"


@dataclass(frozen=True)
class Kind:
    """The network, or exact model, at the end of a chain of denoisers.

    Arguments:
        predicts: Prediction of the network; ``"x0"`` for exact models and for denoisers of one's own.
        sde: Process that the network was trained on.
        exact: Whether the denoiser is computed in closed form.
        variance: Meaning of the variance that the network returns, see :class:`Denoiser`; None without one.
    """

    predicts: str
    sde: SDE
    exact: bool = False
    variance: str | None = None


class Counter:
    """Count of network evaluations, with the numbers `calls` of forward passes and `states` of evaluated states."""

    def __init__(self) -> None:
        self.calls = 0
        self.states = 0

    def __repr__(self) -> str:
        return f"Counter(calls={self.calls}, states={self.states})"

    def add(self, states: int) -> None:
        """Count one forward pass on a batch of `states`."""
        self.calls += 1
        self.states += states


class AbstractDenoiser(nn.Module):
    """Base class of all denoisers; a subclass calls ``super().__init__(sde)`` and writes :meth:`x0`.

    All methods take a state `x` of shape (B, *event), a time `t` (a number, () or (B,)) and conditions by name. They
    return a tensor of the shape of `x`. Conditions reach :meth:`x0` as the user gave them;
    ``expand_conditions(cond, len(x))`` expands single rows and unpacks :class:`Shared` ones. A denoiser that holds
    values of samples, such as a scale of shape (B,), lists their attributes in `per_sample`.

    Arguments:
        sde: Process of the states.

    Example:
        >>> import torch, scoresde as ss
        >>> class Shrink(ss.denoisers.AbstractDenoiser):
        ...     def x0(self, x, t, **cond):
        ...         return x / (1 + self.sde.sigma(t) ** 2)
        >>> ss.sample(Shrink(ss.EDM()), (4, 2), steps=5, seed=0).shape
        torch.Size([4, 2])
    """

    per_sample: ClassVar[tuple[str, ...]] = ()
    """Names of attributes that hold one entry for each sample; :meth:`AbstractDenoiser.rows` selects them."""

    sde: SDE

    def __init__(self, sde: SDE) -> None:
        super().__init__()
        self.sde = check_sde(sde)

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        """Data prediction, E[x_0 | x_t = x]."""
        raise NotImplementedError(f"{type(self).__name__} must define `x0(x, t, **cond)`.")

    def __repr__(self) -> str:
        own = self.extra_repr()
        inner = [f"{name}={short(module)}" for name, module in self.named_children()]
        return f"{type(self).__name__}({', '.join([own] * bool(own) + inner)})"

    def extra_repr(self) -> str:
        return f"sde={self.sde!r}"

    @property
    def kind(self) -> Kind:
        """The network, or exact model, that this denoiser ends in."""
        return Kind("x0", self.sde)

    @property
    def gaussian(self) -> Gaussian | None:
        """Gaussian approximation of the data that the network was trained on, if the denoiser knows one."""
        return None

    @property
    def conditions(self) -> dict[str, Condition]:
        """Conditions that are fixed by :meth:`given`, by name."""
        return {}

    @property
    def shared_conditions(self) -> tuple[str, ...]:
        """Names of conditions without a batch axis, which :meth:`given` treats as `shared`."""
        return ()

    @checked
    def given(self, *, shared: Mapping[str, object] | None = None, **cond: Condition) -> Given:
        """Fix conditions of the network.

        Arguments:
            shared: Conditions without a batch axis, by name; they reach the network as they are.
            **cond: Conditions by name: tensors with one row for each sample, or with one row for all samples.

        Returns:
            A denoiser that samplers, likelihoods and fits use without further arguments.

        Example:
            >>> import torch, scoresde as ss
            >>> net = lambda x, t, label: label[:, None] * x
            >>> model = ss.Denoiser(net, ss.VP(), predicts="x0").given(label=torch.tensor([0.0, 1.0, 2.0]))
            >>> model.x0(torch.ones(3, 2), 0.5)[:, 0]
            tensor([0., 1., 2.])
            >>> model.rows(torch.tensor([2])).x0(torch.ones(1, 2), 0.5)
            tensor([[2., 2.]])
        """
        self._refuse_misspelled((*cond, *(shared or {})))
        return Given(self, **share(cond, self.shared_conditions), **share(shared or {}, tuple(shared or ())))

    def _refuse_misspelled(self, names: tuple[str, ...]) -> None:
        """Raise an error if a name is nearly that of a condition of the network; other denoisers pass theirs on."""

    def x0_and_variance(self, x: Tensor, t: float | Tensor, **cond: Condition) -> tuple[Tensor, Tensor]:
        """Data prediction and the network's variance output, for networks that learn a variance."""
        raise ValueError(f"{type(self).__name__} predicts no variance; make the denoiser with `learned_variance`=True.")

    def forward(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        """Data prediction, the same as :meth:`x0`."""
        return self.x0(x, t, **cond)

    def eps(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        r"""Noise prediction, :math:`\varepsilon = (x - \alpha x_0)/\sigma`."""
        return self.predict("eps", x, t, **cond)

    def score(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        r"""Score, :math:`\nabla_x\log p_t(x) = (\alpha x_0 - x)/\sigma^2`."""
        return self.predict("score", x, t, **cond)

    def v(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        r"""v-prediction, :math:`v = \alpha\varepsilon - \sigma x_0`."""
        return self.predict("v", x, t, **cond)

    def velocity(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        r"""Velocity of the probability-flow ODE, :math:`dx/dt = \dot\alpha x_0 + \dot\sigma\varepsilon`."""
        return self.predict("velocity", x, t, **cond)

    def predict(self, want: Want, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        """Any prediction.

        Arguments:
            want: Name of the prediction, or a function of (sde, t, α, σ) that returns its linear form.
            x: State, (B, *event).
            t: Time: a number, () or (B,).
            **cond: Conditions of the network.
        """
        return self.convert("x0", self.x0(x, t, **cond), want, x, t)

    def convert(self, kind: str, out: Tensor, want: Want, x: Tensor, t: float | Tensor, s: float = 1.0) -> Tensor:
        """Convert the prediction `out` of one kind into another; `s` is the data's deviation in EDM's F."""
        if want == kind:
            return out
        if not isinstance(t, Tensor):
            a, b = self._coefficients(kind, want, t, s)
            if a == 0:
                return out if b == 1 else b * out
            return torch.add(x * a, out, alpha=b)  # not in place: under vmap one of the two may have no batch axis
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        source, target = form_of(kind, self.sde, t, alpha, sigma, s), as_form(want, self.sde, t, alpha, sigma)
        of_x, of_out = conversion(source, target, alpha, sigma)
        of_out = check.expand(of_out, x)
        if isinstance(of_x, float) and of_x == 0:
            return out if isinstance(of_out, float) and of_out == 1 else of_out * out
        result: Tensor = check.expand(of_x, x) * x + of_out * out
        return result

    def outputs_at(self, times: tuple[float, ...], x: Tensor, **cond: Condition) -> Outputs | None:
        """This denoiser as a linear function of a network's output, for the evaluations of a run.

        None, the default, says that it is none, or that something about each evaluation must be checked: the run then
        evaluates :meth:`x0`.

        Arguments:
            times: Times of the evaluations.
            x: Initial state, (B, *event).
            **cond: Conditions of the network.
        """
        return None

    @constant
    def keeps(self, kind: type[AbstractDenoiser], names: tuple[str, ...] = ("x0",)) -> bool:
        """Whether methods are those of a class: neither a subclass nor an attribute of the object replaces them.

        Arguments:
            kind: Class of the library.
            names: Names of the methods.
        """
        return all(getattr(type(self), name) is getattr(kind, name) and name not in vars(self) for name in names)

    def _coefficients(self, kind: str, want: Want, t: float, s: float) -> tuple[float, float]:
        """Coefficients of x and of the output at a time `t` that is a number."""

        def compute() -> tuple[float, float]:
            alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
            try:
                source, target = form_of(kind, self.sde, t, alpha, sigma, s), as_form(want, self.sde, t, alpha, sigma)
                of_x, of_out = cast(tuple[float, float], conversion(source, target, alpha, sigma))
            except ZeroDivisionError:
                raise undefined_prediction(t, alpha, sigma) from None
            if not math.isfinite(of_x + of_out):
                raise undefined_prediction(t, alpha, sigma)
            return of_x, of_out

        return self._cached((kind, want, t, s), compute) if isinstance(want, str) else compute()

    def _cached(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Result of `compute`, cached under `key` until ``self.sde`` is replaced."""
        if torch.compiler.is_compiling():
            return compute()
        owner, memo = self.__dict__.get("_memo", (None, {}))
        if owner is not self.sde or len(memo) >= _MEMO:
            memo = {}
            self.__dict__["_memo"] = (self.sde, memo)
        if key not in memo:
            memo[key] = compute()
        return memo[key]  # type: ignore[no-any-return]

    @checked
    def rows(self, index: Tensor) -> AbstractDenoiser:
        """This denoiser for some samples of the batch; every attribute in `per_sample` is selected.

        Arguments:
            index: Numbers of the samples, an integer tensor (b,); a number may occur more than once.
        """
        return self._twin(lambda inner: inner.rows(index), self.row_attributes(index))

    def row_attributes(self, index: Tensor) -> dict[str, object]:
        """Attributes of the denoiser for some samples, by name: those in `per_sample`, selected by :func:`select`.

        Arguments:
            index: Numbers of the samples, an integer tensor (b,).
        """
        return {name: select(getattr(self, name), index) for name in self.per_sample}

    def counted(self, counter: Counter) -> AbstractDenoiser:
        """This denoiser with `counter` counting every evaluation of the network.

        A denoiser that is not a :class:`Wrapped` one counts as a network.

        Arguments:
            counter: Counter of the evaluations.
        """
        return _Counted(self, counter)

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        card: Card | None = None,
        build: Mapping[str, object] | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write the denoiser to a folder for ``ss.load``; only a :class:`Denoiser`, a network, can be written.

        Arguments:
            folder: Path of the folder.
            card: Facts that a user of the weights needs beside them, a :class:`Card`.
            build: Import path and arguments of the network's class.
            overwrite: Whether to replace the files in a folder that is not empty.
        """
        inner = [name for name, module in self.named_children() if isinstance(module, AbstractDenoiser)]
        way = (
            f"save the inside, model.{inner[0]}.save(folder), and make the {type(self).__name__} again after ss.load"
            if inner
            else f"save the numbers that make the {type(self).__name__}, and its process with sde.to_dict()"
        )
        raise TypeError(f"{type(self).__name__} is not a network with a process, which alone can be saved; {way}.")

    @property
    def is_leaf(self) -> bool:
        """Whether no other denoiser is inside: the denoiser then ends its own chain."""
        return not any(_holds_denoiser(module) for module in self._modules.values())

    def _twin(
        self, change: Callable[[AbstractDenoiser], AbstractDenoiser], own: Mapping[str, object]
    ) -> AbstractDenoiser:
        """A shallow copy with changed inner denoisers and attributes; the denoiser itself if nothing changes."""
        modules = {name: _changed(module, change) for name, module in self._modules.items()}
        same = all(modules[name] is module for name, module in self._modules.items())
        if same and all(own[name] is getattr(self, name) for name in own):
            return self
        twin = copy.copy(self)
        twin._modules = modules
        twin._buffers = dict(self._buffers)
        for name, value in own.items():
            setattr(twin, name, value)
        return twin


def trainable(model: AbstractDenoiser) -> tuple[Tensor, ...]:
    """Tensors of a denoiser that require grad: parameters, buffers, fixed conditions and the like in `per_sample`."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, AbstractDenoiser):
            for leaf in (leaf for name in module.per_sample for leaf in tree_leaves(getattr(module, name))):
                tensors += tree_leaves(leaf.value if isinstance(leaf, Shared) else leaf)
    unique = {id(v): v for v in tensors if isinstance(v, Tensor) and v.requires_grad}
    return tuple(unique.values())


def undefined_prediction(t: float | Tensor, alpha: Coefficient, sigma: Coefficient) -> ValueError:
    """The error for a time at which a prediction is not defined, since a conversion divides by zero there."""
    return ValueError(
        f"this prediction is not defined at t = {t}, where alpha = {alpha} and sigma = {sigma}: the conversion divides "
        f"by zero or a coefficient is infinite; evaluate at t in [t_min, T), or evaluate `x0`."
    )


def check_sde(sde: object) -> SDE:
    """Return `sde`; raise an error unless it is a process."""
    if not isinstance(sde, SDE):
        raise TypeError(f"`sde` must be an SDE such as VP(), got {type(sde).__name__}.")
    return sde


def check_conditions(cond: Mapping[str, Condition], rows: int) -> None:
    """Raise an error if a condition has neither one row nor `rows` rows; :class:`Shared` ones pass."""
    for name, tree in cond.items():
        for leaf in (tree,) if isinstance(tree, Tensor) else tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] not in (1, rows):
                raise ValueError(
                    f"condition `{name}` has {leaf.shape[0]} rows and the state has {rows}; give one row for each "
                    f"sample, one row for all, or `shared` for a condition without a batch axis, as in "
                    f"model.given(shared={{{name!r}: ...}})."
                )


def share(cond: Mapping[str, Condition], names: tuple[str, ...]) -> dict[str, Condition]:
    """Conditions, with those of the given names marked as :class:`Shared`."""
    return {k: Shared(c) if k in names and not isinstance(c, Shared) else c for k, c in cond.items()}


def expand_conditions(cond: Mapping[str, Condition], rows: int) -> dict[str, Condition]:
    """Conditions as a network receives them: single rows expanded to all rows, :class:`Shared` ones unpacked.

    Arguments:
        cond: Conditions by name.
        rows: Number of rows of the state.
    """

    def expand(leaf: Condition) -> Condition:
        if isinstance(leaf, Shared):
            return leaf.value
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == 1 and rows > 1:
            return leaf.expand(rows, *leaf.shape[1:])
        return leaf

    return {k: expand(c) if isinstance(c, (Tensor, Shared)) else tree_map(expand, c) for k, c in cond.items()}


def check_model(model: object, name: str = "model") -> AbstractDenoiser:
    """Return `model`; raise an error unless it is a denoiser."""
    if not isinstance(model, AbstractDenoiser):
        raise TypeError(f"`{name}` must be a denoiser, Denoiser(net, sde, predicts=...), got {type(model).__name__}.")
    return model


def same_process(model: AbstractDenoiser, other: AbstractDenoiser, name: str) -> None:
    """Raise an error if `other` is on another process than `model`."""
    if model.sde != other.sde:
        raise ValueError(
            f"`{name}` is on {other.sde!r} and the model on {model.sde!r}; ss.denoisers.Rescheduled({name}, "
            f"model.sde) puts it on the same process."
        )


def _changed(module: nn.Module | None, change: Callable[[AbstractDenoiser], AbstractDenoiser]) -> nn.Module | None:
    """A child with its denoisers changed, inside lists and dictionaries of modules too."""
    if isinstance(module, AbstractDenoiser):
        return change(module)
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        parts = {name: _changed(part, change) for name, part in module._modules.items()}
        if any(parts[name] is not part for name, part in module._modules.items()):
            module = copy.copy(module)
            vars(module)["_modules"] = parts
    return module


def _holds_denoiser(module: nn.Module | None) -> bool:
    """Whether a child is a denoiser, or a list or dictionary of modules that holds one."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return any(_holds_denoiser(part) for part in module._modules.values())
    return isinstance(module, AbstractDenoiser)


def select(value: Any, index: Tensor) -> Any:
    """The entries of some samples in a value that belongs to a batch.

    Arguments:
        value: A tensor (B, ...), a tree of tensors, an object with a method ``rows(index)``, or a function of time that
            returns one of these. Tensors with one row, and values without a batch axis, stay as they are.
        index: Numbers of the samples, an integer tensor (b,).
    """
    if isinstance(value, Tensor):
        if value.ndim == 0 or len(value) == 1:
            return value
        return value[index.to(value.device, non_blocking=value.device.type != "cpu")]
    if hasattr(value, "rows"):
        return value.rows(index)
    if callable(value):
        return _OfSamples(value, index)
    leaves, spec = tree_flatten(value)
    chosen = [select(leaf, index) if isinstance(leaf, Tensor) or hasattr(leaf, "rows") else leaf for leaf in leaves]
    return value if all(a is b for a, b in zip(leaves, chosen, strict=True)) else tree_unflatten(chosen, spec)


class _OfSamples:
    """A function of time for some samples of the batch that it was written for."""

    def __init__(self, function: Callable[[float | Tensor], float | Tensor], index: Tensor) -> None:
        self.function, self.index = function, index

    def rows(self, index: Tensor) -> _OfSamples:
        return _OfSamples(self.function, self.index[index.to(self.index.device)])

    def __call__(self, t: float | Tensor) -> float | Tensor:
        if not isinstance(t, Tensor) or t.ndim == 0:
            return cast(float | Tensor, select(self.function(t), self.index))
        first = self.function(t[:1])
        if not isinstance(first, Tensor) or first.ndim == 0 or len(first) == 1:
            return self.function(t)  # elementwise in t
        rows = [select(self.function(s), i) for s, i in zip(t.split(1), self.index.split(1), strict=True)]
        return torch.cat(rows)


class Wrapped(AbstractDenoiser):
    """A denoiser made from one other denoiser or from several; the base of guidance and of posterior denoisers.

    Inner denoisers are modules of this one, so that :meth:`AbstractDenoiser.rows` and :meth:`counted` reach them.

    Arguments:
        model: The inner denoiser.
        sde: Process of the states, by default that of `model`.
    """

    def __init__(self, model: AbstractDenoiser, sde: SDE | None = None) -> None:
        inner = check_model(model).sde
        super().__init__(inner if sde is None else sde)
        self.model = model

    @property
    def kind(self) -> Kind:
        return self.model.kind

    @property
    def gaussian(self) -> Gaussian | None:
        return self.model.gaussian

    @property
    def conditions(self) -> dict[str, Condition]:
        return self.model.conditions

    @property
    def shared_conditions(self) -> tuple[str, ...]:
        return self.model.shared_conditions

    @property
    def branch(self) -> AbstractDenoiser:
        """The inner denoiser whose learned variance :meth:`x0_and_variance` returns: that with the condition."""
        return self.model

    def x0_and_variance(self, x: Tensor, t: float | Tensor, **cond: Condition) -> tuple[Tensor, Tensor]:
        """Data prediction of this denoiser, and the variance output of the first evaluation of :attr:`branch`.

        Guidance changes the mean of a step and keeps the variance of the network with the condition, as in the samplers
        of GLIDE, DiT and guided diffusion.
        """
        branch = self.branch
        if branch.kind.variance is None:
            return super().x0_and_variance(x, t, **cond)
        memory = _Variance(branch)
        x0 = self._twin(lambda inner: memory if inner is branch else inner, {}).x0(x, t, **cond)
        if not memory.outputs:
            raise ValueError(f"{type(self).__name__} does not evaluate its inner denoiser, so it has no variance.")
        variance = memory.outputs[0][: len(x)]  # guidance in one forward pass has the condition in the first half
        return x0, variance if x0.requires_grad else variance.detach()

    def counted(self, counter: Counter) -> AbstractDenoiser:
        return self._twin(lambda inner: inner.counted(counter), {})

    def extra_repr(self) -> str:
        return ""


class _Variance(Wrapped):
    """A denoiser that keeps the variance outputs of its evaluations; copies share the list."""

    def __init__(self, model: AbstractDenoiser) -> None:
        super().__init__(model)
        self.outputs: list[Tensor] = []

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        x0, variance = self.model.x0_and_variance(x, t, **cond)
        self.outputs.append(variance)
        return x0


@checked
class Given(Wrapped):
    """A denoiser with fixed conditions; made by :meth:`AbstractDenoiser.given`.

    Arguments:
        model: The inner denoiser.
        **cond: Conditions by name; a condition that is given at a call replaces the fixed one.
    """

    per_sample = ("cond",)

    def __init__(self, model: AbstractDenoiser, /, **cond: Condition) -> None:
        super().__init__(model)
        self.cond = cond

    @property
    def conditions(self) -> dict[str, Condition]:
        return {**self.model.conditions, **self.cond}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={short(value)}" for name, value in self.cond.items())

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        return self.model.x0(x, t, **{**self.cond, **cond})

    def x0_and_variance(self, x: Tensor, t: float | Tensor, **cond: Condition) -> tuple[Tensor, Tensor]:
        return self.model.x0_and_variance(x, t, **{**self.cond, **cond})

    def predict(self, want: Want, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        return self.model.predict(want, x, t, **{**self.cond, **cond})

    def outputs_at(self, times: tuple[float, ...], x: Tensor, **cond: Condition) -> Outputs | None:
        if not self.keeps(Given):
            return None
        return self.model.outputs_at(times, x, **{**self.cond, **cond})


class _Counted(Wrapped):
    """The end of a chain of denoisers, with a counter of its evaluations."""

    def __init__(self, model: AbstractDenoiser, counter: Counter) -> None:
        super().__init__(model)
        self.counter = counter

    def __repr__(self) -> str:
        return repr(self.model)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)

    def _count(self, x: Tensor) -> AbstractDenoiser:
        """Count an evaluation; the denoiser that makes it, without the search of nn.Module for attributes."""
        self.counter.add(x.shape[0])
        return self._modules["model"]  # type: ignore[return-value]

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        return self._count(x).x0(x, t, **cond)

    def x0_and_variance(self, x: Tensor, t: float | Tensor, **cond: Condition) -> tuple[Tensor, Tensor]:
        return self._count(x).x0_and_variance(x, t, **cond)

    def eps(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        return self._count(x).eps(x, t, **cond)

    def score(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        return self._count(x).score(x, t, **cond)

    def v(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        return self._count(x).v(x, t, **cond)

    def velocity(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        return self._count(x).velocity(x, t, **cond)

    def predict(self, want: Want, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        return self._count(x).predict(want, x, t, **cond)

    def outputs_at(self, times: tuple[float, ...], x: Tensor, **cond: Condition) -> Outputs | None:
        inner = self.model.outputs_at(times, x, **cond)
        if inner is None:
            return None

        def evaluate(x: Tensor, n: int) -> Tensor:
            self.counter.add(x.shape[0])
            return inner.evaluate(x, n)

        return replace(inner, evaluate=evaluate)
