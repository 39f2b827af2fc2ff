"""Rules that combine a strong and a weak data prediction D_s and D_w into a guided one.

A rule is one function of the denoiser, the state, its time, both predictions and the scale. A rule that holds values of
samples, such as a running sum, also has a method ``rows(index)`` that returns the rule of some samples. A rule that
changes from evaluation to evaluation has a method ``fresh()`` that returns the rule for a new run.

    >>> import torch, scoresde as ss
    >>> def limited(model, x, t, strong, weak, scale):
    ...     return strong + ((scale - 1) * (strong - weak)).clamp(-1, 1)
    >>> net = lambda x, t, label: label[:, None] * x
    >>> model = ss.Denoiser(net, ss.VP(), predicts="x0").given(label=torch.tensor([5.0, 0.2]))
    >>> ss.ClassifierFree(model, 3.0, null={"label": 0.0}, rule=limited).x0(torch.ones(2, 1), 0.5)
    tensor([[6.0000],
            [0.6000]])
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._printing import short
from scoresde.denoisers.base import AbstractDenoiser, select
from scoresde.denoisers.predictions import PREDICTIONS
from scoresde.grids.grid import check_grid
from scoresde.processes.sde import SDE

Value = float | Tensor  # a time or a scale: a number, (), or one entry for each sample

Rule = Callable[[AbstractDenoiser, Tensor, Value, Tensor, Tensor, Value], Tensor]


def rule_of_rows(rule: Rule, index: Tensor) -> Rule:
    """The rule of some samples: ``rule.rows(index)`` where this method exists, otherwise `rule` itself.

    Arguments:
        rule: Rule of all samples.
        index: Numbers of the samples, an integer tensor (b,).
    """
    rows: Callable[[Tensor], Rule] | None = getattr(rule, "rows", None)
    return rule if rows is None else rows(index)


def fresh_rule(rule: Rule) -> Rule:
    """The rule for a new run: ``rule.fresh()`` where this method exists, otherwise `rule` itself.

    Arguments:
        rule: Rule of any run.
    """
    fresh: Callable[[], Rule] | None = getattr(rule, "fresh", None)
    return rule if fresh is None else fresh()


def linear(model: AbstractDenoiser, x: Tensor, t: Value, strong: Tensor, weak: Tensor, scale: Value) -> Tensor:
    r"""Plain guidance, :math:`D = D_w + s\,(D_s - D_w)`; bitwise equal to D_w at s = 0 and to D_s at s = 1.

    Arguments:
        model: Denoiser, which gives the process.
        x: State, (B, *event).
        t: Time.
        strong: Strong prediction D_s, (B, *event).
        weak: Weak prediction D_w, (B, *event).
        scale: Scale s, a number or (B, 1, ...).
    """
    return torch.lerp(weak, strong, scale)


@checked
@dataclass(frozen=True)
class Rescale:
    r"""Guidance rescaled towards the standard deviation of the strong prediction, per sample.

    .. math:: D = \varphi\, \frac{\mathrm{std}(D_s)}{\mathrm{std}(D_g)} D_g + (1 - \varphi)\, D_g, \qquad
              D_g = D_w + s\,(D_s - D_w)

    Arguments:
        phi: Weight φ of the rescaled prediction, in [0, 1]; 0 is plain guidance.
        of: Prediction to rescale, ``"x0"`` by default; other libraries often rescale the output of the network.

    References:
        | Common Diffusion Noise Schedules and Sample Steps are Flawed (Lin et al., 2024), arXiv:2305.08891, section 3.4
    """

    phi: float = 0.7
    of: str = "x0"

    def __post_init__(self) -> None:
        check.number("phi", self.phi, at_least=0, at_most=1)
        check.choice("of", self.of, PREDICTIONS)

    def __call__(
        self, model: AbstractDenoiser, x: Tensor, t: Value, strong: Tensor, weak: Tensor, scale: Value
    ) -> Tensor:
        guided = model.convert("x0", torch.lerp(weak, strong, scale), self.of, x, t)
        target = model.convert("x0", strong, self.of, x, t)
        ratio = _rows_std(target) / _rows_std(guided).clamp_min(torch.finfo(x.dtype).tiny)
        return model.convert(self.of, guided * (1 + self.phi * (ratio - 1)), "x0", x, t)


@checked
@dataclass(frozen=True)
class APG:
    r"""Adaptive projected guidance: it reduces the difference parallel to the prediction, which causes saturation.

    .. math:: D = D_s + (s - 1)\,(\Delta_\perp + \eta\,\Delta_\parallel), \qquad
              \Delta = (D_s - D_w)\,\min\!\left(1, \frac{r}{\lVert D_s - D_w\rVert}\right)

    with Δ∥ along the strong prediction, per sample. η = 1 and r = ∞ is plain guidance. The paper's momentum is
    ``Momentum(APG(...))``.

    Arguments:
        eta: Factor η of the parallel part.
        norm: Largest norm r of the difference.

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

    def __call__(
        self, model: AbstractDenoiser, x: Tensor, t: Value, strong: Tensor, weak: Tensor, scale: Value
    ) -> Tensor:
        tiny = torch.finfo(x.dtype).tiny
        delta = strong - weak
        if self.norm < math.inf:
            delta = delta * (self.norm / _rows_dot(delta, delta).sqrt().clamp_min(tiny)).clamp_max(1)
        along = _rows_dot(delta, strong) / _rows_dot(strong, strong).clamp_min(tiny) * strong
        push: Tensor = (scale - 1) * (delta + (self.eta - 1) * along)
        return strong + push


