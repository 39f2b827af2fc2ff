r"""Losses: denoising score matching for any process and prediction, a bound for learned variances, sliced matching.

.. math:: L = E_{t\sim p,\,x_0,\,\varepsilon}\,w(t)\,|\hat x_0(\alpha x_0 + \sigma\varepsilon, t) - x_0|^2
            = E_{t\sim q}\,\frac{p(t)}{q(t)}\,w(t)\,|\hat x_0 - x_0|^2

The weighting w and the density p of the times define the loss. The proposal q changes only the variance of its
estimate. The code computes the squared error of the network's output, and converts w exactly to a weight on that error
(:mod:`scoresde.training.weightings`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoresde import _checks as check
from scoresde._doors import checked, checked_with
from scoresde.denoisers.base import AbstractDenoiser, Condition, Given
from scoresde.denoisers.modes import takes_label, wrong_null
from scoresde.denoisers.network import Denoiser, log_variance
from scoresde.noise.keyed import Noise
from scoresde.processes.discrete import Discrete
from scoresde.processes.sde import SDE
from scoresde.training.describe import describe
from scoresde.training.draws import NORMALS, Source, drop_condition, source_of
from scoresde.training.first_batch import warn_unlabelled
from scoresde.training.times import LossAware, Steps, Stratified, Times, Uniform
from scoresde.training.weightings import On, Uncertainty, Weighting, named, sensitivity


@dataclass(frozen=True)
class Terms:
    """Loss of each sample of a batch; all tensors have shape (B,).

    Arguments:
        t: Times.
        error: Squared error of the network's output, averaged over an event, without weight and without gradient.
        weight: Weight on that error: w(t), converted to the output, times p(t)/q(t).
        loss: Loss of each sample; the loss of the batch is the mean.
    """

    t: Tensor
    error: Tensor
    weight: Tensor
    loss: Tensor


@checked_with({}, own=["weighting"])
class DSM(nn.Module):
    r"""Denoising score matching: ``loss = DSM(model)(x)`` is one line in any training loop.

    .. math:: L = \frac1B\sum_i \frac{p(t_i)}{q(t_i)}\,w(t_i)\,\tfrac1D|\hat x_0(x_{t_i}, t_i) - x_0|^2, \; t_i \sim q

    By default the weight is 1 on the error of the network's output, and times are uniform. For ``eps`` this is the loss
    of DDPM; for ``velocity`` on :class:`Flow` it is flow matching, E‖net − (ε − x0)‖². For ``score`` the weight is 1 on
    the error of ε. EDM's loss is ``DSM(model, "edm", LogNormalSigma())`` with ``predicts="F"``.

    The parameters are those of the network and of a learned weighting. All coefficients are computed in the dtype of
    `x`, also under autocast.

    Arguments:
        model: Denoiser to train.
        weighting: Name or function of (sde, t), see :mod:`scoresde.training.weightings`. ``"edm"`` takes its
            `sigma_data` from the model's preconditioning; without preconditioning it is 1.
        times: Density p of the times. By default uniform; for a :class:`Discrete` process uniform on its steps.
        proposal: Density q of the draws, such as :class:`LikelihoodImportance` or :class:`LossAware`; by default p.
        drop: Probability of replacing a sample's conditions by `null`, for classifier-free guidance.
        null: Values that mean "no condition", by name.

    Example:
        >>> import torch, scoresde as ss
        >>> net = torch.nn.Linear(3, 3)
        >>> model = ss.Denoiser(lambda x, t: net(x), ss.VP(), predicts="eps")
        >>> optimiser = torch.optim.Adam(net.parameters())
        >>> loss = ss.DSM(model, weighting="min_snr")
        >>> for _ in range(10):
        ...     optimiser.zero_grad()
        ...     loss(torch.randn(8, 3)).backward()
        ...     _ = optimiser.step()

    References:
        | A Connection Between Score Matching and Denoising Autoencoders (Vincent, 2011), doi:10.1162/NECO_a_00142
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          arXiv:2011.13456
    """

    def __init__(
        self,
        model: AbstractDenoiser,
        weighting: str | Weighting | Uncertainty | None = None,
        times: Times | None = None,
        *,
        proposal: Times | None = None,
        drop: float = 0.0,
        null: Mapping[str, float | Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, AbstractDenoiser):
            raise TypeError(
                f"`model` must be a denoiser, Denoiser(net, sde, predicts=...), got {type(model).__name__}."
            )
        if isinstance(model, Given):
            name = next(iter(model.conditions), "label")
            raise TypeError(
                f"`model` has fixed conditions, and training needs new ones for each batch: give the denoiser without "
                f"`given`, and the conditions with the data, as in loss(x, {name}={name})."
            )
        if getattr(model, "learned_variance", False) and not isinstance(self, HybridVLB):
            raise ValueError("`model` has a learned variance, which this loss does not train; use HybridVLB(model).")
        for name, value in (("times", times), ("proposal", proposal)):
            if not (value is None or isinstance(value, Times)):
                raise TypeError(f"`{name}` must be a density such as Uniform(), got {type(value).__name__}.")
        if isinstance(times, LossAware) or isinstance(getattr(times, "base", None), LossAware):
            raise ValueError(
                "`times` defines the loss and must be a fixed density, got LossAware; give LossAware as `proposal`."
            )
        self.model = model
        self.predicts = model.predicts if isinstance(model, Denoiser) else "x0"
        precondition = model.precondition if isinstance(model, Denoiser) else None
        self.sigma_data = 1.0 if precondition is None else precondition.sigma_data
        self.balance = weighting if isinstance(weighting, Uncertainty) else None
        base = self.balance.base if self.balance is not None else weighting
        if base is None:
            base = On("eps" if self.predicts == "score" else self.predicts, self.sigma_data)
        if not (isinstance(base, str) or callable(base)):
            fix = f"; did you mean times={type(base).__name__}(...)?" if isinstance(base, Times) else "."
            raise TypeError(f"`weighting` must be a name or a function of (sde, t), got {type(base).__name__}{fix}")
        self.weighting: Weighting = named(base, self.sigma_data) if isinstance(base, str) else base
        sde = model.sde
        self.times: Times = times or (Steps(sde.N) if isinstance(sde, Discrete) else Uniform())
        self.proposal = proposal
        if isinstance(proposal, Stratified) and isinstance(proposal.base, nn.Module):
            self.learned_times = proposal.base  # so that its state is saved with the loss
        self.drop = check.number("drop", drop, at_least=0, at_most=1)
        self.null = dict(null or {})
        if self.drop > 0 and not self.null:
            raise ValueError(
                f"`drop`={self.drop} needs `null`, the values that mean no condition, as in null={{'label': 10}}."
            )
        classes = wrong_null(model, self.null)
        if classes is not None:
            raise ValueError(
                f"`null` has label = {self.null['label']}, which is a class or no index of the network; the index of "
                f"no class is {classes}, its number of classes: null={{'label': {classes}}}."
            )
        self.levels = LossByNoise(sde)
        self.unlabelled = takes_label(model)  # until the warning that labels are missing

    def __repr__(self) -> str:
        options = {"weighting": self.balance or self.weighting, "times": self.times, **self._options()}
        return f"{type(self).__name__}({describe(self.model)}, " + _keywords(options) + ")"

    def _options(self) -> dict[str, object]:
        """Options to print, if they are not at their defaults."""
        out: dict[str, object] = {} if self.proposal is None else {"proposal": self.proposal}
        return {**out, "drop": self.drop, "null": self.null} if self.drop else out

    @property
    def sde(self) -> SDE:
        """Process of the model."""
        return self.model.sde

    def forward(self, x: Tensor, noise: Noise | Source | int | None = None, **cond: Condition) -> Tensor:
        """Loss of a batch, a scalar.

        Arguments:
            x: Data, (B, *event), float32 or float64.
            noise: Source of times and noise: None for torch's global generator; a seed or a :class:`Noise` for numbers
                that depend only on the seed and the row; ``Draws(generator)`` for a torch generator.
            **cond: Conditions for the network, by name: tensors with one row for each sample or one row for all, or
                ``Shared(value)`` for values without a batch axis.
        """
        if not torch.compiler.is_compiling() and self.unlabelled and cond and "label" not in cond:
            self.model.given(**cond)  # refuses other names of the label
        loss = self.terms(x, noise, **cond).loss.mean()
        if not torch.compiler.is_compiling() and self.unlabelled and "label" not in cond:
            self.unlabelled = False
            warn_unlabelled("loss(x, label=y)")
        return loss

    def terms(self, x: Tensor, noise: Noise | Source | int | None = None, **cond: Condition) -> Terms:
        """Loss of each sample, with the arguments of :meth:`forward`."""
        check.state("x", x)
        source = source_of(noise)
        if self.drop > 0:
            cond = drop_condition(cond, self.drop, self.null, source, len(x))
        density = self.proposal or self.times
        with _no_autocast(x):
            t = density.sample(self.sde, len(x), source, dtype=x.dtype, device=x.device)
            eps = source.normal(x.shape, NORMALS, dtype=x.dtype, device=x.device)
        terms = self.at(x, t, eps, **cond)
        if self.training:
            loss = terms.loss.detach()
            self.levels.add(terms.t, terms.error)
            if self.proposal is not None:
                self.proposal.observe(self.sde, t, loss * self.proposal.density(self.sde, t))
        return terms

    @checked
    def at(self, x: Tensor, t: Tensor, eps: Tensor, **cond: Condition) -> Terms:
        """Loss of each sample at given times and noise.

        Arguments:
            x: Data, (B, *event).
            t: Times, (B,).
            eps: Standard normal noise of the shape of `x`.
            **cond: Conditions for the network, by name.
        """
        with _no_autocast(x):
            x_t, weight = self.sde.perturb(x, t, eps), self._weight(t)
            target = self.model.target(x, t, eps) if isinstance(self.model, Denoiser) else x
        out = (
            self.model.output(x_t, t, **cond)[0] if isinstance(self.model, Denoiser) else self.model.x0(x_t, t, **cond)
        )
        error = _per_sample((out - target) ** 2)
        return self._terms(t, error, weight, weight * error)

    def _weight(self, t: Tensor) -> Tensor:
        """Weight on the squared error of the network's output."""
        weight = self.weighting(self.sde, t) / sensitivity(self.predicts, self.sde, t, self.sigma_data)
        return weight if self.proposal is None else weight * self._importance(t)

    def _importance(self, t: Tensor) -> Tensor:
        if self.proposal is None:
            return torch.ones_like(t)
        return self.times.density(self.sde, t) / self.proposal.density(self.sde, t)

    def _terms(self, t: Tensor, error: Tensor, weight: Tensor, loss: Tensor) -> Terms:
        if self.balance is not None:
            ratio = self._importance(t)
            loss = ratio * self.balance(loss / ratio, self.sde, t)
        return Terms(t, error.detach(), weight, loss)


