"""Guidance by a gradient with respect to the noisy state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._printing import fields
from scoresde.denoisers.base import AbstractDenoiser, Condition, Wrapped, expand_conditions, select
from scoresde.denoisers.network import Denoiser
from scoresde.guidance.scale import Scale, check_scale, scale_at
from scoresde.processes.sde import SDE

_MIN_RATIO = 1e-3  # smallest α/σ at which a derivative with respect to x_t is computed


@checked
class ClassifierGuidance(Wrapped):
    r"""Guidance by the gradient of a log-likelihood with respect to the noisy state.

    .. math:: D = D(x) + s\,\frac{\sigma^2}{\alpha}\,\nabla_x \log p(c \mid x), \qquad
              \nabla\log p + s\,\nabla\log p(c \mid \cdot)

    The likelihood may be that of a classifier or any differentiable function. Its input is the noisy state and the time
    or, with ``sees="x0"``, the denoised state; the gradient then goes through the network. The gradient is always with
    respect to x, also under ``torch.no_grad``. Times where α/σ < 10⁻³ are replaced by the time where α/σ = 10⁻³,
    because σ²/α is infinite at α = 0.

    Arguments:
        model: Denoiser.
        log_prob: Function ``log_prob(x, t, **cond)``, or ``log_prob(x0, **cond)`` with ``sees="x0"``, to (B,). If it
            holds values of samples, it has a method ``rows(index)`` that returns the function of some samples.
        scale: Scale s, a number, (B,), or a function of t.
        sees: Input of `log_prob`, ``"x_t"`` or ``"x0"``.
        through_net: Whether the gradient with ``sees="x0"`` goes through the network. False uses ∂x0/∂x = 1/α, as if ε
            did not depend on x, and saves the backward pass and its memory.
        known: Names of the conditions that go to `log_prob` and not to the network.

    References:
        | Diffusion Models Beat GANs on Image Synthesis (Dhariwal and Nichol, 2021), arXiv:2105.05233
        | FreeDoM: Training-Free Energy-Guided Conditional Diffusion Model (Yu et al., 2023), arXiv:2303.09833
    """

    per_sample = ("scale",)

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
        self.scale = check_scale(scale)
        self.sees = check.choice("sees", sees, ("x_t", "x0"))
        self.through_net = through_net
        self.known = tuple(known)

    def extra_repr(self) -> str:
        return fields(scale=self.scale, log_prob=self.log_prob, sees=self.sees, known=self.known or None)

    def row_attributes(self, index: Tensor) -> dict[str, object]:
        own = super().row_attributes(index)
        return {**own, "log_prob": select(self.log_prob, index)} if hasattr(self.log_prob, "rows") else own

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        t = before_silence(self.sde, t)
        alpha, sigma = (check.expand(fn(t), x) for fn in (self.sde.alpha, self.sde.sigma))
        gain = scale_at(self.scale, t, check.state("x", x)) * sigma**2 / alpha
        missing = sorted(set(self.known) - set(cond))
        if missing:
            raise ValueError(f"the condition {', '.join(missing)} is missing: `known` lists it; give it by name.")
        known = expand_conditions({name: cond[name] for name in self.known}, len(x))
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


def before_silence(sde: SDE, t: float | Tensor) -> float | Tensor:
    """Time `t`, limited to the times where α/σ is at least 10⁻³."""
    if sde.alpha(sde.T) >= _MIN_RATIO * sde.sigma(sde.T):
        return t
    latest = sde.t_of_lam(math.log(_MIN_RATIO))
    return t.clamp_max(latest) if isinstance(t, Tensor) else min(t, latest)


def gradient(fn: Callable[[Tensor], Tensor], x: Tensor, owner: torch.nn.Module) -> Tensor:
    """Gradient of the value of each row with respect to that row, (B, *event), also under ``torch.no_grad``."""
    differentiable = _recorded(x, owner)
    with _enabled():
        leaf = x if differentiable and x.requires_grad else _leaf(x)
        if leaf is None:
            return torch.func.grad(lambda y: fn(y).sum())(x)  # type: ignore[no-any-return]
        values = fn(leaf)
        if not values.requires_grad:
            raise _no_gradient("`log_prob`")
        slope = torch.autograd.grad(values.sum(), leaf, create_graph=differentiable, allow_unused=True)[0]
        if slope is None:
            raise _no_gradient("`log_prob`")
    return slope if differentiable else slope.detach()


class Graph:
    """One evaluation of a denoiser, differentiable with respect to the state.

    Arguments:
        model: Denoiser.
        x: State, (B, *event).
        t: Time.
        cond: Conditions.
    """

    def __init__(self, model: AbstractDenoiser, x: Tensor, t: float | Tensor, cond: Mapping[str, Condition]) -> None:
        self._differentiable = _recorded(x, model)
        self._vjp: Callable[[Tensor], tuple[Tensor]] | None = None
        with _enabled():
            leaf = x if self._differentiable and x.requires_grad else _leaf(x)
            if leaf is None:
                self._differentiable = True  # by the transform
                value, *pull = torch.func.vjp(lambda y: model.x0(y, t, **cond), x)
                self.x0, self._vjp = value, pull[0]
                return
            self._leaf = leaf
            with _require_gradients(model):
                self.x0 = model.x0(self._leaf, t, **cond)
        if not self.x0.requires_grad:
            raise _no_gradient("the network")

    def pull(self, v: Tensor) -> Tensor:
        """Product (∂x0/∂x)ᵀ v of each row, by one backward pass."""
        if self._vjp is not None:
            product: Tensor = self._vjp(v)[0]
            return product
        with _enabled():
            out = torch.autograd.grad(
                self.x0, self._leaf, v, retain_graph=True, create_graph=self._differentiable, allow_unused=True
            )[0]
        if out is None:
            raise _no_gradient("the network")
        return out if self._differentiable else out.detach()

    def release(self, result: Tensor) -> Tensor:
        """The result, detached unless autograd is recording."""
        return result if self._differentiable else result.detach()


def _leaf(x: Tensor) -> Tensor | None:
    """A leaf of a new graph with the values of `x`; None inside a function that torch.func transforms, such as jvp.

    There torch allows no leaf, and one would lose the tangents of `x`; torch.func's own derivatives keep them.
    """
    try:
        return x.detach().requires_grad_()
    except RuntimeError as error:
        if "being transformed" not in str(error):
            raise
        return None


@contextmanager
def _require_gradients(model: AbstractDenoiser) -> Iterator[None]:
    """Raise an error if a network's output has no gradient, which the term in x of the data prediction would hide."""

    def check_output(net: torch.nn.Module, args: object, out: object) -> None:
        if isinstance(out, Tensor) and not out.requires_grad:
            raise _no_gradient("the network")

    nets = {d.net for d in model.modules() if isinstance(d, Denoiser) and isinstance(d.net, torch.nn.Module)}
    handles = [net.register_forward_hook(check_output) for net in nets]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _recorded(x: Tensor, owner: torch.nn.Module) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in owner.parameters()))


def _enabled() -> torch.enable_grad:
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "this guidance computes a gradient, which torch.inference_mode() forbids; use torch.no_grad() instead, or "
            "no context, because `sample` records no graph."
        )
    return torch.enable_grad()


def _no_gradient(what: str) -> ValueError:
    return ValueError(
        f"{what} has no gradient with respect to the state: for autograd its output does not depend on its input. "
        f"Remove torch.no_grad() or detach() from it, or use `through_net`=False where a method has this argument."
    )
