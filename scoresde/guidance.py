r"""Guidance: denoisers made from denoisers.

A score that is tilted towards a condition, :math:`\nabla\log p(x) + s\,(\nabla\log p(x \mid c) - \nabla\log p(x))`,
is one of data predictions with the same weights, because the score is an affine function of the data prediction. So
every rule here answers ``x0`` and works under every solver, plan and backend unchanged. Knows no solver.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from scoresde import _checks as check
from scoresde.denoiser import PREDICTIONS, AbstractDenoiser, Denoiser, _check_cond
from scoresde.grids import check_grid
from scoresde.sde import SDE

Scale = float | Tensor | Callable[[Any], Any]
Rule = Callable[[AbstractDenoiser, Tensor, Any, Tensor, Tensor, Any], Tensor]

_FAINT = 1e-3  # least α/σ at which a derivative with respect to x_t is asked for


def _scale(scale: Scale, t: Any, x: Tensor, name: str = "scale") -> Any:
    """A number, or a tensor that multiplies the state."""
    value = scale(t) if callable(scale) else scale
    if not isinstance(value, Tensor):
        return check.number(name, value)
    if value.ndim > 1:
        raise ValueError(f"`{name}` must be a number or of shape (B,), got shape {tuple(value.shape)}.")
    return check.expand(value, x, name)


def _check_scale(scale: Any, name: str = "scale") -> Scale:
    if not isinstance(scale, Tensor) and not callable(scale):
        check.number(name, scale)
    return scale  # type: ignore[no-any-return]


def _check_model(model: Any, name: str = "model") -> AbstractDenoiser:
    if not isinstance(model, AbstractDenoiser):
        raise TypeError(f"`{name}` must be a denoiser, Denoiser(net, sde, predicts=...), got {type(model).__name__}.")
    return model


def _same_process(model: AbstractDenoiser, other: AbstractDenoiser, name: str) -> None:
    if repr(model.sde) != repr(other.sde):
        raise ValueError(
            f"`{name}` is on {other.sde!r} and the model on {model.sde!r}; ss.Rescheduled({name}, model.sde) puts it "
            f"on the same process."
        )


class _Wrapped(AbstractDenoiser):
    """A denoiser made from one other."""

    def __init__(self, model: AbstractDenoiser) -> None:
        super().__init__()
        self.model = _check_model(model)
        self.sde = model.sde


# How a strong and a weak prediction become one.


def linear(model: AbstractDenoiser, x: Tensor, t: Any, strong: Tensor, weak: Tensor, scale: Any) -> Tensor:
    r"""The plain rule, :math:`D = D_w + s\,(D_s - D_w)`; exact to the bit at s = 0 and s = 1.

    Arguments:
        model: The denoiser, for its process.
        x: State, (B, *event).
        t: Time.
        strong: Prediction to go towards, (B, *event).
        weak: Prediction to go away from, (B, *event).
        scale: s, a number or (B, 1, ...).
    """
    return torch.lerp(weak, strong, scale)


@dataclass(frozen=True)
class Rescale:
    r"""Guidance whose output keeps the standard deviation of the conditional prediction, per sample.

    .. math:: D = \varphi\, \frac{\mathrm{std}(D_s)}{\mathrm{std}(D_g)} D_g + (1 - \varphi)\, D_g, \qquad
              D_g = D_w + s\,(D_s - D_w)

    Arguments:
        phi: How much; 0 is plain guidance.
        of: The prediction that is rescaled: the data by default, or what the network predicts, as is usual elsewhere.

    References:
        | Common Diffusion Noise Schedules and Sample Steps are Flawed (Lin et al., 2024), arXiv:2305.08891, section 3.4
    """

    phi: float = 0.7
    of: str = "x0"

    def __post_init__(self) -> None:
        check.number("phi", self.phi, least=0, most=1)
        check.choice("of", self.of, PREDICTIONS)

    def __call__(self, model: AbstractDenoiser, x: Tensor, t: Any, strong: Tensor, weak: Tensor, scale: Any) -> Tensor:
        """The guided data prediction."""
        guided = model._convert("x0", torch.lerp(weak, strong, scale), self.of, x, t)
        target = model._convert("x0", strong, self.of, x, t)
        ratio = _rows_std(target) / _rows_std(guided).clamp_min(torch.finfo(x.dtype).tiny)
        return model._convert(self.of, guided * (1 + self.phi * (ratio - 1)), "x0", x, t)


@dataclass(frozen=True)
class APG:
    r"""Adaptive projected guidance: the part of the difference along the prediction, which saturates, is turned down.

    .. math:: D = D_s + (s - 1)\,(\Delta_\perp + \eta\,\Delta_\parallel), \qquad
              \Delta = (D_s - D_w)\,\min\!\left(1, \frac{r}{\lVert D_s - D_w\rVert}\right)

    with Δ∥ along the strong prediction, per sample. η = 1 and r = ∞ is plain guidance. The paper's reverse momentum
    remembers the calls of one particular solver, so that it is no function of (x, t); it is not here.

    Arguments:
        eta: How much of the parallel part is kept.
        norm: r, the largest norm of the difference.

    References:
        | Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models (Sadat et al., 2025),
          arXiv:2410.02416
    """

    eta: float = 0.0
    norm: float = math.inf

    def __post_init__(self) -> None:
        check.number("eta", self.eta)
        if self.norm != math.inf:
            check.number("norm", self.norm, above=0)

    def __call__(self, model: AbstractDenoiser, x: Tensor, t: Any, strong: Tensor, weak: Tensor, scale: Any) -> Tensor:
        """The guided data prediction."""
        tiny = torch.finfo(x.dtype).tiny
        delta = strong - weak
        if self.norm < math.inf:
            delta = delta * (self.norm / _rows_dot(delta, delta).sqrt().clamp_min(tiny)).clamp_max(1)
        along = _rows_dot(delta, strong) / _rows_dot(strong, strong).clamp_min(tiny) * strong
        push: Tensor = (scale - 1) * (delta + (self.eta - 1) * along)
        return strong + push


@dataclass(frozen=True)
class ZeroStar:
    r"""CFG-Zero*: the weak velocity is first fitted to the strong one, per sample.

    .. math:: v = s\,v_s + (1 - s)\,\gamma\,v_w, \qquad \gamma = \frac{\langle v_s, v_w\rangle}{\lVert v_w\rVert^2}

    Made for flow matching, where early velocities are the least certain: above `zero_above` the velocity is zero.

    Arguments:
        zero_above: Time above which a state stands still, where there is guidance; None for nowhere.

    References:
        | CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models (Fan et al., 2025), arXiv:2503.18886
    """

    zero_above: float | None = None

    def __post_init__(self) -> None:
        if self.zero_above is not None:
            check.number("zero_above", self.zero_above, least=0)

    def __call__(self, model: AbstractDenoiser, x: Tensor, t: Any, strong: Tensor, weak: Tensor, scale: Any) -> Tensor:
        """The guided data prediction."""
        v_s, v_w = (model._convert("x0", d, "velocity", x, t) for d in (strong, weak))
        gamma = _rows_dot(v_s, v_w) / _rows_dot(v_w, v_w).clamp_min(torch.finfo(x.dtype).tiny)
        v = torch.lerp(gamma * v_w, v_s, scale)
        if self.zero_above is not None:
            v = v * check.expand(torch.as_tensor(t <= self.zero_above, dtype=x.dtype, device=x.device), x)
        return model._convert("velocity", v, "x0", x, t)


def plus_plus(sde: SDE, grid: Tensor | Sequence[float], scale: float) -> Callable[[Any], Any]:
    r"""The scale, as a function of t, with which :class:`ClassifierFree` under DDIM on this grid is CFG++.

    CFG++ denoises with guidance and renoises with the unconditional ε:
    :math:`x_s = \alpha_s D_\lambda + \sigma_s (x_t - \alpha_t D_w)/\sigma_t` with :math:`D_\lambda = D_w +
    \lambda (D_s - D_w)`. It changes the update, not the denoiser. But collecting the differences gives DDIM's update
    with the scale

    .. math:: s = \frac{\lambda}{1 - e^{\lambda_t - \lambda_s}}, \qquad \lambda_t = \log(\alpha_t/\sigma_t)

    for the leg t → s. It grows without bound as legs get short: CFG++ belongs to a grid and has no continuous limit.
    Times between the grid's, as stages have, take the scale of their leg.

    Arguments:
        sde: The process.
        grid: A grid that goes down.
        scale: CFG++'s λ, in [0, 1] in the paper.

    References:
        | CFG++: Manifold-constrained Classifier Free Guidance for Diffusion Models (Chung et al., 2025),
          arXiv:2406.08070, algorithm 2
    """
    times = check_grid(sde, grid)
    check.number("scale", scale)
    lam = sde.lam(times)
    scales = scale / -torch.expm1(lam[:-1] - lam[1:])
    starts = times[:-1].flip(0).contiguous()
    by_start = scales.flip(0)

    def of_t(t: Any) -> Any:
        at = torch.as_tensor(t, dtype=torch.float64, device="cpu") * (1 - 1e-9)
        leg = torch.searchsorted(starts, at).clamp_max(len(starts) - 1)
        return by_start[leg].to(t.device) if isinstance(t, Tensor) else float(by_start[leg])

    return of_t


def _rows_dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each row, (B, 1, ...)."""
    return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))