@checked
class HybridVLB(DSM):
    r"""DSM for the mean, plus the variational bound for a learned variance.

    .. math:: L = L_{DSM} + \lambda N\, E_t\,\mathrm{KL}\big(q(x_s\mid x_t, x_0)\,\|\,N(\tilde\mu(x_t, \hat x_0),
              e^{v\log\beta + (1-v)\log\tilde\beta})\big), \qquad s = t - T/N

    The bound has a gradient with respect to the variance only. β̃ is the variance of q(x_s | x_t, x_0), β that of x_t
    given x_s, and v = (output + 1)/2. At the last step, s = 0, the KL is replaced by the negative log-likelihood of a
    Gaussian decoder, with the β̃ of the step from 2T/N to T/N. The unit is nats per entry.

    Arguments:
        model: Denoiser with ``learned_variance=True``.
        steps: Number of steps N; by default that of a :class:`Discrete` process, else 1000.
        vlb: Weight λ of the bound.
        weighting: Weighting of the DSM part; `weighting`, `drop` and `null` are those of :class:`DSM`.

    References:
        | Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), arXiv:2102.09672, eq. 15 and 16
    """

    def __init__(
        self,
        model: Denoiser,
        steps: int | None = None,
        vlb: float = 1e-3,
        weighting: str | Weighting | None = None,
        *,
        drop: float = 0.0,
        null: Mapping[str, float | Tensor] | None = None,
    ) -> None:
        if not getattr(model, "learned_variance", False):
            raise ValueError("`model` must be a Denoiser made with learned_variance=True; else use DSM.")
        if steps is None:
            steps = model.sde.N if isinstance(model.sde, Discrete) else 1000
        super().__init__(model, weighting, Steps(check.integer("steps", steps, at_least=2)), drop=drop, null=null)
        self.steps = steps
        self.vlb = check.number("vlb", vlb, at_least=0)

    def _options(self) -> dict[str, object]:
        return {"vlb": self.vlb, **super()._options()}

    @checked
    def at(self, x: Tensor, t: Tensor, eps: Tensor, **cond: Condition) -> Terms:
        assert isinstance(self.model, Denoiser)
        with _no_autocast(x):
            x_t, target, weight = self.sde.perturb(x, t, eps), self.model.target(x, t, eps), self._weight(t)
        out, variance = self.model.output(x_t, t, **cond)
        assert variance is not None
        error = _per_sample((out - target) ** 2)
        with _no_autocast(x):
            x0 = self.model.convert(self.predicts, out.detach(), "x0", x_t, t, self.sigma_data)
            bound = self.bound(x, t, x0, variance)
        return self._terms(t, error, weight, weight * error + self.vlb * self.steps * bound)

    def bound(self, x: Tensor, t: Tensor, x0: Tensor, variance: Tensor) -> Tensor:
        """Term of the bound for the step that starts at `t`, (B,), in nats per entry.

        Arguments:
            x: Data, (B, *event).
            t: Times of the steps, (B,), multiples of T/N.
            x0: Prediction of the data by the network, of the shape of `x`.
            variance: Variance output of the network, of the shape of `x`.
        """
        step = self.sde.T / self.steps
        s = (t - step).clamp_min(0)
        first = t < 1.5 * step
        _, of_x0, small = self.sde.posterior(s, t)
        small = torch.where(first, self.sde.posterior(torch.full_like(t, step), torch.full_like(t, 2 * step))[2], small)
        large = self.sde.transition(s, t)[1] ** 2
        first, small, large, of_x0 = (c.reshape(-1, *[1] * (x.ndim - 1)) for c in (first, small, large, of_x0))
        log_var = log_variance(self.model.kind.variance or "range", variance, small, large)
        moved = (of_x0 * (x0 - x)) ** 2
        kl = 0.5 * (log_var - small.log() + (small + moved) / log_var.exp() - 1)
        nll = 0.5 * (math.log(2 * math.pi) + log_var + (x0 - x) ** 2 / log_var.exp())
        return _per_sample(torch.where(first, nll, kl))


