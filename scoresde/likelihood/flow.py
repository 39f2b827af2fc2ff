r"""Log-densities by the probability flow, relative to a Gaussian that is known.

A Gaussian N(m, C) has the flow :math:`x_t = \alpha m + S_t y`, with :math:`S_t^2 = \alpha^2 C + \sigma^2 I` and y at
rest. In that y, and in the angle :math:`c = \arctan(\sigma/\alpha s)`, :math:`s^2 = \mathrm{tr}\,C/D`, the flow of any
denoiser d is what sets it apart from the Gaussian's denoiser :math:`d_G`:

.. math::
    \frac{dy}{dc} = -\frac{\alpha^2 s^2 + \sigma^2}{\sigma s}\, S_t^{-1} (d - d_G)(x, t), \qquad
    \log p_0(x_0) = \log N(y_T; 0, I) - \log\det S_0
        - \int_{c_0}^{c_T} \frac{\alpha^2 s^2 + \sigma^2}{\sigma s}\,\mathrm{tr}\,\nabla_x (d - d_G)\,dc .

It is finite where α = 0, is the same on every process, and the Gaussian's part of the trace, which is known, is never
estimated. The state takes Dormand–Prince steps, each sample its own; the trace is integrated afterwards along the
accepted steps' interpolant, by three Gauss–Legendre nodes on each, and does not steer the steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from scoresde import _checks as check
from scoresde.data import Standardize
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.distributed import unwrap_ddp
from scoresde.denoisers.mixture import GaussianMixture
from scoresde.integrators.loop import SolverError
from scoresde.likelihood.trace import Divergence
from scoresde.noise.keyed import Noise

_START, _PROBES = 0, 2  # streams of a seed; the first is that of samplers, so that their starts agree

# Dormand & Prince (1980): stages, error of the embedded rule, and the middle of the step (Shampine, 1986).
_A = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)

_ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)

_MIDDLE = (
    6025192743 / 60171106304,
    0,
    51252292925 / 130801643596,
    -2691868925 / 90256659456,
    187940372067 / 3189068634112,
    -1776094331 / 39487288512,
    11237099 / 470086768,
)

_GAUSS = ((0.5 - 0.15**0.5, 5 / 18), (0.5, 4 / 9), (0.5 + 0.15**0.5, 5 / 18))


@dataclass(frozen=True)
class LogProb:
    """Log-densities, and how they were found.

    Arguments:
        value: log p(x) in nats, in the scale that x was given in, (B,).
        standard_error: Of `value`, (B,): 0 for an exact trace, nan for a single probe, which cannot tell.
        nfe: Evaluations of the network for each sample, those at the nodes of the trace included, (B,).
        products: Products with its Jacobian for each sample, (B,).
        latent: The state at T, (B, *event).
        prior: Log-density of the latent under the prior, (B,). What the prior is wrong by, `value` is wrong by.
        truncation: What the leg below `t_min` adds, (B,): where it is not small, the density is not resolved there.
        seed: The seed of the probes.
    """

    value: Tensor
    standard_error: Tensor = field(repr=False)
    nfe: Tensor = field(repr=False)
    products: Tensor = field(repr=False)
    latent: Tensor = field(repr=False)
    prior: Tensor = field(repr=False)
    truncation: Tensor = field(repr=False)
    seed: int | tuple[int, ...] | None


def log_prob(
    model: AbstractDenoiser,
    x: Tensor,
    *,
    divergence: str = "exact",
    n_probes: int | None = None,
    probe: str | None = None,
    seed: int | Sequence[int] | Noise | None = None,
    reference: GaussianMixture | None = None,
    data_std: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    steps: int | None = None,
    t_min: float | None = None,
    to_zero: bool = True,
    scale: Standardize | None = None,
    autodiff: str = "reverse",
    chunk: int = 0,
    max_nfe: int | None = None,
    grad: str = "off",
    **cond: Any,
) -> LogProb:
    r"""Log-density of each sample in nats, by the probability flow from data to noise.

    Arguments:
        model: A denoiser. A network inside ``DistributedDataParallel`` is taken out of it: ranks need different numbers
            of evaluations, and would wait for each other for ever.
        x: Data, (B, *event), in its own scale; the arithmetic is in its dtype, so give float64 for the last digits.
        divergence: ``"exact"``, D products with the Jacobian at each node; ``"hutchinson"``, unbiased, `n_probes` of
            them; ``"hutch++"``, as many, better where few directions carry the trace.
        n_probes: How many products with the Jacobian an estimated trace takes, by default 8.
        probe: Of ``"hutchinson"``: ``"orthogonal"``, the default, ``"rademacher"`` or ``"gaussian"``.
        seed: Of the probes, which are kept through a solve: an integer, one for each sample, or a :class:`Noise`.
        reference: A Gaussian close to the data, as a mixture of one component under the model's process: it gives the
            prior at T, and its part of the trace is not estimated. By default N(0, data_std² I).
        data_std: Standard deviation of that default, by default 1.
        rtol: Tolerance of a step relative to y, of order 1 here whatever the scale of the data; by default 1e-5.
        atol: Its absolute tolerance, by default 1e-5; the error norm is each sample's own.
        steps: Instead of tolerances, this many equal steps in c for all samples: six evaluations each, no host waits.
        t_min: Smallest time that the network is asked at, by default that of the process.
        to_zero: Carry the flow from `t_min` on to σ = 0, by a leg that is exact to O(σ⁴). False: `x` is a state at
            `t_min`, noise included, and the density is that of p at `t_min`, which data without a density also has.
        scale: The map that the model's data went through; its log-determinant is added and `x` is given before it.
        autodiff: ``"reverse"``, ``"forward"`` or ``"loop"``, see :func:`jacobian_products`.
        chunk: How many Jacobian products go through the network in one call; 0 to choose by their size.
        max_nfe: Evaluations of the state's steps that a sample may take before an error says where it is, by default
            10 000.
        grad: ``"off"``, or ``"full"`` to differentiate in `x` and the network's parameters.
        **cond: Conditions, handed to the network.

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.Flow(), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), std=0.3)
        >>> x = mix.sample(4, seed=0)
        >>> bool(((ss.log_prob(mix, x).value - mix.log_prob(x)).abs() < 1e-3).all())
        True

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          arXiv:2011.13456, section 4.3
        | FFJORD (Grathwohl et al., 2019), arXiv:1810.01367
        | A family of embedded Runge-Kutta formulae (Dormand & Prince, 1980), doi:10.1016/0771-050X(80)90013-3
    """
    check.state("x", x)
    noise = seed if isinstance(seed, Noise) else Noise(seed)
    options: dict[str, Any] = {}
    options |= {"divergence": divergence, "n_probes": n_probes, "probe": probe, "autodiff": autodiff, "chunk": chunk}
    options |= {"reference": reference, "data_std": data_std, "t_min": t_min, "to_zero": to_zero}
    options |= {"rtol": rtol, "atol": atol, "steps": steps, "max_nfe": max_nfe}
    with torch.set_grad_enabled(check.choice("grad", grad, ("off", "full")) == "full"):
        z = x if scale is None else scale(x)
        flow, trace, tolerance = _ready(model, z, noise, **options, **cond)
        path = _integrate(flow, trace, flow.rest(z), forward=True, tolerance=tolerance)
        return _result(flow, trace, path, z, scale, noise, path.y)


def sample_with_log_prob(
    model: AbstractDenoiser,
    shape_or_x: Sequence[int] | Tensor,
    *,
    seed: int | Sequence[int] | Noise | None = None,
    scale: Standardize | None = None,
    grad: str = "off",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> tuple[Tensor, LogProb]:
    """Samples of the probability flow together with their log-densities, in one pass from noise to data.

    Arguments:
        model: A denoiser.
        shape_or_x: A shape (B, *event) to start from the prior, or states at T.
        seed: Of the start and the probes.
        scale: As for :func:`log_prob`; samples are given before it.
        grad: As for :func:`log_prob`; samples are differentiable too.
        dtype: Of the state, when a shape is given.
        device: Of the state, when a shape is given.
        **options: The others of :func:`log_prob`, and conditions.

    Returns:
        The samples, (B, *event) in the data's own scale, and their :class:`LogProb`.
    """
    noise = seed if isinstance(seed, Noise) else Noise(seed)
    with torch.set_grad_enabled(check.choice("grad", grad, ("off", "full")) == "full"):
        given = isinstance(shape_or_x, Tensor)
        if isinstance(shape_or_x, Tensor):
            start = check.state("x", shape_or_x)
        else:
            shape = tuple(check.integer("shape", n) for n in shape_or_x)
            start = noise.fork(_START).normal(shape, 0, dtype=dtype, device=device)
        flow, trace, tolerance = _ready(model, start, noise, **options)
        y = start.flatten(1)
        if given:
            y = flow.gaussian.rest(y, *flow.scales(flow.last, start))
        path = _integrate(flow, trace, y, forward=False, tolerance=tolerance)
        x = flow.state(path.y)
        result = _result(flow, trace, path, x, scale, noise, y)
        return (x if scale is None else scale.inverse(x)), result


def _ready(
    model: AbstractDenoiser,
    x: Tensor,
    noise: Noise,
    *,
    divergence: str = "exact",
    n_probes: int | None = None,
    probe: str | None = None,
    autodiff: str = "reverse",
    chunk: int = 0,
    reference: GaussianMixture | None = None,
    data_std: float | None = None,
    t_min: float | None = None,
    to_zero: bool = True,
    rtol: float | None = None,
    atol: float | None = None,
    steps: int | None = None,
    max_nfe: int | None = None,
    **cond: Any,
) -> tuple[_Flow, Divergence, _Tolerance]:
    """What is integrated, how its trace is taken, and in which steps: the options of :func:`log_prob`."""
    check.conditions(cond, log_prob)
    if divergence == "exact":
        _drop("with `divergence`='exact', which takes no probes", n_probes=n_probes, probe=probe)
    if divergence == "hutch++":
        _drop("with `divergence`='hutch++', which makes its own", probe=probe)
    if reference is not None:
        _drop("with `reference`, which has a deviation of its own", data_std=data_std)
    if steps is not None:
        _drop("with `steps`, which are as many as you say", rtol=rtol, atol=atol, max_nfe=max_nfe)
    flow = _Flow.make(model, x, reference, 1.0 if data_std is None else data_std, t_min, to_zero, cond)
    count, kind = 8 if n_probes is None else n_probes, "orthogonal" if probe is None else probe
    trace = Divergence.make(divergence, count, kind, noise.fork(_PROBES), x, autodiff, chunk)
    tolerance = _Tolerance(
        check.number("rtol", 1e-5 if rtol is None else rtol, above=0, below=1),
        check.number("atol", 1e-5 if atol is None else atol, above=0, below=1),
        0 if steps is None else check.integer("steps", steps, at_least=1),
        check.integer("max_nfe", 10_000 if max_nfe is None else max_nfe, at_least=1),
    )
    return flow, trace, tolerance


def _drop(because: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"`{name}` has no meaning {because}; drop one of the two.")


def _result(
    flow: _Flow, trace: Divergence, path: _Path, x: Tensor, scale: Standardize | None, noise: Noise, y_T: Tensor
) -> LogProb:
    alpha, sigma = flow.scales(flow.last, x)
    at_rest = -0.5 * (y_T.square().sum(1) + y_T.shape[1] * math.log(2 * math.pi))
    # The integral is of the trace of dy/dc, (K, B), from data to noise.
    integral, value = path.integral, at_rest - flow.log_det_at_data()
    value = value + integral.mean(0)
    if scale is not None:
        value = value + scale.log_det(x)
    return LogProb(
        value,
        trace.standard_error(integral.detach()),
        path.nfe,
        path.traces * trace.products(x),
        flow.gaussian.state(y_T, alpha, sigma).reshape(x.shape),
        at_rest - flow.gaussian.log_det(alpha, sigma),
        path.below.mean(0),
        noise.seed,
    )


@dataclass(frozen=True)
class _Gaussian:
    """N(m, C) with C = iso I + U diag(l) Uᵀ, and functions of its covariance; U = None stands for the identity."""

    mean: Tensor
    iso: Tensor
    spread: Tensor
    basis: Tensor | None

    @classmethod
    def make(cls, reference: GaussianMixture | None, std: float, x: Tensor) -> _Gaussian:
        if reference is None:
            zero = x.new_zeros(math.prod(x.shape[1:]))
            return cls(zero, x.new_tensor(check.number("data_std", std, above=0) ** 2), zero, None)
        if not isinstance(reference, GaussianMixture) or len(reference.means) != 1:
            raise ValueError(
                "`reference` must be one Gaussian, as in ss.GaussianMixture(sde, mean[None], cov=cov[None])."
            )
        if reference.event != tuple(x.shape[1:]):
            raise ValueError(f"`reference` has events of shape {reference.event}, `x` {tuple(x.shape[1:])}.")
        basis = reference.axes
        full = basis is None or basis.shape[1] == basis.shape[2]
        least = (
            float((reference.isotropic + reference.spectrum.amin(1)).min())
            if full
            else float(reference.isotropic.min())
        )
        if least <= 0:
            raise ValueError("`reference` must have a positive definite covariance, or it has no density.")
        return cls(
            reference.means[0].flatten().to(x),
            reference.isotropic[0].to(x),
            reference.spectrum[0].to(x),
            None if basis is None else basis[0].to(x),
        )

    @property
    def std(self) -> float:
        """s, the root of the mean variance."""
        return math.sqrt(float(self.iso + self.spread.sum() / len(self.mean)))

    def _apply(self, power: float, v: Tensor, alpha: Tensor, sigma: Tensor, gain: bool = False) -> Tensor:
        """(α²C + σ²)^power v, with a factor αC if `gain`; v is (B, D), α and σ (B, 1)."""

        def of(variance: Tensor) -> Tensor:
            out = (alpha**2 * variance + sigma**2) ** power
            return alpha * variance * out if gain else out

        along = of(self.iso + self.spread)
        if self.basis is None:
            return along * v
        y = v @ self.basis
        if self.basis.shape[0] == self.basis.shape[1]:
            return (along * y) @ self.basis.mT
        side = of(self.iso)
        return side * v + ((along - side) * y) @ self.basis.mT

    def denoise(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x], (B, D)."""
        return self.mean + self._apply(-1.0, x - alpha * self.mean, alpha, sigma, gain=True)

    def state(self, y: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x of y."""
        return alpha * self.mean + self._apply(0.5, y, alpha, sigma)

    def rest(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Y of x: the state in coordinates in which this Gaussian's flow stands still."""
        return self.slow(x - alpha * self.mean, alpha, sigma)

    def slow(self, v: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """S⁻¹ v."""
        return self._apply(-0.5, v, alpha, sigma)

    def log_det(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Log det S, (B,)."""
        along = (alpha**2 * (self.iso + self.spread) + sigma**2).log().sum(1)
        beside = len(self.mean) - len(self.spread)
        if beside:
            along = along + beside * (alpha**2 * self.iso + sigma**2).log()[:, 0]
        return 0.5 * along


@dataclass(frozen=True)
class _Flow:
    """The flow of a denoiser in y and c."""

    model: AbstractDenoiser
    cond: dict[str, Any]
    gaussian: _Gaussian
    s: float
    event: tuple[int, ...]
    first: float  # the angle at t_min
    last: float  # and at T
    to_zero: bool

    @classmethod
    def make(
        cls,
        model: AbstractDenoiser,
        x: Tensor,
        reference: GaussianMixture | None,
        data_std: float,
        t_min: float | None,
        to_zero: bool,
        cond: dict[str, Any],
    ) -> _Flow:
        if not isinstance(model, AbstractDenoiser):
            raise TypeError(
                f"`model` must be a denoiser, Denoiser(net, sde, predicts=...), got {type(model).__name__}."
            )
        if x.ndim < 2:
            raise ValueError(f"`x` must have shape (B, *event), got {tuple(x.shape)}; one number a row is (B, 1).")
        sde = model.sde
        t = sde.t_min if t_min is None else check.number("t_min", t_min, above=0, below=sde.T)
        gaussian = _Gaussian.make(reference, data_std, x)
        s = gaussian.std
        if reference is None:
            sde.prior(std=s)  # warns where data still shows at T
        first, last = (math.atan2(sde.sigma(u), sde.alpha(u) * s) for u in (t, sde.T))
        return cls(unwrap_ddp(model), cond, gaussian, s, tuple(x.shape[1:]), first, last, to_zero)

    def time(self, c: Tensor) -> Tensor:
        """The time at which σ/α = s tan c."""
        sde = self.model.sde
        # π/2, where α = 0, rounds up in float32, and its tangent is then negative
        return sde.inverse_lam(-(self.s * c.tan().abs()).log()).clamp(0.0, sde.T)

    def scales(self, c: float | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at the angle c as columns, (B, 1)."""
        at = torch.full((len(like),), c, dtype=like.dtype, device=like.device) if isinstance(c, float) else c
        t = self.time(at)
        return self.model.sde.alpha(t)[:, None], self.model.sde.sigma(t)[:, None]

    def rest(self, x: Tensor) -> Tensor:
        """Y of data, or of a state at t_min."""
        return self.gaussian.rest(x.flatten(1), *self._data_scales(x))

    def state(self, y: Tensor) -> Tensor:
        """Data, or a state at t_min."""
        return self.gaussian.state(y, *self._data_scales(y)).reshape(len(y), *self.event)

    def log_det_at_data(self) -> Tensor:
        """Log det S where the flow ends."""
        like = self.gaussian.mean.new_empty(1)
        return self.gaussian.log_det(*self._data_scales(like))

    def _data_scales(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.to_zero:
            one = like.new_ones(len(like), 1)
            return one, torch.zeros_like(one)
        return self.scales(self.first, like)

    def rows(self, rows: Tensor, of: int) -> _Flow:
        """For some of the rows of a batch of `of`."""

        def take(leaf: Any) -> Any:
            return leaf[rows] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == of > 1 else leaf

        cond = tree_map(take, self.cond)
        return _Flow(self.model, cond, self.gaussian, self.s, self.event, self.first, self.last, self.to_zero)

    def velocity(self, y: Tensor, c: Tensor) -> Tensor:
        """dy/dc, (B, D); one evaluation."""
        t = self.time(c)
        alpha, sigma = self.model.sde.alpha(t)[:, None], self.model.sde.sigma(t)[:, None]
        x = self.gaussian.state(y, alpha, sigma)
        return -self._rate(alpha, sigma) * self.gaussian.slow(self._apart(x, t, alpha, sigma), alpha, sigma)

    def trace(self, y: Tensor, c: Tensor, divergence: Divergence) -> Tensor:
        """tr ∇_y dy/dc, (K, B)."""
        t = self.time(c)
        alpha, sigma = self.model.sde.alpha(t)[:, None], self.model.sde.sigma(t)[:, None]
        x = self.gaussian.state(y, alpha, sigma).reshape(len(y), *self.event)

        def apart(x: Tensor) -> Tensor:
            return self._apart(x.flatten(1), t, alpha, sigma).reshape(x.shape)

        return -self._rate(alpha, sigma)[:, 0] * divergence(apart, x)

    def _apart(self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the denoiser says beyond the Gaussian's, (B, D)."""
        d = self.model.x0(x.reshape(len(x), *self.event), t, **self.cond).flatten(1)
        return d - self.gaussian.denoise(x, alpha, sigma)

    def _rate(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha**2 * self.s**2 + sigma**2) / (sigma * self.s)


@dataclass
class _Path:
    """Where a solve is: a state for each sample, the integral of the trace and what it cost."""

    y: Tensor
    integral: Tensor  # (K, B), always from data to noise
    below: Tensor  # the part of it below t_min
    nfe: Tensor
    traces: Tensor


@dataclass(frozen=True)
class _Tolerance:
    rtol: float
    atol: float
    steps: int
    max_nfe: int

    def error(self, e: Tensor, y0: Tensor, y1: Tensor) -> Tensor:
        """Root mean square of each sample's error in units of what is allowed, (B,)."""
        scaled = e / (self.atol + self.rtol * torch.maximum(y0.abs(), y1.abs()))
        return scaled.detach().square().mean(1).sqrt()


def _integrate(flow: _Flow, divergence: Divergence, y: Tensor, forward: bool, tolerance: _Tolerance) -> _Path:
    B = len(y)
    zero = y.new_zeros(divergence.samples, B)
    count = torch.zeros(B, dtype=torch.int64, device=y.device)
    path = _Path(y, zero, zero, count, count)
    if B == 0 or y.shape[1] == 0:
        return path
    if forward and flow.to_zero:
        path = _leg_below(flow, divergence, path, 1.0)
    ends = (flow.first, flow.last) if forward else (flow.last, flow.first)
    path = _steps(flow, divergence, path, *ends, tolerance)
    if not forward and flow.to_zero:
        path = _leg_below(flow, divergence, path, -1.0)
    return path


def _leg_below(flow: _Flow, divergence: Divergence, path: _Path, sign: float) -> _Path:
    """Between σ = 0 and t_min: dy/dc is odd in c, so half its value at the end of the leg is its mean, to O(c²)."""
    c = path.y.new_full((len(path.y),), flow.first)
    half = flow.first / 2
    below = half * flow.trace(path.y, c, divergence)
    y = path.y + sign * half * flow.velocity(path.y, c)
    return _Path(y, path.integral + below, below, path.nfe + 2, path.traces + 1)


def _steps(flow: _Flow, divergence: Divergence, path: _Path, start: float, end: float, tolerance: _Tolerance) -> _Path:
    """Dormand–Prince from the angle `start` to `end`; finished samples leave the batch."""
    B, span = len(path.y), end - start
    y, rows = path.y, torch.arange(B, device=path.y.device)
    c = y.new_full((B,), start)
    h = torch.full_like(c, span / (tolerance.steps or 40))
    integral, nfe, traces = path.integral, path.nfe + 1, path.traces
    part, trace = flow, divergence
    k1 = part.velocity(y, c)
    done: list[tuple[Tensor, Tensor]] = []
    for turn in range(tolerance.steps or tolerance.max_nfe):
        last = (end - c).abs() <= h.abs() * (1 + 1e-6)
        h = torch.where(last, end - c, h)
        y1, k, error = _dormand_prince(part, y, c, h, k1)
        nfe = nfe.index_add(0, rows, torch.full_like(rows, 6))
        if tolerance.steps:
            integral = integral + math.copysign(1.0, span) * _quadrature(part, trace, y, y1, c, h, k)
            nfe, traces = nfe + 3, traces + 3
            y, k1, c = y1, k[-1], c + h
            continue
        size = tolerance.error(error, y, y1)
        _alive(flow, c, h, size, rows, turn, tolerance, span)
        ok = size <= 1
        if bool(ok.any()):
            at = ok.nonzero()[:, 0]
            some = part.rows(at, len(rows))
            add = _quadrature(some, trace.rows(at), y[at], y1[at], c[at], h[at], [ki[at] for ki in k])
            integral = integral.index_add(1, rows[at], math.copysign(1.0, span) * add)
            nfe, traces = (n.index_add(0, rows[at], torch.full_like(at, 3)) for n in (nfe, traces))
        y, k1 = torch.where(ok[:, None], y1, y), torch.where(ok[:, None], k[-1], k1)
        c = torch.where(ok, c + h, c)
        h = h * (0.9 * size.clamp_min(1e-10) ** -0.2).clamp(0.2, 5.0)
        finished = ok & last
        if bool(finished.any()):
            done.append((rows[finished], y[finished]))
            stay = (~finished).nonzero()[:, 0]
            part, trace = part.rows(stay, len(rows)), trace.rows(stay)
            rows, y, k1, c, h = rows[stay], y[stay], k1[stay], c[stay], h[stay]
            if not len(rows):
                order = torch.cat([r for r, _ in done]).argsort()
                return _Path(torch.cat([v for _, v in done])[order], integral, path.below, nfe, traces)
    return _Path(y, integral, path.below, nfe, traces)


def _dormand_prince(flow: _Flow, y: Tensor, c: Tensor, h: Tensor, k1: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """One step: the new state, the slopes of the stages, and an estimate of the error."""
    k, x = [k1], y
    for row in _A[1:]:
        x = y + h[:, None] * _sum(row, k)
        k.append(flow.velocity(x, c + sum(row) * h))
    return x, k, h[:, None] * _sum(_ERROR, k)


def _quadrature(
    flow: _Flow, trace: Divergence, y0: Tensor, y1: Tensor, c: Tensor, h: Tensor, k: list[Tensor]
) -> Tensor:
    """∫ tr over one step along the quartic through its ends, their slopes and the middle, (K, B)."""
    width = h[:, None]
    middle = y0 + width * _sum(_MIDDLE, k)
    f0, f1 = width * k[0], width * k[-1]
    a4 = 2 * (f1 - f0) - 8 * (y1 + y0) + 16 * middle
    a3 = 5 * f0 - 3 * f1 + 18 * y0 + 14 * y1 - 32 * middle
    a2 = f1 - 4 * f0 - 11 * y0 - 5 * y1 + 16 * middle
    total = y0.new_zeros(trace.samples, len(y0))
    for u, weight in _GAUSS:
        total = total + weight * h * flow.trace((((a4 * u + a3) * u + a2) * u + f0) * u + y0, c + u * h, trace)
    return total


def _sum(weights: Sequence[float], slopes: list[Tensor]) -> Tensor:
    total = weights[0] * slopes[0]
    for w, k in zip(weights[1:], slopes[1:], strict=False):
        if w:
            total = torch.add(total, k, alpha=w)
    return total


def _alive(
    flow: _Flow, c: Tensor, h: Tensor, size: Tensor, rows: Tensor, turn: int, tolerance: _Tolerance, span: float
) -> None:
    """Raise where no further step can help."""
    bad = ~size.isfinite()
    spent = 6 * (turn + 1) + 1
    tiny = h.abs() < 1e-9 * abs(span)
    for wrong, what in ((bad, "is not finite"), (tiny & (size > 1), "asks for steps below rounding")):
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0, 0])
            raise SolverError(
                f"the flow {what}; check the network there with Denoiser(..., check_finite=True), or loosen `rtol`.",
                t=float(flow.time(c[i : i + 1])[0]),
                dt=float(h.expand(len(c))[i]),
                nfe=spent,
                worst_sample=int(rows[i]),
                finite=not bool(bad[i]),
            )
    if spent + 6 > tolerance.max_nfe:
        raise SolverError(
            f"{len(rows)} of the samples have not finished after `max_nfe` = {tolerance.max_nfe} evaluations; "
            f"raise it, or loosen `rtol` and `atol`.",
            t=float(flow.time(c)[0]),
            dt=float(h.expand(len(c))[0]),
            nfe=spent,
            worst_sample=int(rows[0]),
            finite=True,
        )