def _rows_std(a: Tensor) -> Tensor:
    return a.flatten(1).std(1).reshape(-1, *[1] * (a.ndim - 1))


# Guidance by a difference of two predictions.


class ClassifierFree(_Wrapped):
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
        rule: How the two become one: :func:`linear`, :class:`Rescale`, :class:`APG` or :class:`ZeroStar`.

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
        self.scale = _check_scale(scale)
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
        scale = _inside(self.interval, t, _scale(self.scale, t, x), x)
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


class AutoGuidance(_Wrapped):
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
        self.weak = _check_model(weak, "weak")
        _same_process(model, weak, "weak")
        self.scale = _check_scale(scale)
        self.interval = _check_interval(interval)
        self.rule = rule

    def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """The guided data prediction."""
        scale = _inside(self.interval, t, _scale(self.scale, t, check.state("x", x)), x)
        if _is(scale, 1):
            return self.model.x0(x, t, **cond)
        return self.rule(self.model, x, t, self.model.x0(x, t, **cond), self.weak.x0(x, t, **cond), scale)


class Given(_Wrapped):
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


class Compose(_Wrapped):
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
            _same_process(model, _check_model(expert, f"experts[{i}]"), f"experts[{i}]")
        if len(weights) != len(experts):
            raise ValueError(f"`weights` must be one for each of {len(experts)} experts, got {len(weights)}.")
        self.experts = torch.nn.ModuleList(experts)
        self.weights = [_check_scale(w, f"weights[{i}]") for i, w in enumerate(weights)]

    def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """The composed data prediction."""
        base = self.model.x0(x, t, **cond)
        out = base
        for i, (expert, weight) in enumerate(zip(self.experts, self.weights, strict=True)):
            assert isinstance(expert, AbstractDenoiser)
            out = out + _scale(weight, t, x, f"weights[{i}]") * (expert.x0(x, t, **cond) - base)
        return out