@checked
class Momentum:
    r"""Guidance with momentum: a running sum of the differences of the predictions, as in adaptive projected guidance.

    .. math:: \bar\Delta_n = D_s - D_w + \beta\,\bar\Delta_{n-1}, \qquad
              D = \mathrm{rule}(D_s,\, D_s - \bar\Delta_n,\, s)

    The sum belongs to the run: ``ss.solve`` and all other runs start with one of their own, so runs at the same time or
    in several threads may share the object. If you call the guided denoiser yourself, use one object for each loop. The
    sum restarts whenever the time does not decrease: at the start of a run and after noise is added. Every evaluation
    updates it, also within a step; the paper has one evaluation per step, as ``ss.DDIM()`` and multistep solvers have.
    One time per sample raises an error.

    Arguments:
        rule: Rule that uses the running sum as the difference, usually :class:`APG`.
        beta: Factor β in (−1, 1); the paper uses −0.75 to −0.5, which reduces the previous direction.

    References:
        | Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models (Sadat et al., 2025),
          arXiv:2410.02416, algorithm 1
    """

    def __init__(self, rule: Rule = APG(), beta: float = -0.5) -> None:  # frozen
        if not callable(rule):
            raise TypeError(f"`rule` must be a rule such as APG(), got {type(rule).__name__}.")
        self.rule = rule
        self.beta = check.number("beta", beta, above=-1, below=1)
        self._last: tuple[float, Tensor, int] | None = None  # time, sum, thread

    def __repr__(self) -> str:
        return f"Momentum({short(self.rule)}, {self.beta:g})"

    def rows(self, index: Tensor) -> Momentum:
        """This rule with the running sums of some samples.

        Arguments:
            index: Numbers of the samples, an integer tensor (b,).
        """
        twin = Momentum(rule_of_rows(self.rule, index), self.beta)
        if self._last is not None:
            twin._last = self._last[0], select(self._last[1], index), self._last[2]
        return twin

    def fresh(self) -> Momentum:
        """This rule for a new run, without a sum."""
        return Momentum(fresh_rule(self.rule), self.beta)

    def __call__(
        self, model: AbstractDenoiser, x: Tensor, t: Value, strong: Tensor, weak: Tensor, scale: Value
    ) -> Tensor:
        if isinstance(t, Tensor) and t.ndim:
            raise TypeError("`t` must be one time for all samples, because Momentum sums over successive times.")
        if strong.requires_grad:
            raise RuntimeError(
                "Momentum changes with every evaluation, so its gradient would be wrong; sample without a gradient, or "
                "use the rule without Momentum."
            )
        delta = strong - weak
        thread = threading.get_ident()
        if self._last is not None and float(t) < self._last[0] and self._last[1].shape == delta.shape:
            if self._last[2] != thread:
                raise RuntimeError(
                    "two threads call one Momentum, whose running sum would mix their samples; run them by `solve`, or "
                    "give each thread its own Momentum."
                )
            delta = delta + self.beta * self._last[1]
        self._last = float(t), delta, thread
        return self.rule(model, x, t, strong, strong - delta, scale)


