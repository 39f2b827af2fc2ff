"""Guidance by the difference of two predictions: with and without a condition, or of a better and a worse model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._printing import fields
from scoresde.denoisers.base import (
    AbstractDenoiser,
    Condition,
    Counter,
    Shared,
    Wrapped,
    check_conditions,
    check_model,
    same_process,
    select,
)
from scoresde.denoisers.modes import wrong_null
from scoresde.guidance.rules import Rule, fresh_rule, linear, rule_of_rows
from scoresde.guidance.scale import Scale, check_scale, scale_at
from scoresde.plan.folding import Outputs


class _Difference(Wrapped):
    """Base of guidance by a scale and a rule."""

    per_sample = ("scale",)

    def __init__(self, model: AbstractDenoiser, scale: Scale, interval: tuple[float, float] | None, rule: Rule) -> None:
        super().__init__(model)
        self.scale = check_scale(scale)
        self.interval = _check_interval(interval)
        self.rule = rule

    def row_attributes(self, index: Tensor) -> dict[str, object]:
        return {**super().row_attributes(index), "rule": rule_of_rows(self.rule, index)}

    def counted(self, counter: Counter) -> AbstractDenoiser:
        """This denoiser for a new run: `counter` counts its evaluations, and its rule starts afresh."""
        return self._twin(lambda inner: inner.counted(counter), {"rule": fresh_rule(self.rule)})

    def scale_at(self, t: float | Tensor, x: Tensor) -> float | Tensor:
        """Scale at time `t`, a number or (B, 1, …): 1 outside the interval."""
        scale = scale_at(self.scale, t, check.state("x", x))
        if self.interval is None:
            return scale
        low, high = self.interval
        if not isinstance(t, Tensor):
            return scale if low <= t <= high else 1.0
        inside = torch.as_tensor(check.expand((low <= t) & (t <= high), x))
        return torch.where(inside.bool(), scale, 1.0).to(x.dtype)


@checked
class ClassifierFree(_Difference):
    r"""Classifier-free guidance: extrapolation from the unconditional to the conditional prediction.

    .. math:: D = D(x, \varnothing) + s\,(D(x, c) - D(x, \varnothing)), \qquad
              \nabla\log p + s\,(\nabla\log p(\cdot \mid c) - \nabla\log p)

    With the default rule the result for s = 1 is exactly the conditional prediction, and for s = 0 the unconditional
    one. Each costs one evaluation if the scale is a number; otherwise guidance costs two. For s > 1 the guided score is
    not the score of a diffusion of :math:`p\,(p(\cdot\mid c)/p)^s`, so samples do not follow that density. Large scales
    make the flow stiff; a solver of order 2 on the data prediction, such as ``ss.DPMSolverPP(2)``, is then best.

    Arguments:
        model: Conditional denoiser; its conditions may be fixed already, as in ``model.given(label=y)``.
        scale: Scale s, a number, (B,), or a function of t that returns either.
        null: Null conditions by name, as in training. Each is a tree like the condition, and its leaves broadcast to
            one row or have one row for each sample; without `one_forward` any other value, such as None, is allowed.
            Conditions without a null value are the same in both evaluations.
        one_forward: Whether to evaluate the network once on a doubled batch; the result is the same up to rounding.
        interval: Times (low, high) between which guidance is on; outside, the result is the conditional prediction.
        rule: Rule, :func:`linear`, ``Rescale``, ``APG``, ``Momentum`` or ``ZeroStar``.

    References:
        | Classifier-Free Diffusion Guidance (Ho and Salimans, 2022), arXiv:2207.12598
        | Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models
          (Kynkäänniemi et al., 2024), arXiv:2404.07724

    Example:
        >>> import torch, scoresde as ss
        >>> net = lambda x, t, label: 0.1 * label[:, None] * x
        >>> model = ss.Denoiser(net, ss.VP(), predicts="eps")
        >>> guided = ss.ClassifierFree(model, 3.0, null={"label": 0.0})
        >>> ss.sample(guided.given(label=torch.ones(4)), (4, 2), steps=5, seed=0).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        model: AbstractDenoiser,
        scale: Scale,
        *,
        null: Mapping[str, Condition],
        one_forward: bool = False,
        interval: tuple[float, float] | None = None,
        rule: Rule = linear,
    ) -> None:
        super().__init__(model, scale, interval, rule)
        if not isinstance(null, Mapping) or not null:
            raise TypeError(f"`null` must be a dictionary of null conditions, such as {{'label': 10}}, got {null!r}.")
        self.null = dict(null)
        classes = wrong_null(model, self.null)
        if classes is not None:
            label = self.null["label"]
            raise ValueError(
                f"`null` has label = {label}; the index of no class is {classes}, the number of classes of the "
                f"network: null={{'label': {classes}}}. To guide away from a class, give a tensor, "
                f"null={{'label': torch.tensor([{label}])}}."
            )
        self.one_forward = one_forward
        self._samples: Tensor | None = None  # numbers of the rows among the samples that `null` was made for

    def extra_repr(self) -> str:
        rule = None if self.rule is linear else self.rule
        return fields(scale=self.scale, null=self.null, one_forward=self.one_forward, interval=self.interval, rule=rule)

    def row_attributes(self, index: Tensor) -> dict[str, object]:
        samples = index if self._samples is None else self._samples[index.to(self._samples.device)]
        return {**super().row_attributes(index), "_samples": samples}

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        check.state("x", x)
        known = {**self.model.conditions, **cond}
        check_conditions(known, len(x))
        self._check_names(known)
        scale = self.scale_at(t, x)
        if _is(scale, 1):
            return self.model.x0(x, t, **cond)
        null = {name: _null_of(name, known[name], value, len(x), self._samples) for name, value in self.null.items()}
        if _is(scale, 0) and self.rule is linear:
            return self.model.x0(x, t, **{**cond, **null})
        if self.one_forward:
            strong, weak = self._doubled(x, t, {name: known[name] for name in {**cond, **null}}, null)
        else:
            strong, weak = self.model.x0(x, t, **cond), self.model.x0(x, t, **{**cond, **null})
        return self.rule(self.model, x, t, strong, weak, scale)

    def x0_and_variance(self, x: Tensor, t: float | Tensor, **cond: Condition) -> tuple[Tensor, Tensor]:
        if _is(self.scale_at(t, x), 0):  # x0 then evaluates no condition
            return self.x0(x, t, **cond), self.model.x0_and_variance(x, t, **cond)[1]
        return super().x0_and_variance(x, t, **cond)

    def outputs_at(self, times: tuple[float, ...], x: Tensor, **cond: Condition) -> Outputs | None:
        """Plain guidance in two forward passes is linear in the guided output, with the coefficients of the network."""
        if self.rule is not linear or self.one_forward or not self.keeps(ClassifierFree):
            return None
        known = {**self.model.conditions, **cond}
        check_conditions(known, len(x))
        self._check_names(known)
        null = {name: _null_of(name, known[name], value, len(x), self._samples) for name, value in self.null.items()}
        strong, weak = self.model.outputs_at(times, x, **cond), self.model.outputs_at(times, x, **{**cond, **null})
        if strong is None or weak is None:
            return None
        scales = [self.scale_at(t, x) for t in times]

        def evaluate(x: Tensor, n: int) -> Tensor:
            scale = scales[n]
            if _is(scale, 1):
                return strong.evaluate(x, n)
            if _is(scale, 0):
                return weak.evaluate(x, n)
            first = strong.evaluate(x, n)
            return torch.lerp(weak.evaluate(x, n), first, scale)

        return Outputs(strong.p, strong.q, evaluate)

    def _doubled(
        self, x: Tensor, t: float | Tensor, cond: dict[str, Condition], null: dict[str, Condition]
    ) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional prediction from one evaluation of a doubled batch."""
        stacked = {name: _stack(name, value, null.get(name, value), len(x)) for name, value in cond.items()}
        index = torch.arange(len(x), device=x.device)
        times = torch.cat([t, t]) if isinstance(t, Tensor) and t.ndim else t
        out = self.model.rows(torch.cat([index, index])).x0(torch.cat([x, x]), times, **stacked)
        return out[: len(x)], out[len(x) :]

    def _check_names(self, cond: Mapping[str, Condition]) -> None:
        missing = sorted(set(self.null) - set(cond))
        for name in missing:
            for meant in difflib.get_close_matches(name, cond, n=1):
                raise ValueError(
                    f"`null` names {name}, which is not among the conditions given, {', '.join(sorted(cond))}; did you "
                    f"mean null={{{meant!r}: ...}}?"
                )
        if missing:
            raise ValueError(
                f"the condition {', '.join(missing)} is missing: guidance needs the condition and its null value; give "
                f"the condition by name, as in guided.given({missing[0]}=...)."
            )


@checked
class AutoGuidance(_Difference):
    r"""Guidance by a weaker version of the model: smaller, less trained, or otherwise degraded.

    .. math:: D = D_{weak} + s\,(D - D_{weak})

    Arguments:
        model: Denoiser.
        weak: Weaker denoiser on the same process; both are evaluated with all conditions.
        scale: Scale s, a number, (B,), or a function of t.
        interval: Times (low, high) between which guidance is on.
        rule: Rule that combines the two predictions.

    References:
        | Guiding a Diffusion Model with a Bad Version of Itself (Karras et al., 2024), arXiv:2406.02507
    """

    def __init__(
        self,
        model: AbstractDenoiser,
        weak: AbstractDenoiser,
        scale: Scale,
        *,
        interval: tuple[float, float] | None = None,
        rule: Rule = linear,
    ) -> None:
        super().__init__(model, scale, interval, rule)
        self.weak = check_model(weak, "weak")
        same_process(model, weak, "weak")

    def extra_repr(self) -> str:
        return fields(scale=self.scale, interval=self.interval, rule=None if self.rule is linear else self.rule)

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        scale = self.scale_at(t, x)
        if _is(scale, 1):
            return self.model.x0(x, t, **cond)
        return self.rule(self.model, x, t, self.model.x0(x, t, **cond), self.weak.x0(x, t, **cond), scale)


@checked
class Compose(Wrapped):
    r"""Product of experts: several conditions at once; a negative weight excludes a condition.

    .. math:: D = D_0 + \sum_i w_i\,(D_i - D_0), \qquad
              p \propto p_0 \prod_i \left(\frac{p_i}{p_0}\right)^{w_i} \text{ at } t = 0

    With one expert this is classifier-free guidance.

    Arguments:
        model: Base denoiser D₀, usually ``Given(model, **null)``.
        experts: Denoisers D_i on the same process, such as ``Given(model, label=3)``.
        weights: Weights w_i, one for each expert: a number, (B,), or a function of t.

    References:
        | Compositional Visual Generation with Composable Diffusion Models (Liu et al., 2022), arXiv:2206.01714
    """

    def __init__(self, model: AbstractDenoiser, experts: Sequence[AbstractDenoiser], weights: Sequence[Scale]) -> None:
        super().__init__(model)
        for i, expert in enumerate(experts):
            same_process(model, check_model(expert, f"experts[{i}]"), f"experts[{i}]")
        if len(weights) != len(experts):
            raise ValueError(f"`weights` must have one entry for each of {len(experts)} experts, got {len(weights)}.")
        self.experts = torch.nn.ModuleList(experts)
        self.weights = [check_scale(w, f"weights[{i}]") for i, w in enumerate(weights)]

    def extra_repr(self) -> str:
        return fields(weights=self.weights)

    @property
    def branch(self) -> AbstractDenoiser:
        """The first expert, which has a condition; the base denoiser without experts."""
        return next((e for e in self.experts if isinstance(e, AbstractDenoiser)), self.model)

    def row_attributes(self, index: Tensor) -> dict[str, object]:
        return {**super().row_attributes(index), "weights": [select(w, index) for w in self.weights]}

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        base = self.model.x0(x, t, **cond)
        out = base
        for i, (expert, weight) in enumerate(zip(self.experts, self.weights, strict=True)):
            assert isinstance(expert, AbstractDenoiser)
            out = out + scale_at(weight, t, x, f"weights[{i}]") * (expert.x0(x, t, **cond) - base)
        return out


def _check_interval(interval: object) -> tuple[float, float] | None:
    if interval is None:
        return None
    if not isinstance(interval, Sequence) or len(interval) != 2:
        raise ValueError(f"`interval` must be two times, (low, high), got {interval!r}.")
    low = check.number("interval[0]", interval[0], at_least=0)
    return low, check.number("interval[1]", interval[1], above=low)


def _is(scale: float | Tensor, value: float) -> bool:
    return not isinstance(scale, Tensor) and scale == value


def _null_of(name: str, cond: Condition, null: Condition, rows: int, samples: Tensor | None) -> Condition:
    """Null condition with the shape of the condition; `samples` selects from null values of all samples."""

    def leaf(c: Condition, n: Condition) -> Condition:
        if isinstance(c, Shared):
            return n if isinstance(n, Shared) else Shared(n)
        if not isinstance(c, Tensor) or c.ndim == 0 or not isinstance(n, Tensor | float | int):
            return n
        value = torch.as_tensor(n, dtype=c.dtype, device=c.device)
        if samples is not None and value.ndim == c.ndim:
            value = select(value, samples)
        try:
            return value.expand(rows, *c.shape[1:])
        except RuntimeError:
            raise ValueError(
                f"`null` of `{name}` has shape {tuple(value.shape)} and does not broadcast to the shape of the "
                f"condition, {(rows, *c.shape[1:])}."
            ) from None

    if isinstance(null, Tensor | float | int):
        return tree_map(lambda c: leaf(c, null), cond)
    if not isinstance(null, dict | list | tuple):
        return null
    try:
        return tree_map(leaf, cond, null)
    except (ValueError, TypeError) as error:
        if "does not broadcast" in str(error):
            raise
        raise ValueError(f"`null` of `{name}` must be a tree like the condition: {error}") from None


def _stack(name: str, cond: Condition, null: Condition, rows: int) -> Condition:
    """Concatenation of the condition and the null condition along the batch."""

    def leaf(c: Condition, n: Condition) -> Condition:
        if isinstance(c, Tensor) and c.ndim > 0 and isinstance(n, Tensor):
            return torch.cat([c.expand(rows, *c.shape[1:]), n.expand(rows, *n.shape[1:])])
        if c is n or (isinstance(c, Shared) and isinstance(n, Shared) and c.value is n.value):
            return c
        if not isinstance(c, Tensor | Shared) and not isinstance(n, Tensor | Shared) and c == n:
            return c
        raise ValueError(
            f"`one_forward` needs a tensor with one row for each sample as condition and as null value; `{name}` has "
            f"{type(c).__name__} and {type(n).__name__}; use one_forward=False."
        )

    try:
        return tree_map(leaf, cond, null)
    except ValueError as error:
        if "one_forward" in str(error):
            raise
        raise ValueError(f"`null` of `{name}` must be a tree like the condition: {error}") from None