# Guidance by a gradient.


class ClassifierGuidance(_Wrapped):
    r"""Guidance by the gradient of a log-likelihood with respect to the noisy state.

    .. math:: D = D(x) + s\,\frac{\sigma^2}{\alpha}\,\nabla_x \log p(c \mid x), \qquad
              \nabla\log p + s\,\nabla\log p(c \mid \cdot)

    The classifier sees the noisy state and its time, for which it was trained; or, with ``sees="x0"``, the denoised
    state, where the gradient goes through the network. It is with respect to x in any case, under ``torch.no_grad``
    too. The loss need not be a classifier's: any function with a gradient guides. Where α/σ < 10⁻³ the question is
    asked at the time where it is 10⁻³, since at α = 0 the two factors are infinite and zero.

    Arguments:
        model: The denoiser.
        log_prob: ``log_prob(x, t, **cond)``, or ``log_prob(x0, **cond)`` with ``sees="x0"``, to (B,).
        scale: s: a number, (B,), or a function of t.
        sees: ``"x_t"`` or ``"x0"``.
        through_net: With ``sees="x0"``: False takes ∂x0/∂x = 1/α, as if ε did not depend on x, and spares the backward
            pass and its memory.
        known: Names of conditions that `log_prob` gets and the network does not.

    References:
        | Diffusion Models Beat GANs on Image Synthesis (Dhariwal and Nichol, 2021), arXiv:2105.05233
        | FreeDoM: Training-Free Energy-Guided Conditional Diffusion Model (Yu et al., 2023), arXiv:2303.09833
    """

    def __init__(
        self,
        model: AbstractDenoiser,
        log_prob: Callable[..., Tensor],
        scale: Scale = 1.0,
        *,
        sees: str = "x_t",
        through_net: bool = True,
        known: Sequence[str] = (),
    ) -> None:
        super().__init__(model)
        if not callable(log_prob):
            raise TypeError(f"`log_prob` must be a function of states to (B,), got {type(log_prob).__name__}.")
        self.log_prob = log_prob
        self.scale = _check_scale(scale)
        self.sees = check.choice("sees", sees, ("x_t", "x0"))
        self.through_net = through_net
        self.known = tuple(known)

    def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """The guided data prediction."""
        t = before_silence(self.sde, t)
        alpha, sigma = (check.expand(fn(t), x) for fn in (self.sde.alpha, self.sde.sigma))
        gain: Any = _scale(self.scale, t, check.state("x", x)) * sigma**2 / alpha
        missing = sorted(set(self.known) - set(cond))
        if missing:
            raise ValueError(f"the condition {', '.join(missing)} is missing: `log_prob` is to know it.")
        known = {name: cond[name] for name in self.known}
        rest = {name: tree for name, tree in cond.items() if name not in self.known}
        if self.sees == "x_t":
            slope = gradient(lambda leaf: self._values(leaf, self.log_prob(leaf, t, **known)), x, self)
            push: Tensor = gain * slope
            return self.model.x0(x, t, **rest) + push
        if not self.through_net:
            x0 = self.model.x0(x, t, **rest)
            slope = gradient(lambda leaf: self._values(leaf, self.log_prob(leaf, **known)), x0, self)
            push = gain / alpha * slope
            return x0 + push
        graph = Graph(self.model, x, t, rest)
        slope = graph.pull(gradient(lambda leaf: self._values(leaf, self.log_prob(leaf, **known)), graph.x0, self))
        return graph.release(graph.x0 + gain * slope)

    def _values(self, x: Tensor, values: Tensor) -> Tensor:
        if not isinstance(values, Tensor) or values.shape != (len(x),):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"`log_prob` must return one number for each row, ({len(x)},), got {got}.")
        return values