@checked
def sliced_score_matching(
    score: Callable[[Tensor], Tensor],
    x: Tensor,
    noise: Noise | Source | int | None = None,
    *,
    projections: int = 1,
) -> Tensor:
    r"""Sliced score matching with reduced variance; it learns the score of the data without added noise.

    .. math:: L = E\,\big[\tfrac12|s(x)|^2 + v^T \nabla_x s(x)\,v\big], \quad v \sim N(0, I), \qquad
              L = \tfrac12 E|s - \nabla\log p|^2 - \tfrac12 E|\nabla\log p|^2 \text{ in expectation}

    Arguments:
        score: Function s(x), (B, *event) to (B, *event); no row may depend on another.
        x: Data, (B, *event).
        noise: Source of the directions v, as in :class:`DSM`.
        projections: Number of directions per sample.

    References:
        | Sliced Score Matching (Song et al., 2019), arXiv:1905.07088, eq. 8
    """
    check.integer("projections", projections, at_least=1)
    source = source_of(noise)
    x = check.state("x", x).detach().requires_grad_()
    with torch.enable_grad():
        s = score(x)
        curvature = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for k in range(projections):
            v = source.normal(x.shape, k, dtype=x.dtype, device=x.device)
            (slope,) = torch.autograd.grad((s * v).sum(), x, create_graph=True)
            curvature = curvature + (slope * v).reshape(len(x), -1).sum(1) / projections
        return (0.5 * (s**2).reshape(len(x), -1).sum(1) + curvature).mean()


