"""Guidance by the difference of two predictions: with and without a condition, of a better and a worse model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from scoresde import _checks as check
from scoresde.denoiser import AbstractDenoiser, _check_cond
from scoresde.guidance.base import Scale, Wrapped, check_model, check_scale, same_process, scale_at
from scoresde.guidance.rules import Rule, linear


class ClassifierFree(Wrapped):
    r"""Classifier-free guidance: from what the network says without the condition, through what it says with it.

    .. math:: D = D(x, \varnothing) + s\,(D(x, c) - D(x, \varnothing)), \qquad
              \nabla\log p + s\,(\nabla\log p(\cdot \mid c) - \nabla\log p)

    At s = 1 it is the conditional model and at s = 0 the unconditional one, bit for bit, in one evaluation where the
    scale is a number; otherwise it costs two. The marginals of the tilted score are not those of any diffusion of
    :math:`p\,(p(\cdot\mid c)/p)^s`: at s > 1 samples are a product of the guidance, not of a stated density. Large
    scales make the flow stiff; data prediction of order 2, such as ``ss.DPMSolverPP(2)``, bears them best.

    Arguments:
        model: The conditional denoiser.
        scale: s: a number, (B,), or a function of t that returns either.
        null: What stands for no condition, by name, as in training: each a tree like the condition's, whose leaves
            broadcast to a row of it, or anything at all (None too) with two forwards. Conditions that are not named
            are given both times.
        one_forward: Ask the network once on a doubled batch instead of twice; the same numbers to rounding.
        interval: (low, high) times between which there is guidance; outside, the conditional model alone.
        rule: How the two become one: :func:`~scoresde.guidance.rules.linear`, ``Rescale``, ``APG``, ``Momentum`` or
            ``ZeroStar``.

    References:
        | Classifier-Free Diffusion Guidance (Ho and Salimans, 2022), arXiv:2207.12598
        | Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models
          (Kynkäänniemi et al., 2024), arXiv:2404.07724

    Example:
        >>> import torch, scoresde as ss
        >>> net = lambda x, t, label: 0.1 * label[:, None] * x
        >>> model = ss.Denoiser(net, ss.VP(), predicts="eps")
        >>> guided = ss.ClassifierFree(model, 3.0, null={"label": 0.0})
        >>> ss.sample(guided, (4, 2), steps=5, seed=0, label=torch.ones(4)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        model: AbstractDenoiser,
        scale: Scale,
        *,
        null: Mapping[str, Any],
        one_forward: bool = False,
        interval: tuple[float, float] | None = None,
        rule: Rule = linear,
    ) -> None:
        super().__init__(model)
        if not isinstance(null, Mapping) or not null:
            raise TypeError(f"`null` must name what stands for no condition, as in null={{'label': 10}}, got {null!r}.")
        self.scale = check_scale(scale)
        self.null = dict(null)
        self.one_forward = one_forward
        self.interval = _check_interval(interval)
        self.rule = rule

    def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """The guided data prediction."""
        check.state("x", x)
        _check_cond(cond, len(x))
        missing = sorted(set(self.null) - set(cond))
        near = {name: difflib.get_close_matches(name, cond, n=1) for name in missing}
        if any(near.values()):
            name, (meant, *_) = next((name, found) for name, found in near.items() if found)
            raise ValueError(
                f"`null` names {name}, which is not among the conditions given, {', '.join(sorted(cond))}; did you "
                f"mean null={{{meant!r}: ...}}?"
            )
        if missing:
            raise ValueError(
                f"the condition {', '.join(missing)} is missing: guidance needs it beside its null value; give it by "
                f"name, as in ss.sample(model, shape, {missing[0]}=...)."
            )
        scale = _inside(self.interval, t, scale_at(self.scale, t, x), x)
        if _is(scale, 1):
            return self.model.x0(x, t, **cond)
        null = {name: _nothing(name, tree, self.null[name], len(x)) for name, tree in cond.items() if name in self.null}
        if _is(scale, 0) and self.rule is linear:
            return self.model.x0(x, t, **{**cond, **null})
        if self.one_forward:
            both = {name: _stack(name, tree, null.get(name, tree), len(x)) for name, tree in cond.items()}
            tt = torch.cat([t, t]) if isinstance(t, Tensor) and t.ndim else t
            strong, weak = self.model.x0(torch.cat([x, x]), tt, **both).chunk(2)
        else:
            strong, weak = self.model.x0(x, t, **cond), self.model.x0(x, t, **{**cond, **null})
        return self.rule(self.model, x, t, strong, weak, scale)


