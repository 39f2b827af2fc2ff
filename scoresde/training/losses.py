r"""Losses: denoising score matching for any process and parametrisation, with a bound for variances; and sliced.

.. math:: L = E_{t\sim p,\,x_0,\,\varepsilon}\,w(t)\,|\hat x_0(\alpha x_0 + \sigma\varepsilon, t) - x_0|^2
            = E_{t\sim q}\,\frac{p(t)}{q(t)}\,w(t)\,|\hat x_0 - x_0|^2

*What* is learned is said by the weighting w and the times p; *how* it is estimated, by the proposal q, which changes
the variance and nothing else. The error is computed on what the network returns, whose scale is right, and weighted by
the exact ratio (:mod:`scoresde.training.weightings`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scoresde import _checks as check
from scoresde.denoiser import AbstractDenoiser, Denoiser
from scoresde.discrete import Discrete
from scoresde.noise import Noise
from scoresde.sde import SDE
from scoresde.training.draws import NORMALS, Source, drop_condition, source_of
from scoresde.training.times import LossAware, Steps, Stratified, Times, Uniform
from scoresde.training.weightings import On, Uncertainty, Weighting, named, sensitivity


@dataclass(frozen=True)
class Terms:
    """A loss, sample by sample; all of shape (B,).

    Arguments:
        t: Times.
        error: Squared error of what the network returned, averaged over an event; no weight, no gradient.
        weight: What the error is multiplied by: w(t) on that error, times p(t)/q(t).
        loss: The loss of each sample; their mean is the loss.
    """

    t: Tensor
    error: Tensor
    weight: Tensor
    loss: Tensor


class DSM(nn.Module):
    r"""Denoising score matching: ``loss = DSM(model)(x)`` is one line in any training loop.

    .. math:: L = \frac1B\sum_i \frac{p(t_i)}{q(t_i)}\,w(t_i)\,\tfrac1D|\hat x_0(x_{t_i}, t_i) - x_0|^2, \; t_i \sim q

    By default the weight is 1 on the error of what the network predicts, and times are even: for ``eps`` the loss of
    DDPM, for ``velocity`` on :class:`Flow` flow matching, E‖net − (ε − x0)‖². A network that predicts the score is
    weighted as its ε. EDM's loss is ``DSM(model, "edm", LogNormalSigma())`` with ``predicts="F"``.

    The loss has the network's parameters, and those of a learned weighting. Everything but the network is computed in
    the dtype of `x`, also under autocast.

    Arguments:
        model: A denoiser.
        weighting: A name or a function of (sde, t), see :mod:`scoresde.training.weightings`; ``"edm"`` takes its
            `sigma_data` from the model's preconditioning, 1 without.
        times: The density p of the times that count. By default even; for a :class:`Discrete` process even on its
            steps.
        proposal: The density q to draw from instead: :class:`LikelihoodImportance`, :class:`LossAware` or any other.
        drop: Probability that a sample's conditions are replaced by `null`, for classifier-free guidance.
        null: What stands for no condition, by name.

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
        null: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, AbstractDenoiser):
            raise TypeError(
                f"`model` must be a denoiser, Denoiser(net, sde, predicts=...), got {type(model).__name__}."
            )
        if getattr(model, "learned_variance", False) and not isinstance(self, HybridVLB):
            raise ValueError("`model` has a learned variance, which this loss does not train; use HybridVLB(model).")
        for name, value in (("times", times), ("proposal", proposal)):
            if not (value is None or isinstance(value, Times)):
                raise TypeError(f"`{name}` must be a density such as Uniform(), got {type(value).__name__}.")
        if isinstance(times, LossAware) or isinstance(getattr(times, "base", None), LossAware):
            raise ValueError(
                "`times` says what counts, which must not move with the loss; give LossAware as `proposal`."
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
            self.learned_times = proposal.base  # so that its state is the loss' state
        self.drop = check.number("drop", drop, least=0, most=1)
        self.null = dict(null or {})
        if self.drop > 0 and not self.null:
            raise ValueError(
                f"`drop`={self.drop} needs `null`, what stands for no condition, as in null={{'label': 10}}."
            )
        self.levels = LossByNoise(sde)

    @property
    def sde(self) -> SDE:
        """The model's process."""
        return self.model.sde

    def forward(self, x: Tensor, noise: Noise | Source | int | None = None, **cond: Any) -> Tensor:
        """The loss of a batch, a scalar.

        Arguments:
            x: Data, (B, *event), float32 or float64.
            noise: Where times and noise come from: None for torch's global generator, as in any training loop; a seed
                or a :class:`Noise` for numbers that belong to the sample; ``Draws(generator)`` for a generator.
            **cond: Conditions for the network, by name.
        """
        return self.terms(x, noise, **cond).loss.mean()

    def terms(self, x: Tensor, noise: Noise | Source | int | None = None, **cond: Any) -> Terms:
        """The loss of each sample, with the arguments of :meth:`forward`."""
        check.state("x", x)
        source = source_of(noise)
        if self.drop > 0:
            cond = drop_condition(cond, self.drop, self.null, source)
        density = self.proposal or self.times
        with _float(x):
            t = density.sample(self.sde, len(x), source, dtype=x.dtype, device=x.device)
            eps = source.normal(x.shape, NORMALS, dtype=x.dtype, device=x.device)
        terms = self.at(x, t, eps, **cond)
        if self.training:
            loss = terms.loss.detach()
            self.levels.add(terms.t, terms.error)
            if self.proposal is not None:
                self.proposal.observe(self.sde, t, loss * self.proposal.density(self.sde, t))
        return terms

    def at(self, x: Tensor, t: Tensor, eps: Tensor, **cond: Any) -> Terms:
        """The loss of each sample at given times and noise.

        Arguments:
            x: Data, (B, *event).
            t: Times, (B,).
            eps: Standard normal, the shape of `x`.
            **cond: Conditions for the network, by name.
        """
        with _float(x):
            x_t, weight = self.sde.perturb(x, t, eps), self._weight(t)
            target = self.model.target(x, t, eps) if isinstance(self.model, Denoiser) else x
        out = (
            self.model.output(x_t, t, **cond)[0] if isinstance(self.model, Denoiser) else self.model.x0(x_t, t, **cond)
        )
        error = _per_sample((out - target) ** 2)
        return self._terms(t, error, weight, weight * error)

    def _weight(self, t: Tensor) -> Tensor:
        """Weight on the squared error of what the network returns."""
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


class HybridVLB(DSM):
    r"""DSM for the mean and the variational bound for a learned variance.

    .. math:: L = L_{DSM} + \lambda N\, E_t\,\mathrm{KL}\big(q(x_s\mid x_t, x_0)\,\|\,N(\tilde\mu(x_t, \hat x_0),
              e^{v\log\beta + (1-v)\log\tilde\beta})\big), \qquad s = t - T/N

    The bound's gradient reaches the variance only. β̃ is the variance of q(x_s | x_t, x_0), β that of x_t given x_s, and
    v = (output + 1)/2. The last step, s = 0, is the negative log-likelihood of a Gaussian decoder, and takes its β̃ from
    the step before. Nats per entry.

    Arguments:
        model: A denoiser with ``learned_variance=True``.
        steps: N; by default that of a :class:`Discrete` process, else 1000.
        vlb: λ.
        weighting: Of the DSM part, as there.

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
        null: Mapping[str, Any] | None = None,
    ) -> None:
        if not getattr(model, "learned_variance", False):
            raise ValueError("`model` must be a Denoiser made with learned_variance=True; DSM trains one without.")
        if steps is None:
            steps = model.sde.N if isinstance(model.sde, Discrete) else 1000
        super().__init__(model, weighting, Steps(check.integer("steps", steps, least=2)), drop=drop, null=null)
        self.steps = steps
        self.vlb = check.number("vlb", vlb, least=0)

    def at(self, x: Tensor, t: Tensor, eps: Tensor, **cond: Any) -> Terms:
        """The loss of each sample at given times and noise, with the arguments of :meth:`DSM.at`."""
        assert isinstance(self.model, Denoiser)
        with _float(x):
            x_t, target, weight = self.sde.perturb(x, t, eps), self.model.target(x, t, eps), self._weight(t)
        out, variance = self.model.output(x_t, t, **cond)
        assert variance is not None
        error = _per_sample((out - target) ** 2)
        with _float(x):
            x0 = self.model._convert(self.predicts, out.detach(), "x0", x_t, t, self.sigma_data)
            bound = self.bound(x, t, x0, variance)
        return self._terms(t, error, weight, weight * error + self.vlb * self.steps * bound)

    def bound(self, x: Tensor, t: Tensor, x0: Tensor, variance: Tensor) -> Tensor:
        """The step's term of the bound, (B,), in nats per entry.

        Arguments:
            x: Data, (B, *event).
            t: Times, (B,), of the steps.
            x0: The network's data prediction, the shape of `x`.
            variance: The network's variance output, the shape of `x`.
        """
        step = self.sde.T / self.steps
        s = (t - step).clamp_min(0)
        first = t < 1.5 * step
        _, of_x0, small = self.sde.posterior(s, t)
        small = torch.where(first, self.sde.posterior(torch.full_like(t, step), torch.full_like(t, 2 * step))[2], small)
        large = self.sde.transition(s, t)[1] ** 2
        share = (variance + 1) / 2
        first, small, large, of_x0 = (c.reshape(-1, *[1] * (x.ndim - 1)) for c in (first, small, large, of_x0))
        log_var = share * large.log() + (1 - share) * small.log()
        moved = (of_x0 * (x0 - x)) ** 2
        kl = 0.5 * (log_var - small.log() + (small + moved) / log_var.exp() - 1)
        nll = 0.5 * (math.log(2 * math.pi) + log_var + (x0 - x) ** 2 / log_var.exp())
        return _per_sample(torch.where(first, nll, kl))


def sliced_score_matching(
    score: Callable[[Tensor], Tensor],
    x: Tensor,
    noise: Noise | Source | int | None = None,
    *,
    projections: int = 1,
) -> Tensor:
    r"""Sliced score matching with reduced variance: learns the score of data as it is, without noise.

    .. math:: L = E\,\big[\tfrac12|s(x)|^2 + v^T \nabla_x s(x)\,v\big], \quad v \sim N(0, I), \qquad
              L = \tfrac12 E|s - \nabla\log p|^2 - \tfrac12 E|\nabla\log p|^2 \text{ in the mean}

    Arguments:
        score: s(x), (B, *event) to (B, *event); rows must not depend on one another.
        x: Data, (B, *event).
        noise: Where the directions come from, as in :class:`DSM`.
        projections: Directions for each sample.

    References:
        | Sliced Score Matching (Song et al., 2019), arXiv:1905.07088, eq. 8
    """
    check.integer("projections", projections, least=1)
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


class LossByNoise(nn.Module):
    """Mean error by noise level, gathered on the device and read when asked.

    Arguments:
        sde: The process.
        bins: Levels, even in λ = log(α/σ) between its ends, or −8 and 8 where they lie further out.
    """

    edges: Tensor
    total: Tensor
    count: Tensor
    bad: Tensor

    def __init__(self, sde: SDE, bins: int = 10) -> None:
        super().__init__()
        check.integer("bins", bins, least=1)
        self.sde = sde
        high, low = min(sde.lam(sde.t_min), 8.0), max(sde.lam(sde.T), -8.0)
        self.register_buffer("edges", torch.linspace(low, high, bins + 1), persistent=False)
        for name in ("total", "count", "bad"):
            self.register_buffer(name, torch.zeros(bins), persistent=False)

    @torch.no_grad()
    def add(self, t: Tensor, error: Tensor) -> None:
        """Take in errors (B,) at times (B,)."""
        k = torch.bucketize(self.sde.lam(t).to(self.edges), self.edges[1:-1])
        fine = error.isfinite()
        self.total.index_add_(0, k, error.where(fine, 0.0).to(self.total))
        self.count.index_add_(0, k, fine.to(self.count))
        self.bad.index_add_(0, k, (~fine).to(self.bad))

    def read(self) -> list[dict[str, float]]:
        """One row for each level that was seen since the last reading, which is forgotten with it.

        Returns:
            Rows with ``lam`` (the middle of the level), ``error`` (mean), ``count`` and ``bad`` (not finite).
        """
        middle = (self.edges[1:] + self.edges[:-1]) / 2
        columns = torch.stack([middle, self.total / self.count.clamp_min(1), self.count, self.bad], dim=1).tolist()
        for buffer in (self.total, self.count, self.bad):
            buffer.zero_()
        return [dict(zip(("lam", "error", "count", "bad"), row, strict=True)) for row in columns if row[2] + row[3]]


def _per_sample(x: Tensor) -> Tensor:
    """Mean over an event, (B, *event) to (B,)."""
    return x.reshape(len(x), -1).mean(1)


def _float(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast: coefficients of a process are no place for half precision."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