@checked
class LossByNoise(nn.Module):
    """Mean error per noise level; the sums stay on the device until :meth:`read`.

    Arguments:
        sde: Process.
        bins: Number of levels, uniform in λ = log(α/σ) between λ(T) and λ(t_min), clipped to [−8, 8].
    """

    edges: Tensor
    total: Tensor
    count: Tensor
    bad: Tensor

    def __init__(self, sde: SDE, bins: int = 10) -> None:
        super().__init__()
        check.integer("bins", bins, at_least=1)
        self.sde = sde
        high, low = min(sde.lam(sde.t_min), 8.0), max(sde.lam(sde.T), -8.0)
        self.register_buffer("edges", torch.linspace(low, high, bins + 1), persistent=False)
        for name in ("total", "count", "bad"):
            self.register_buffer(name, torch.zeros(bins), persistent=False)

    @torch.no_grad()
    def add(self, t: Tensor, error: Tensor) -> None:
        """Add errors (B,) at times (B,)."""
        k = torch.bucketize(self.sde.lam(t).to(self.edges), self.edges[1:-1])
        finite = error.isfinite()
        self.total.index_add_(0, k, error.where(finite, 0.0).to(self.total))
        self.count.index_add_(0, k, finite.to(self.count))
        self.bad.index_add_(0, k, (~finite).to(self.bad))

    @checked
    def read(self, reset: bool = True) -> list[dict[str, float]]:
        """Return one row per level that has errors, and set all sums to zero.

        Arguments:
            reset: Whether to set the sums to zero.

        Returns:
            Rows with ``lam`` (middle of the level), ``error`` (mean of the finite errors), ``count`` (their number) and
            ``bad`` (number of errors that are not finite).
        """
        middle = (self.edges[1:] + self.edges[:-1]) / 2
        columns = torch.stack([middle, self.total / self.count.clamp_min(1), self.count, self.bad], dim=1).tolist()
        for buffer in (self.total, self.count, self.bad) if reset else ():
            buffer.zero_()
        return [dict(zip(("lam", "error", "count", "bad"), row, strict=True)) for row in columns if row[2] + row[3]]


def _keywords(options: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={describe(value)}" for name, value in options.items())


def _per_sample(x: Tensor) -> Tensor:
    """Mean over an event, (B, *event) to (B,)."""
    return x.reshape(len(x), -1).mean(1)


def _no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off, because the coefficients of a process need full precision."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