class AutoGuidance(Wrapped):
    r"""Guidance by a weaker version of the model itself: smaller, less trained, or otherwise degraded.

    .. math:: D = D_{weak} + s\,(D - D_{weak})

    Arguments:
        model: The denoiser.
        weak: The weaker one, on the same process; both get all conditions.
        scale: s: a number, (B,), or a function of t.
        interval: (low, high) times between which there is guidance.
        rule: How the two become one.

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
        super().__init__(model)
        self.weak = check_model(weak, "weak")
        same_process(model, weak, "weak")
        self.scale = check_scale(scale)
        self.interval = _check_interval(interval)
        self.rule = rule

    def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """The guided data prediction."""
        scale = _inside(self.interval, t, scale_at(self.scale, t, check.state("x", x)), x)
        if _is(scale, 1):
            return self.model.x0(x, t, **cond)
        return self.rule(self.model, x, t, self.model.x0(x, t, **cond), self.weak.x0(x, t, **cond), scale)


class Given(Wrapped):
    """A denoiser with some of its conditions fixed.

    Arguments:
        model: The denoiser.
        **cond: What it is told at every call; a condition given at the call goes before.
    """

    def __init__(self, model: AbstractDenoiser, **cond: Any) -> None:
        super().__init__(model)
        self.cond = cond

    def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """Data prediction under the fixed conditions."""
        return self.model.x0(x, t, **{**self.cond, **cond})


class Compose(Wrapped):
    r"""A product of experts: several conditions at once, and with negative weights what is not wanted.

    .. math:: D = D_0 + \sum_i w_i\,(D_i - D_0), \qquad
              p \propto p_0 \prod_i \left(\frac{p_i}{p_0}\right)^{w_i} \text{ at } t = 0

    One expert is classifier-free guidance.

    Arguments:
        model: What all conditions tilt, D₀: usually ``Given(model, **null)``.
        experts: D_i: denoisers on the same process, such as ``Given(model, label=3)``.
        weights: w_i, one for each: a number, (B,), or a function of t.

    References:
        | Compositional Visual Generation with Composable Diffusion Models (Liu et al., 2022), arXiv:2206.01714
    """

    def __init__(self, model: AbstractDenoiser, experts: Sequence[AbstractDenoiser], weights: Sequence[Scale]) -> None:
        super().__init__(model)
        for i, expert in enumerate(experts):
            same_process(model, check_model(expert, f"experts[{i}]"), f"experts[{i}]")
        if len(weights) != len(experts):
            raise ValueError(f"`weights` must be one for each of {len(experts)} experts, got {len(weights)}.")
        self.experts = torch.nn.ModuleList(experts)
        self.weights = [check_scale(w, f"weights[{i}]") for i, w in enumerate(weights)]

    def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """The composed data prediction."""
        base = self.model.x0(x, t, **cond)
        out = base
        for i, (expert, weight) in enumerate(zip(self.experts, self.weights, strict=True)):
            assert isinstance(expert, AbstractDenoiser)
            out = out + scale_at(weight, t, x, f"weights[{i}]") * (expert.x0(x, t, **cond) - base)
        return out


# Intervals and conditions.


def _check_interval(interval: Any) -> tuple[float, float] | None:
    if interval is None:
        return None
    if not isinstance(interval, Sequence) or len(interval) != 2:
        raise ValueError(f"`interval` must be two times, (low, high), got {interval!r}.")
    low = check.number("interval[0]", interval[0], least=0)
    return low, check.number("interval[1]", interval[1], above=low)


def _inside(interval: tuple[float, float] | None, t: Any, scale: Any, x: Tensor) -> Any:
    """The scale inside the interval, 1 outside."""
    if interval is None:
        return scale
    low, high = interval
    if not isinstance(t, Tensor):
        return scale if low <= t <= high else 1.0
    inside = torch.as_tensor(check.expand((low <= t) & (t <= high), x))
    return torch.where(inside.bool(), scale, 1.0).to(x.dtype)


def _is(scale: Any, value: float) -> bool:
    return not isinstance(scale, Tensor) and scale == value


def _nothing(name: str, cond: Any, null: Any, rows: int) -> Any:
    """The null condition in the shape of the condition."""

    def leaf(c: Any, n: Any) -> Any:
        if not isinstance(c, Tensor) or c.ndim == 0 or not isinstance(n, Tensor | float | int):
            return n
        value = torch.as_tensor(n, dtype=c.dtype, device=c.device)
        try:
            return value.expand(rows, *c.shape[1:])
        except RuntimeError:
            raise ValueError(
                f"`null` of `{name}` has shape {tuple(value.shape)} and does not broadcast to {(rows, *c.shape[1:])}, "
                f"the condition's."
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
        raise ValueError(f"`null` of `{name}` must be a tree like the condition's: {error}") from None


def _stack(name: str, cond: Any, null: Any, rows: int) -> Any:
    """Condition and null condition along the batch."""

    def leaf(c: Any, n: Any) -> Any:
        if isinstance(c, Tensor) and c.ndim > 0 and isinstance(n, Tensor):
            return torch.cat([c.expand(rows, *c.shape[1:]), n.expand(rows, *n.shape[1:])])
        if c is n or (not isinstance(c, Tensor) and not isinstance(n, Tensor) and c == n):
            return c
        raise ValueError(
            f"`one_forward` needs conditions with a row for each sample, and their null values too; `{name}` has "
            f"{type(c).__name__} and {type(n).__name__}: use one_forward=False."
        )

    try:
        return tree_map(leaf, cond, null)
    except ValueError as error:
        if "one_forward" in str(error):
            raise
        raise ValueError(f"`null` of `{name}` must be a tree like the condition's: {error}") from None
