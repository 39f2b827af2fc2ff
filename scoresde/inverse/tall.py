r"""Posteriors of many observations of one parameter ("tall data"), from one conditional score for each observation.

With independent observations :math:`x_1 \dots x_n` of θ,

.. math:: p(\theta \mid x_{1:n}) \propto p(\theta)^{1-n} \prod_j p(\theta \mid x_j)

so a network that was trained on single observations is enough for any number of them. The diffused posterior is not the
product of the diffused factors. The methods differ in what they do about that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._printing import fields
from scoresde.denoisers.base import AbstractDenoiser, Condition, Wrapped, check_model, same_process
from scoresde.guidance.classifier import Graph, before_silence
from scoresde.inverse.priors import Prior, UniformPrior, as_prior, covariance_of
from scoresde.sampling.solve import sample

METHODS = ("gauss", "jac", "fnpe")
_AT_ONCE = 1 << 15  # largest number of states in a forward pass of the network


@checked
class TallPosterior(Wrapped):
    r"""Posterior of all observations, composed of the posteriors of the single ones.

    p(θ₀ | θ_t, x_j) is approximated by a Gaussian whose mean is the data prediction D_j, with precision P_j, and
    p(θ₀ | θ_t) by one with D_λ and P_λ. Their product gives

    .. math:: D = D_\lambda + \Lambda^{-1}\sum_j P_j (D_j - D_\lambda), \qquad
              \Lambda = P_\lambda + \sum_j (P_j - P_\lambda)

    - ``"gauss"``: :math:`P_j = \Sigma_j^{-1} + \frac{\alpha^2}{\sigma^2}`, with the covariance Σ_j of p(θ | x_j), and
      P_λ likewise with that of the prior. Σ_j is estimated from samples unless it is given.
    - ``"jac"``: :math:`P_j^{-1} = \frac{\sigma^2}{\alpha}\,\partial D_j/\partial\theta_t`, by one backward pass for
      each entry of θ.
    - ``"fnpe"``: :math:`s = \sum_j s_j + (1 - n)(1 - t/T)\nabla\log p(\theta)`. These are the scores of densities that
      lead to the posterior at t = 0, but not those of a diffusion. Sample them with Langevin steps at falling times,
      ``x = ss.sampling.langevin(model, x, t, 0.3 * sde.sigma(t)**2 / n, 10)``. On a VP process they exist if the prior
      has at least unit variance in all directions, so scale θ. A :class:`UniformPrior` counts as ∇ log p = 0.

    ``"gauss"`` and ``"jac"`` are exact if prior and posteriors are Gaussian, and work with every solver. Where an
    observation would make a direction wider than the prior does, which errors of a network or of an estimate can do and
    which would make Λ negative, the precision of the prior replaces its own.

    Arguments:
        model: Denoiser with the conditions in `observations`; or a list of denoisers, one for each observation.
        observations: Observations by the name of the condition: tensors (n, ...). None with a list of denoisers.
        prior: Denoiser of the prior on the same process, or a distribution of torch, see :func:`as_prior`.
        method: Method, ``"gauss"``, ``"jac"`` or ``"fnpe"``.
        covariances: Covariances Σ_j of the single posteriors for ``"gauss"``, (n, D, D) or (1, D, D).
        prior_covariance: Covariance of the prior, (D, D), if `prior` is a network.
        samples: Number of samples of each single posterior for the estimate of its covariance.
        steps: Number of steps for these samples.
        seed: Seed of these samples.

    References:
        | Compositional Score Modeling for Simulation-Based Inference (Geffner et al., 2023), arXiv:2209.14249
        | Diffusion Posterior Sampling for Simulation-Based Inference in Tall Data Settings (Linhart et al., 2024),
          arXiv:2404.07593

    Example:
        >>> import torch, scoresde as ss
        >>> sde, x = ss.VP(), torch.tensor([[0.9], [1.2], [0.6]])
        >>> one = lambda theta, t, x: ss.Gaussian(sde, torch.zeros(1), torch.ones(1)).x0(theta, t)  # x tells nothing
        >>> prior = ss.GaussianMixture(sde, torch.zeros(1, 1), std=1.0)
        >>> single = [ss.GaussianMixture(sde, row[None] / 2, std=0.5**0.5) for row in x]  # prior N(0, 1), noise N(0, 1)
        >>> model = ss.inverse.TallPosterior(single, None, prior, method="jac")
        >>> theta = ss.sample(model, (1000, 1), steps=20, seed=0)  # exact: mean 2.7/4, variance 1/4
        >>> abs(float(theta.mean()) - 0.675) < 0.05, abs(float(theta.std()) - 0.5) < 0.03
        (True, True)
    """

    def __init__(
        self,
        model: AbstractDenoiser | Sequence[AbstractDenoiser],
        observations: Mapping[str, Tensor] | None,
        prior: Prior,
        *,
        method: str = "gauss",
        covariances: Tensor | None = None,
        prior_covariance: Tensor | None = None,
        samples: int = 500,
        steps: int = 20,
        seed: int = 0,
    ) -> None:
        models = [model] if isinstance(model, AbstractDenoiser) else [check_model(m) for m in model]
        if not models:
            raise ValueError("`model` must be a denoiser or a list of at least one, got an empty list.")
        super().__init__(models[0])
        for other in models[1:]:
            same_process(models[0], other, "model")
        self.each = None if isinstance(model, AbstractDenoiser) else nn.ModuleList(models)
        self.observations = _check_observations(observations, isinstance(model, AbstractDenoiser))
        self.n = len(models) if self.each is not None else len(next(iter(self.observations.values())))
        self.prior = as_prior(self.sde, prior)
        self.method = check.choice("method", method, METHODS)
        check.integer("samples", samples, at_least=2)
        check.integer("steps", steps, at_least=1)
        if self.method == "gauss":
            self._set_precisions(covariances, prior_covariance, samples, steps, seed)

    def extra_repr(self) -> str:
        return fields(n=self.n, method=self.method)

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        check.state("x", x)
        if self.method == "jac":
            return self._jac(x, before_silence(self.sde, t), cond)
        if self.method == "fnpe":
            return self._fnpe(x, before_silence(self.sde, t), cond)
        prior = self.prior.x0(x, t).flatten(1)
        shift = self._predictions(x, t, cond) - prior
        alpha, sigma = (_column(fn(t), x) for fn in (self.sde.alpha, self.sde.sigma))
        # Both sides are multiplied by σ², so that σ = 0 needs no special case.
        pull = sigma**2 * torch.einsum("nij,nbj->bi", self.precisions.to(x), shift) + alpha**2 * shift.sum(0)
        values, axes = self.values.to(x), self.axes.to(x)
        step = ((pull @ axes) / (sigma**2 * values + alpha**2)) @ axes.mT
        return (prior + step).reshape(x.shape)

    def _fnpe(self, x: Tensor, t: float | Tensor, cond: Mapping[str, Condition]) -> Tensor:
        flat = isinstance(self.prior, UniformPrior)
        of_prior = torch.zeros_like(x) if flat else self.prior.score(x, self.sde.t_min)
        alpha, sigma = (check.expand(fn(t), x) for fn in (self.sde.alpha, self.sde.sigma))
        rest = check.expand((1 - t / self.sde.T) * (1 - self.n), x)
        total = self._predictions(x, t, cond).sum(0).reshape(x.shape)
        out: Tensor = total + (1 - self.n) * x / alpha + sigma**2 / alpha * rest * of_prior
        return out

    def _jac(self, x: Tensor, t: float | Tensor, cond: Mapping[str, Condition]) -> Tensor:
        """The product in units of α²/σ², where the covariances are J = α ∂D/∂x."""
        wide = torch.as_tensor(self.sde.alpha(t), dtype=torch.float64, device=x.device).reshape(-1, 1, 1)
        graph = Graph(self.prior, x, t, {})
        own = _finite(_symmetric(wide * _jacobian(graph, x)))
        with torch.no_grad():
            values, axes = torch.linalg.eigh(own)
            smallest = (torch.finfo(x.dtype).eps * values.amax(-1, keepdim=True)).clamp_min(1e-100)
            root = values.clamp_min(smallest).sqrt()
            to, least = (axes / root[:, None]).mT, (axes / root[:, None] ** 2) @ axes.mT
        of_prior = _inverse(own, (values > smallest).all(-1), least)
        total, prior = of_prior, graph.x0.flatten(1).double()
        pull = torch.zeros_like(prior)[..., None]
        for model, named in self._singles(x):
            part = Graph(model, x, t, {**cond, **named})
            J = _finite(_symmetric(wide * _jacobian(part, x)))
            with torch.no_grad():  # eigenvalues relative to the prior; one outside (0, 1) becomes 1
                ratio, u = torch.linalg.eigh(_symmetric(to @ J @ to.mT))
                inside = (ratio > 1e-6) & (ratio < 1)
                limited = to.mT @ (u / torch.where(inside, ratio, 1.0)[:, None]) @ u.mT @ to
            precision = _inverse(J, inside.all(-1), limited)
            total = total + precision - of_prior
            pull = pull + precision @ (part.x0.flatten(1).double() - prior)[..., None]
        out = prior + torch.linalg.solve(total, pull)[..., 0]
        return graph.release(out.to(x).reshape(x.shape))

    def _singles(self, x: Tensor) -> list[tuple[AbstractDenoiser, dict[str, Condition]]]:
        """Denoiser and conditions of each observation."""
        if self.each is not None:
            return [(model, {}) for model in self.each if isinstance(model, AbstractDenoiser)]
        named = self.observations.items()
        return [
            (
                self.model,
                {name: value[j : j + 1].to(x.device).expand(len(x), *value.shape[1:]) for name, value in named},
            )
            for j in range(self.n)
        ]

    def _predictions(self, x: Tensor, t: float | Tensor, cond: Mapping[str, Condition]) -> Tensor:
        """Data predictions for each observation, (n, B, D)."""
        B = len(x)
        if self.each is not None:
            return torch.stack([model.x0(x, t, **cond).flatten(1) for model, _ in self._singles(x)])
        parts, many = [], max(1, _AT_ONCE // max(1, B))
        for first in range(0, self.n, many):
            k = min(many, self.n - first)
            wide = {
                name: value[first : first + k].to(x.device).repeat_interleave(B, 0)
                for name, value in self.observations.items()
            }
            times = t.repeat(k) if isinstance(t, Tensor) and t.ndim else t
            parts.append(self.model.x0(x.repeat(k, *[1] * (x.ndim - 1)), times, **cond, **wide).reshape(k, B, -1))
        return torch.cat(parts)

    precisions: Tensor
    values: Tensor
    axes: Tensor

    def _set_precisions(
        self, covariances: Tensor | None, prior_covariance: Tensor | None, samples: int, steps: int, seed: int
    ) -> None:
        """Precisions of the single posteriors, and the eigenvalues and axes of that of the product."""
        known = (
            covariance_of(self.prior) if prior_covariance is None else check.state("prior_covariance", prior_covariance)
        )
        D = None if known is None else len(known)
        event = getattr(self.prior, "event", None if D is None else (D,))
        if known is None or event is None:
            raise ValueError(
                "`prior_covariance` must be given for method 'gauss' with a network as the prior, such as torch.cov of "
                "samples of the prior; or use method 'jac'."
            )
        scale = _root(known.double())  # C_λ = scale scaleᵀ
        if covariances is None:
            covariances, correction = self._estimate(event, samples, steps, seed)
        else:
            correction = 1.0
        if covariances.ndim != 3 or covariances.shape[1:] != (D, D) or len(covariances) not in (1, self.n):
            raise ValueError(
                f"`covariances` must have shape ({self.n}, {D}, {D}) or (1, {D}, {D}), got {tuple(covariances.shape)}."
            )
        inverse = torch.linalg.inv(scale)
        ratio, u = torch.linalg.eigh(_symmetric(inverse @ covariances.double().to(scale) @ inverse.mT))
        ratio = correction / ratio.clamp_min(1e-12)
        extra = (u * (ratio.clamp_min(1) - 1)[:, None]) @ u.mT  # P_j − P_λ in coordinates of the prior, not negative
        own, eye = inverse.mT @ inverse, torch.eye(len(scale)).to(scale)
        precisions = inverse.mT @ (eye + extra) @ inverse
        total = own + inverse.mT @ extra.expand(self.n, -1, -1).sum(0) @ inverse
        values, axes = torch.linalg.eigh(_symmetric(total))
        for name, value in (("precisions", precisions.expand(self.n, -1, -1)), ("values", values), ("axes", axes)):
            self.register_buffer(name, value.contiguous())

    def _estimate(self, event: Sequence[int], samples: int, steps: int, seed: int) -> tuple[Tensor, float]:
        """Covariances of samples of the single posteriors, and the factor that makes their inverses unbiased."""
        D, parts = math.prod(event), []
        if samples < D + 4:
            raise ValueError(f"`samples` must be at least {D + 4} for {D} entries, got {samples}.")
        for j, (model, own) in enumerate(self._singles(torch.zeros(1))):
            one = model.given(**own) if own else model
            drawn = sample(one, (samples, *event), steps=steps, seed=seed + j)
            parts.append(torch.cov(drawn.double().flatten(1).mT).reshape(D, D))
        return torch.stack(parts), (samples - D - 2) / (samples - 1)


def _check_observations(observations: Mapping[str, Tensor] | None, needed: bool) -> dict[str, Tensor]:
    if not needed:
        if observations is not None:
            raise ValueError("`observations` must be None with a list of denoisers, each of which has its own.")
        return {}
    if not observations:
        raise ValueError('`observations` must name the conditions of the model, as in {"x": rows}, got none.')
    rows = {}
    for name, value in observations.items():
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) == 0:
            raise TypeError(f"`observations`[{name!r}] must be a tensor (n, ...), one row for each observation.")
        rows[name] = len(value)
    if len(set(rows.values())) > 1:
        raise ValueError(f"`observations` must have one number of rows, got {rows}.")
    return dict(observations)


def _jacobian(graph: Graph, x: Tensor) -> Tensor:
    """Jacobian ∂D/∂x of each row, (B, D, D), by one backward pass for each entry."""
    D = x[0].numel()
    rows = [graph.pull(_unit(x, i)).flatten(1) for i in range(D)]
    return torch.stack(rows, 1).double()


def _finite(matrix: Tensor) -> Tensor:
    """The matrices of a batch, with I for those that are not finite: their data prediction is not finite either."""
    whole = matrix.isfinite().all(-1).all(-1)[:, None, None]
    return torch.where(whole, matrix, torch.eye(matrix.shape[-1]).to(matrix))


def _inverse(matrix: Tensor, regular: Tensor, otherwise: Tensor) -> Tensor:
    """Inverse of the regular matrices of a batch, and another matrix for the rest."""
    safe = torch.where(regular[:, None, None], matrix, torch.eye(matrix.shape[-1]).to(matrix))
    return torch.where(regular[:, None, None], torch.linalg.inv(safe), otherwise)


def _column(c: float | Tensor, x: Tensor) -> Tensor:
    """A coefficient as a tensor that broadcasts to flat states, (1, 1) or (B, 1)."""
    return torch.as_tensor(c, dtype=x.dtype, device=x.device).reshape(-1, 1)


def _unit(x: Tensor, i: int) -> Tensor:
    flat = torch.zeros_like(x).flatten(1)
    flat[:, i] = 1
    return flat.reshape(x.shape)


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)


def _root(covariance: Tensor) -> Tensor:
    """A matrix L with L Lᵀ = C."""
    root: Tensor
    root, info = torch.linalg.cholesky_ex(_symmetric(covariance))
    if int(info) > 0:
        raise ValueError("`prior_covariance` must be positive definite: the prior has a direction without variance.")
    return root