def before_silence(sde: SDE, t: Any) -> Any:
    """The time, or where α/σ is less than 10⁻³, the one where it is that."""
    if sde.alpha(sde.T) >= _FAINT * sde.sigma(sde.T):
        return t
    latest = sde.t_of_lam(math.log(_FAINT))
    return t.clamp_max(latest) if isinstance(t, Tensor) else min(t, latest)


def gradient(fn: Callable[[Tensor], Tensor], x: Tensor, owner: torch.nn.Module) -> Tensor:
    """Gradient of each row's value with respect to that row, whatever the grad mode; (B, *event)."""
    differentiable = _recorded(x, owner)
    with _enabled():
        leaf = x if differentiable and x.requires_grad else x.detach().requires_grad_()
        values = fn(leaf)
        if not values.requires_grad:
            raise _no_gradient("`log_prob`")
        slope = torch.autograd.grad(values.sum(), leaf, create_graph=differentiable, allow_unused=True)[0]
        if slope is None:
            raise _no_gradient("`log_prob`")
    return slope if differentiable else slope.detach()


class Graph:
    """One evaluation of a denoiser that remembers how its output depends on the state.

    Arguments:
        model: The denoiser.
        x: State, (B, *event).
        t: Time.
        cond: Conditions.
    """

    def __init__(self, model: AbstractDenoiser, x: Tensor, t: Any, cond: Mapping[str, Any]) -> None:
        self._differentiable = _recorded(x, model)
        with _enabled():
            self._leaf = x if self._differentiable and x.requires_grad else x.detach().requires_grad_()
            with _listening(model):
                self.x0 = model.x0(self._leaf, t, **cond)
        if not self.x0.requires_grad:
            raise _no_gradient("the network")

    def pull(self, v: Tensor) -> Tensor:
        """(∂x0/∂x)ᵀ v of each row: one backward pass."""
        with _enabled():
            out = torch.autograd.grad(
                self.x0, self._leaf, v, retain_graph=True, create_graph=self._differentiable, allow_unused=True
            )[0]
        if out is None:
            raise _no_gradient("the network")
        return out if self._differentiable else out.detach()

    def release(self, result: Tensor) -> Tensor:
        """The result, with a graph only if the caller records one."""
        return result if self._differentiable else result.detach()