@checked
@dataclass(frozen=True)
class ZeroStar:
    r"""CFG-Zero*: guidance with the weak velocity rescaled to fit the strong one, per sample.

    .. math:: v = s\,v_s + (1 - s)\,\gamma\,v_w, \qquad \gamma = \frac{\langle v_s, v_w\rangle}{\lVert v_w\rVert^2}

    The rule is for flow matching, where the velocity is inaccurate at high noise and may be set to zero there.

    Arguments:
        zero_above: Time above which the guided velocity is zero, or None.

    References:
        | CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models (Fan et al., 2025), arXiv:2503.18886
    """

    zero_above: float | None = None

    def __post_init__(self) -> None:
        if self.zero_above is not None:
            check.number("zero_above", self.zero_above, at_least=0)

    def __call__(
        self, model: AbstractDenoiser, x: Tensor, t: Value, strong: Tensor, weak: Tensor, scale: Value
    ) -> Tensor:
        v_s, v_w = (model.convert("x0", d, "velocity", x, t) for d in (strong, weak))
        gamma = _rows_dot(v_s, v_w) / _rows_dot(v_w, v_w).clamp_min(torch.finfo(x.dtype).tiny)
        v = torch.lerp(gamma * v_w, v_s, scale)
        if self.zero_above is not None:
            v = v * check.expand(torch.as_tensor(t <= self.zero_above, dtype=x.dtype, device=x.device), x)
        return model.convert("velocity", v, "x0", x, t)


@checked
def plus_plus(sde: SDE, grid: Tensor | Sequence[float], scale: float) -> Callable[[Value], Value]:
    r"""Scale, as a function of t, for which :class:`ClassifierFree` with DDIM on this grid is CFG++.

    CFG++ denoises with guidance and renoises with the unconditional ε:
    :math:`x_s = \alpha_s D_\lambda + \sigma_s (x_t - \alpha_t D_w)/\sigma_t` with :math:`D_\lambda = D_w +
    \lambda (D_s - D_w)`. This changes the update and not the denoiser. The update equals that of DDIM with the scale

    .. math:: s = \frac{\lambda}{1 - e^{\lambda_t - \lambda_s}}, \qquad \lambda_t = \log(\alpha_t/\sigma_t)

    for the step t → s. The scale grows without bound as the step size goes to 0, so CFG++ has no continuous limit.
    Times inside a step, as in multistage solvers, have the scale of that step.

    Arguments:
        sde: Noising process.
        grid: Decreasing times, (N + 1,).
        scale: Scale λ of CFG++, in [0, 1] in the paper.

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
    ends: list[float] = starts.tolist()
    numbers: list[float] = by_start.tolist()

    def of_t(t: Value) -> Value:
        if not isinstance(t, Tensor):
            return numbers[min(bisect_left(ends, t * (1 - 1e-9)), len(numbers) - 1)]
        at = torch.as_tensor(t, dtype=torch.float64, device="cpu") * (1 - 1e-9)
        leg = torch.searchsorted(starts, at).clamp_max(len(starts) - 1)
        return by_start[leg].to(t.device)

    return of_t


def _rows_dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each row, (B, 1, ...)."""
    return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))


def _rows_std(a: Tensor) -> Tensor:
    """Standard deviation of each row, (B, 1, ...), by the same sums for any number of rows."""
    ones = torch.ones_like(a)
    n = a[0].numel()
    centred = a - _rows_dot(a, ones) / n
    return (_rows_dot(centred, centred) / (n - 1)).sqrt()
