r"""Log-densities by the probability flow, relative to the flow of a Gaussian.

A Gaussian N(m, C) has the flow :math:`x_t = \alpha m + S_t y`, with :math:`S_t^2 = \alpha^2 C + \sigma^2 I` and
constant y. In this y, and in the angle :math:`c = \arctan(\sigma/\alpha s)`, :math:`s^2 = \mathrm{tr}\,C/D`, the flow
of any denoiser d depends only on its difference to the Gaussian's denoiser :math:`d_G`:

.. math::
    \frac{dy}{dc} = -\frac{\alpha^2 s^2 + \sigma^2}{\sigma s}\, S_t^{-1} (d - d_G)(x, t), \qquad
    \log p_0(x_0) = \log N(y_T; 0, I) - \log\det S_0
        - \int_{c_0}^{c_T} \frac{\alpha^2 s^2 + \sigma^2}{\sigma s}\,\mathrm{tr}\,\nabla_x (d - d_G)\,dc .

It is finite where α = 0, is the same on every process, and the Gaussian's part of the trace, which is known, is never
estimated. The state takes Dormand–Prince steps by :mod:`scoresde.integrators.loop`. An observer of the accepted steps
integrates the trace along their quartic interpolant :math:`\hat y`, with four Gauss–Legendre nodes on each step; the
trace does not influence the steps. One more evaluation, in the middle of a step, shows the defect of the interpolant
there, and the error of the step is at least a tenth of it, so that no narrow part of the flow is missed between stages.

The interpolant is not an exact solution. Along any path the density changes by

.. math::
    \frac{d}{dc} \log q_c(\hat y) = -\mathrm{tr}\,\nabla f
        + \left(\frac{d\hat y}{dc} - f\right) \cdot \nabla_y \log q_c, \qquad f = \frac{dy}{dc},

where q is the density of y. The second term is integrated too, with the score that the evaluation at the node gives. So
an error of the path changes the log-density only by its square, or by its product with the error of the score: the
difference between the score of a network and that of the density of its own flow. For networks that predict x0 the term
is left out, because their score has an error of order 1/σ².
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked, checked_with, words
from scoresde._numerics import legendre
from scoresde._progress import Bar
from scoresde.data import Standardize
from scoresde.denoisers.base import CONDITIONS, AbstractDenoiser, Counter
from scoresde.denoisers.distributed import unwrap_ddp
from scoresde.denoisers.gaussian import Gaussian, Marginal
from scoresde.denoisers.mixture import GaussianMixture
from scoresde.denoisers.modes import check_ready, warn_untrained
from scoresde.integrators.adaptive import progress
from scoresde.integrators.control import Control
from scoresde.integrators.dense import quartic
from scoresde.integrators.embedded import (
    Attempt,
    DormandPrince,
    EmbeddedRungeKutta,
    Evaluate,
    Parts,
    Past,
    Weigh,
    on_device,
    wide,
)
from scoresde.integrators.loop import Accepted, Equation, Run, integrate
from scoresde.integrators.method import Method, Problem, Solution
from scoresde.likelihood.confidence import Uncertain
from scoresde.likelihood.trace import Divergence, Probes, as_probes
from scoresde.noise.keyed import Noise, as_noise
from scoresde.noise.streams import Stream
from scoresde.processes.sde import SDE

PAIR = DormandPrince()

DEFECT = 0.1  # factor of the defect in the middle of a step in its error

SHARPEST = 1e-3  # σ/α at the smallest time of exact denoisers, in units of the standard deviation of the data

NODES = 4  # Gauss–Legendre nodes of the trace on each step


@checked
@dataclass(frozen=True)
class Tolerance:
    """Steps of the state.

    Arguments:
        rtol: Relative tolerance of a step, by default 1e-5; y is of order 1 whatever the scale of the data.
        atol: Absolute tolerance of a step, by default 1e-5.
        steps: Number of equal steps in c for all samples, instead of tolerances: six evaluations and four traces each,
            and nothing is read back from the device before the end.
        max_nfe: Number of evaluations that a sample may use for the steps of its state, by default 10 000.
    """

    rtol: float | None = None
    atol: float | None = None
    steps: int | None = None
    max_nfe: int | None = None

    def __post_init__(self) -> None:
        for name in ("rtol", "atol", "max_nfe"):
            value = getattr(self, name)
            if value is not None and self.steps is not None:
                raise ValueError(f"`{name}` has no meaning with `steps`, whose number is fixed; drop one of the two.")
            if value is not None and name != "max_nfe":
                check.number(name, value, above=0, below=1)
        if self.steps is not None:
            check.integer("steps", self.steps, at_least=1)
        if self.max_nfe is not None:
            check.integer("max_nfe", self.max_nfe, at_least=1)

    def control(self, span: float) -> Control:
        """Step control of an interval of length `span`."""
        return Control(
            rtol=1e-5 if self.rtol is None else self.rtol,
            atol=1e-5 if self.atol is None else self.atol,
            factors=(0.2, 5.0),
            first_step=span / 40,
            balance=False,
            max_nfe=10_000 if self.max_nfe is None else self.max_nfe,
            steps=self.steps or 0,
        )


@dataclass(frozen=True)
class LogProb(Uncertain):
    """Log-densities, and how they were computed; counts are on the CPU.

    Arguments:
        value: log p(x) in nats, in the scale of the given x, (B,).
        standard_error: Standard error of `value`, (B,): 0 for an exact trace, NaN for a single probe. With few probes
            it is uncertain itself; use :meth:`interval`.
        nfe: Number of states that went through the network for each sample, those at the nodes of the trace included
            and products with the Jacobian not, (B,).
        products: Number of products with the Jacobian for each sample, (B,).
        latent: State at T, (B, *event).
        prior: Log-density of the latent under the prior, (B,). An error of the prior is an error of `value`.
        truncation: Contribution of the interval below `t_min`, (B,): where it is large, `t_min` is too large for this
            density.
        seed: Seed of the probes.
        degrees: Degrees of freedom of `standard_error`, infinite for an exact trace.
    """

    value: Tensor
    standard_error: Tensor = field(repr=False)
    nfe: Tensor = field(repr=False)
    products: Tensor = field(repr=False)
    latent: Tensor = field(repr=False)
    prior: Tensor = field(repr=False)
    truncation: Tensor = field(repr=False)
    seed: int | tuple[int, ...] | None
    degrees: float = math.inf


# Hints for the keywords of other libraries.
WORDS = CONDITIONS | words("""
rtol atol tol: use `tolerance`, as in tolerance=Tolerance(rtol=1e-5)
steps num_steps n_steps max_nfe: use `tolerance`, as in tolerance=Tolerance(steps=100)
method solver: the solver is Dormand-Prince; use `tolerance` for its accuracy
trace divergence hutchinson exact n_probes noise_type: use `probes`, as in probes=Probes("hutchinson", n=4)
generator rng: use `seed`, an integer or a Noise
eps epsilon t_end: use `t_min`
""")


@checked_with(WORDS)
def log_prob(
    model: AbstractDenoiser,
    x: Tensor,
    *,
    probes: Probes | str = "exact",
    tolerance: Tolerance | None = None,
    reference: Gaussian | GaussianMixture | None = None,
    data_std: float | None = None,
    t_min: float | None = None,
    to_zero: bool = True,
    scale: Standardize | None = None,
    seed: int | Sequence[int] | Noise | None = None,
    grad: str = "off",
    progress: bool | str = False,
) -> LogProb:
    r"""Log-density of each sample in nats, by the probability flow from data to noise.

    Arguments:
        model: Denoiser. A network inside ``DistributedDataParallel`` is taken out of it, because ranks need different
            numbers of evaluations and would wait for each other forever.
        x: Data, (B, *event), in its own scale; the arithmetic is in its dtype, so give float64 for the last digits.
        probes: Computation of the trace: :class:`Probes`, or ``"exact"``, ``"hutchinson"`` or ``"hutch++"``.
        tolerance: Steps of the state, by default ``Tolerance(rtol=1e-5, atol=1e-5)``.
        reference: Gaussian close to the data, a :class:`Gaussian` or a mixture of one component. It gives the
            prior at T, and its part of the trace is not estimated. By default N(0, data_std² I).
        data_std: Standard deviation of that default, by default 1.
        t_min: Smallest time at which the denoiser is evaluated. The default for a network is that of the process, above
            which it was trained. Exact denoisers have no limit; their default is at most the time where σ/α is a
            thousandth of the standard deviation of `reference`.
        to_zero: Whether to carry the flow from `t_min` on to σ = 0, by a step that is exact to O(σ⁴). False: `x` is a
            state at `t_min`, noise included, and the density is that of p at `t_min`, which exists for all data.
        scale: Map of the data to the scale of the model; `x` is given before it, and its log-determinant is added.
        seed: Seed of the probes: an integer, one for each sample, or a :class:`Noise`.
        grad: ``"off"``, or ``"full"`` to differentiate in `x` and in the parameters of the network.
        progress: True for a progress bar in a terminal or notebook; ``"always"`` shows it everywhere.

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
    """
    check_ready(model)
    check.state("x", x)
    noise, counter = as_noise(seed), Counter()
    with torch.set_grad_enabled(check.gradient_mode(grad, ("off", "full")) == "full"):
        z = x if scale is None else scale(x)
        gaussian = reference_for(z, model.sde, reference, data_std)
        t_min = _smallest(model, gaussian, t_min)
        warn_untrained(model, t_min)
        flow = RelativeFlow.make(model.counted(counter), counter, gaussian, z, t_min, model.sde.T)
        solver = _Solver(flow, as_probes(probes).draw(z, noise.fork(Stream.PROBES)), tolerance or Tolerance(), to_zero)
        y = solver.at_data(z).whiten(z)
        end = solver.run(y, forward=True, show=progress)
        result = solver.result(end, end.y, z, scale, noise.seed)
    check.warn_unless_finite(result.value, "the log-densities")
    return result


@checked
@dataclass(frozen=True)
class FlowDensity(Method):
    """Samples of the probability flow with their log-densities, in one pass from noise to data.

    This is a method of ``ss.solve``; ``Solution.log_prob`` holds the :class:`LogProb`. The initial state is a sample of
    the prior that `reference` gives, or a given state at t_start. Where σ(t_end) = 0, the samples are data; otherwise
    they are states at t_end, and the density is that of p at t_end.

    Arguments:
        probes: Computation of the trace, as in :func:`log_prob`.
        tolerance: Steps of the state, as in :func:`log_prob`.
        reference: Gaussian close to the data, as in :func:`log_prob`; by default ``start.gaussian``, or else
            N(0, s² I) with the standard deviation ``start.data_std``.
        t_min: Smallest time at which the denoiser is evaluated, as in :func:`log_prob`.
        scale: Map of the data to the scale of the model; samples and densities are those before it.

    References:
        | FFJORD (Grathwohl et al., 2019), arXiv:1810.01367
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          arXiv:2011.13456

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.Flow(), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), std=0.3)
        >>> solution = ss.solve(mix, (4, 2), ss.likelihood.FlowDensity(), seed=0)
        >>> bool(((solution.log_prob.value - mix.log_prob(solution.x)).abs() < 1e-2).all())
        True
    """

    watches = ("progress",)

    probes: Probes | str = "exact"
    tolerance: Tolerance = field(default_factory=Tolerance)
    reference: Gaussian | GaussianMixture | None = None
    t_min: float | None = None
    scale: Standardize | None = None

    def __post_init__(self) -> None:
        as_probes(self.probes)
        if self.t_min is not None:
            check.number("t_min", self.t_min, above=0)

    def run(self, problem: Problem) -> Solution:
        sde, start, noise = problem.model.sde, problem.start, problem.noise
        first = sde.T if problem.t_start is None else check.number("t_start", problem.t_start, above=0, at_most=sde.T)
        last = check.number("t_end", problem.t_end, at_least=0, below=first)
        to_zero = sde.sigma(last) == 0
        if not to_zero and self.t_min is not None:
            raise ValueError("`t_min` has no meaning with a `t_end` where σ > 0; drop one of the two.")
        given = problem.shape_or_x
        x = check.state("x", given) if isinstance(given, Tensor) else start.normals(problem.model, given, noise)
        reference = start.gaussian if self.reference is None else self.reference
        std = None if start.data_std == 1 else start.data_std
        gaussian = reference_for(x, sde, reference, std)
        t_min = _smallest(problem.model, gaussian, self.t_min) if to_zero else last
        if to_zero:  # otherwise `solve` has warned
            warn_untrained(problem.model, t_min)
        flow = RelativeFlow.make(problem.model, problem.counter, gaussian, x, t_min, first)
        probes = as_probes(self.probes).draw(x, noise.fork(Stream.PROBES))
        solver = _Solver(flow, probes, self.tolerance, to_zero)
        y = flow.at(flow.last, x).whiten(x) if isinstance(given, Tensor) else x
        end = solver.run(y, forward=False, show=problem.watch.progress)
        z = solver.at_data(y).state(end.y)
        result = solver.result(end, y, z, self.scale, noise.seed)
        x = z if self.scale is None else self.scale.inverse(z)
        # Where the state is not finite, `solution` warns.
        known = z.isfinite().flatten(1).all(1)
        check.warn_unless_finite(result.value.where(known, torch.zeros_like(result.value)), "the log-densities")
        stats = None if end.run is None else end.run.stats
        return problem.solution(x, [first, last], stats=stats, log_prob=result)


def reference_for(
    x: Tensor, sde: SDE, reference: Gaussian | GaussianMixture | None, data_std: float | None
) -> Gaussian:
    """The Gaussian that a density is computed relative to.

    Arguments:
        x: States, (B, *event).
        sde: Process of the model.
        reference: Gaussian of the data, or a mixture of one component; None for N(0, data_std² I).
        data_std: Standard deviation of that default, None for 1.
    """
    if x.ndim < 2:
        raise ValueError(f"`x` must have shape (B, *event), got {tuple(x.shape)}; events of one number are (B, 1).")
    event = tuple(x.shape[1:])
    if reference is None:
        std = 1.0 if data_std is None else check.number("data_std", data_std, above=0)
        sde.prior(std=std)  # warns where data is visible at T
        return Gaussian(sde, torch.zeros(event), torch.full(event, std**2, dtype=torch.float64))
    if data_std is not None:
        raise ValueError("`data_std` has no meaning with `reference`, which has its own; drop one of the two.")
    if isinstance(reference, GaussianMixture) and len(reference.means) == 1:
        reference = reference.component()
    if not isinstance(reference, Gaussian):
        raise ValueError(
            "`reference` must be one Gaussian: a Gaussian, or a mixture of one component, as in "
            "ss.GaussianMixture(sde, mean[None], cov=cov[None])."
        )
    if reference.event != event:
        raise ValueError(f"`reference` has events of shape {reference.event}, `x` {event}.")
    if float(reference.spectrum[-1]) <= 0:
        raise ValueError("`reference` must have a positive definite covariance; without one it has no density.")
    return reference


def _smallest(model: AbstractDenoiser, gaussian: Gaussian, t_min: float | None) -> float:
    """Smallest time of an evaluation: networks are trained above that of the process, exact denoisers have no limit."""
    sde = model.sde
    if t_min is not None:
        return check.number("t_min", t_min, above=0, below=sde.T)
    if not model.kind.exact:
        return sde.t_min
    lam = -math.log(SHARPEST * float(gaussian.spectrum.double().mean().sqrt()))
    return min(sde.t_min, sde.t_of_lam(lam)) if lam < sde.lam(0.0) else sde.t_min


class _Point(NamedTuple):
    """The flow at one angle for each of b samples: time (b,), marginal of the Gaussian, factor of dy/dc, and α/σ²."""

    t: Tensor
    marginal: Marginal
    rate: Tensor
    weight: Tensor


@dataclass
class Tally:
    """Cost of each sample, (B,) on the CPU.

    Arguments:
        counter: Counter of network evaluations.
        nfe: Number of states that went through the network.
        traces: Number of traces.
    """

    counter: Counter
    nfe: Tensor
    traces: Tensor

    def add(self, samples: Tensor, before: int, evaluations: int = 1) -> None:
        """Count the states since the counter was at `before`, which belong to repeated evaluations of some samples."""
        self.nfe[samples] += math.ceil((self.counter.states - before) / max(1, evaluations * len(samples)))


@dataclass(frozen=True)
class RelativeFlow(Equation):
    """The probability flow of a denoiser in y and c.

    Arguments:
        model: Denoiser, whose evaluations are counted.
        gaussian: The Gaussian that defines y.
        s: Root of its mean variance.
        first: Angle at the smallest time.
        last: Angle at the largest time.
        samples: Numbers of the samples in the whole batch, (b,).
        tally: Cost of each sample.
    """

    model: AbstractDenoiser
    gaussian: Gaussian
    s: float
    first: float
    last: float
    samples: Tensor
    tally: Tally

    @property
    def scored(self) -> bool:
        """Whether the score of the model is good at all noise levels.

        The score has the error of the denoiser, divided by σ². Networks that predict x0 have an error that does not
        vanish with σ.
        """
        return self.model.kind.exact or self.model.kind.predicts != "x0"

    @classmethod
    def make(
        cls, model: AbstractDenoiser, counter: Counter, gaussian: Gaussian, x: Tensor, t_min: float, t_max: float
    ) -> RelativeFlow:
        """The flow of states like `x` between two times.

        Arguments:
            model: Denoiser, whose evaluations are counted.
            counter: The counter.
            gaussian: The Gaussian that defines y.
            x: States, (B, *event).
            t_min: Smallest time.
            t_max: Largest time.
        """
        s, sde = float(gaussian.spectrum.double().mean().sqrt()), model.sde
        gaussian = copy.deepcopy(gaussian).to(x)
        first, last = (math.atan2(sde.sigma(t), sde.alpha(t) * s) for t in (t_min, t_max))
        tally = Tally(counter, *torch.zeros(2, len(x), dtype=torch.int64))
        return cls(unwrap_ddp(model), gaussian, s, first, last, torch.arange(len(x)), tally)

    def rows(self, index: Tensor) -> RelativeFlow:
        return replace(self, model=self.model.rows(index), samples=self.samples[index])

    def time(self, u: Tensor) -> Tensor:
        sde = self.model.sde
        return sde.inverse_lam(-(self.s * u.tan().abs()).log()).clamp(0.0, sde.T)

    def point(self, c: Tensor, like: Tensor) -> _Point:
        """The flow at angles c, (b,), for states `like`."""
        t, sde = self.time(c), self.model.sde
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        rate = -(alpha**2 * self.s**2 + sigma**2) / (sigma * self.s)
        a, b, r, w, moved = on_device(torch.stack([alpha, sigma, rate, alpha / sigma**2, t]), like)
        return _Point(t if like.device.type == "cpu" else moved, self.gaussian.marginal(a, b), r, w)

    def at(self, c: float, like: Tensor) -> Marginal:
        """Marginal of the Gaussian at one angle."""
        return self.point(torch.full((len(like),), c, dtype=torch.float64), like).marginal

    def slopes(self, u: Tensor, y: Parts) -> Parts:
        at = self.point(u, y[0])
        x = at.marginal.state(y[0])
        before = self.tally.counter.states
        gap = self.model.x0(x, at.t) - at.marginal.denoise(x)
        self.tally.add(self.samples, before)
        return (wide(at.rate, x) * at.marginal.shrink(gap),)

    def trace(self, y: Tensor, c: Tensor, divergence: Divergence) -> Expansion:
        """The flow at one state of each sample.

        Arguments:
            y: State, (b, *event).
            c: Angles, (b,).
            divergence: Trace estimator of these samples.
        """
        at, evaluations = self.point(c, y), 0

        def gap(x: Tensor) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return self.model.x0(x, at.t) - at.marginal.denoise(x)

        before = self.tally.counter.states
        trace, value = divergence.with_value(gap, at.marginal.state(y))
        self.tally.add(self.samples, before, evaluations)
        self.tally.traces[self.samples] += 1
        return Expansion(y, at, value, at.rate * trace)


class _Watched(EmbeddedRungeKutta):
    """A pair whose error of a step is at least a part of the defect in its middle: h times the slope that is wrong."""

    @property
    def calls(self) -> int:
        return super().calls + 1

    def attempt(self, evaluate: Evaluate, weigh: Weigh, s: Tensor, t: Tensor, y: Parts, past: Past) -> Attempt:
        step = super().attempt(evaluate, weigh, s, t, y, past)
        h = t - s
        with torch.no_grad():
            middle, slope = quartic(h, y[0], step.y[0], step.stages, self.middle)(0.5)
            (f,) = evaluate(s + h / 2, (middle,))
            defect = DEFECT * wide(on_device(h, f), f) * (slope - f)
            return step._replace(error=torch.where(defect.abs() > step.error.abs(), defect, step.error))


WATCHED = _Watched(PAIR.a, PAIR.error, PAIR.of_order, PAIR.middle)


class Expansion(NamedTuple):
    """The flow at one state of each sample, and the trace of its Jacobian.

    Arguments:
        y: State, (b, *event).
        at: Time and marginal of the Gaussian.
        gap: Difference of the denoisers, d − d_G.
        trace: Estimates of the trace of ∇_y dy/dc, (K, b).
    """

    y: Tensor
    at: _Point
    gap: Tensor
    trace: Tensor

    @property
    def slope(self) -> Tensor:
        """The slope dy/dc."""
        return wide(self.at.rate, self.y) * self.at.marginal.shrink(self.gap)

    def along(self, slope: Tensor) -> Tensor:
        """Decrease of the log-density of y, −d log q/dc, along a path with another slope, (K, b).

        The score of y is S times that of x, which is the Gaussian's and α/σ² times the difference of the denoisers.

        Arguments:
            slope: Slope of the path, (b, *event).
        """
        marginal, beside = self.at.marginal, slope - self.slope
        score_of_gap = wide(self.at.weight, self.y) * marginal.grow(beside) * self.gap
        return self.trace - (score_of_gap - beside * self.y).flatten(1).sum(1)


class TraceIntegral:
    """Observer that integrates −d log q/dc over accepted steps, always in the direction from data to noise.

    Arguments:
        flow: Flow of the whole batch.
        divergence: Trace estimator of the whole batch.
        like: States of the whole batch.
    """

    def __init__(self, flow: RelativeFlow, divergence: Divergence, like: Tensor) -> None:
        self.whole = (flow, divergence)
        self.part, self.samples = self.whole, flow.samples
        self.value = like.new_zeros(divergence.samples, len(like))

    def __call__(self, step: Accepted) -> None:
        if not torch.equal(step.samples, self.samples):
            flow, divergence = self.whole
            every = len(step.samples) == len(flow.samples)
            self.samples = step.samples
            self.part = self.whole if every else (flow.rows(step.samples), divergence.rows(step.samples))
        flow, divergence = self.part
        h, (y0,), (y1,) = step.t - step.s, step.before, step.after
        path = quartic(h, y0, y1, step.stages, PAIR.middle)
        length = on_device(h.abs(), y0)
        total = torch.zeros_like(self.value[:, : len(h)])
        for at, weight in zip(*(v.tolist() for v in legendre(NODES)), strict=True):
            y, slope = path(at)
            here = flow.trace(y, step.s + at * h, divergence)
            total = total + weight * length * (here.along(slope) if flow.scored else here.trace)
        if self.part is self.whole:
            self.value = self.value + total
        else:
            self.value = self.value.index_add(1, step.samples.to(total.device, non_blocking=True), total)


class _End(NamedTuple):
    """End of a solve: state y, integral of the trace (K, B), its part below t_min, and the steps."""

    y: Tensor
    integral: Tensor
    below: Tensor
    run: Run | None


@dataclass(frozen=True)
class _Solver:
    """A flow, its trace, its steps, and whether it goes on to σ = 0."""

    flow: RelativeFlow
    divergence: Divergence
    tolerance: Tolerance
    to_zero: bool

    def run(self, y: Tensor, *, forward: bool, show: bool | str = False) -> _End:
        """Solve from data to noise, or back."""
        flow = self.flow
        total = TraceIntegral(flow, self.divergence, y)
        below = torch.zeros_like(total.value)
        if y.numel() == 0:
            return _End(y, below, below, None)
        if forward and self.to_zero:
            y, below = self._below(y, 1.0)
        start, end = (flow.first, flow.last) if forward else (flow.last, flow.first)
        u, v = (torch.full((len(y),), c, dtype=torch.float64) for c in (start, end))
        with Bar(show, 1.0, "flow density", "run") as bar:
            observers = [total, *(progress(bar, u, v) if show else ())]
            control = self.tolerance.control(abs(end - start))
            run = integrate(flow, y, u, v, PAIR if control.steps else WATCHED, control, observers=observers)
        (y,) = run.y
        if not forward and self.to_zero:
            y, below = self._below(y, -1.0)
        return _End(y, total.value + below, below, run)

    def _below(self, y: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        """Between σ = 0 and t_min: dy/dc is odd in c, so its mean is half its value at t_min, to O(c²)."""
        flow = self.flow
        c = torch.full((len(y),), flow.first, dtype=torch.float64)
        half, here = flow.first / 2, flow.trace(y, c, self.divergence)
        return y + sign * half * here.slope, half * here.trace

    def at_data(self, like: Tensor) -> Marginal:
        """Marginal of the Gaussian where the flow ends: data, or states at the smallest time."""
        return self.flow.gaussian.marginal(1.0, 0.0) if self.to_zero else self.flow.at(self.flow.first, like)

    def result(
        self, end: _End, y: Tensor, x: Tensor, scale: Standardize | None, seed: int | tuple[int, ...] | None
    ) -> LogProb:
        """Log-densities of data x whose state at the largest time is y."""
        flow, latent = self.flow, self.flow.at(self.flow.last, y)
        constant = y[0].numel() if len(y) else 0
        normal = -0.5 * (y.square().flatten(1).sum(1) + constant * math.log(2 * math.pi))
        value = normal - self.at_data(y).log_det() + end.integral.mean(0)
        if scale is not None:
            value = value + scale.log_det(x)
        return LogProb(
            value,
            self.divergence.standard_error(end.integral.detach()),
            flow.tally.nfe,
            flow.tally.traces * self.divergence.products(x),
            latent.state(y),
            normal - latent.log_det(),
            end.below.mean(0),
            seed,
            self.divergence.degrees,
        )