@contextmanager
def _listening(model: AbstractDenoiser) -> Iterator[None]:
    """Refuse networks whose output has no gradient: beside x in the data prediction its absence would not be seen."""

    def heard(net: torch.nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor) and not out.requires_grad:
            raise _no_gradient("the network")

    nets = {d.net for d in model.modules() if isinstance(d, Denoiser) and isinstance(d.net, torch.nn.Module)}
    handles = [net.register_forward_hook(heard) for net in nets]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _recorded(x: Tensor, owner: torch.nn.Module) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in owner.parameters()))


def _enabled() -> Any:
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "this guidance differentiates through the network, which torch.inference_mode() forbids; use "
            "torch.no_grad(), or nothing: `sample` records no graph of its own."
        )
    return torch.enable_grad()


def _no_gradient(what: str) -> ValueError:
    return ValueError(
        f"{what} has no gradient with respect to the state: for autograd its output does not depend on its input. Is "
        f"it wrapped in torch.no_grad(), or does it detach? `through_net`=False, where a method has it, needs none."
    )


# Limits on the data prediction.


class Clamp(_Wrapped):
    r"""Data known to lie in an interval: :math:`D = \mathrm{clip}(D, low, high)`.

    Arguments:
        model: The denoiser.
        low: Least value.
        high: Largest value.
    """

    def __init__(self, model: AbstractDenoiser, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__(model)
        self.low = check.number("low", low)
        self.high = check.number("high", high, above=self.low)

    def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """The clipped data prediction."""
        return self.model.x0(x, t, **cond).clamp(self.low, self.high)


class DynamicThreshold(_Wrapped):
    r"""Dynamic thresholding: each sample is clipped at its own quantile and scaled back to the range of data.

    .. math:: D = \frac{m}{s}\,\mathrm{clip}(D, -s, s), \qquad s = \max(m, \mathrm{quantile}_q |D|)

    Per sample, over all numbers of its event. It is for pixels; latents have no range.

    Arguments:
        model: The denoiser.
        quantile: q.
        limit: m, the largest absolute value of data.

    References:
        | Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding (Saharia et al., 2022),
          arXiv:2205.11487, section 2.3
    """

    def __init__(self, model: AbstractDenoiser, quantile: float = 0.995, limit: float = 1.0) -> None:
        super().__init__(model)
        self.quantile = check.number("quantile", quantile, above=0, most=1)
        self.limit = check.number("limit", limit, above=0)

    def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """The thresholded data prediction."""
        x0 = self.model.x0(x, t, **cond)
        flat = x0.flatten(1)
        rank = self.quantile * (flat.shape[1] - 1)
        low = math.floor(rank)
        # By the largest values alone: torch.quantile sorts everything, and refuses more than 2²⁴ numbers.
        top = flat.abs().topk(flat.shape[1] - low, dim=1).values
        s = torch.lerp(top[:, -1], top[:, -2], rank - low) if top.shape[1] > 1 else top[:, -1]
        s = s.clamp_min(self.limit)[:, None]
        return (torch.maximum(torch.minimum(flat, s), -s) * (self.limit / s)).reshape(x0.shape)


# Scales, intervals and conditions.


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
