r"""The reverse SDE with error control for each sample, unbiased: a rejected step keeps its Brownian path.

Whether a step is accepted depends on its noise. A method that draws new noise after a rejection keeps the small
increments, loses the large ones, and is biased. Here the noise of every attempt is an increment of one path, and a
shorter step uses the first part of the increment of the longer one. In the data prediction, with
:math:`h = \lambda_t - \lambda_s`, a step is

.. math::
    x^{(1)} &= \tfrac{\sigma_t}{\sigma_s} e^{-\eta^2 h} x_s - \alpha_t\,\mathrm{expm1}(-(1+\eta^2)h)\, d_s
               + \sigma_t e^{-\eta^2\lambda_t}\,(W(c_t) - W(c_s)), \qquad c = e^{2\eta^2\lambda}, \\
    x^{(2)} &= x^{(1)} + \alpha_t \left(1 + \tfrac{\mathrm{expm1}(-(1+\eta^2)h)}{(1+\eta^2)h}\right)
               (D(x^{(1)}, t) - d_s).

The noise is exact for any step. The error that is controlled is :math:`x^{(2)} - x^{(1)}`. The next step starts from
:math:`x^{(2)}` and :math:`D(x^{(1)}, t)`, so that an attempt costs one evaluation.

References:
    | Variable Step Size Control in the Numerical Solution of Stochastic Differential Equations (Gaines & Lyons, 1997),
      doi:10.1137/S0036139995286515
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._progress import Bar
from scoresde.denoisers.distributed import refuse_ddp
from scoresde.integrators.adaptive import check_tolerances, clean_stop, progress
from scoresde.integrators.control import Control
from scoresde.integrators.embedded import Attempt, Evaluate, Parts, Past, Scheme, Weigh, on_device, wide
from scoresde.integrators.loop import Equation, integrate
from scoresde.integrators.method import Method, Problem, Solution
from scoresde.noise.brownian import BrownianPath
from scoresde.processes.sde import SDE

LATTICE = 2.0**22  # number of possible ends of steps in a unit of λ


@checked
@dataclass(frozen=True)
class AdaptiveSDE(Method):
    r"""The reverse SDE with error control for each sample; a method of ``ss.solve``.

    .. math:: \mathrm{error} = \mathrm{rms}\,\frac{x^{(2)} - x^{(1)}}{\mathrm{atol} + \mathrm{rtol}
              \max(|x_s|, |x^{(2)}|)} \le \sqrt h

    Errors of steps add up like noise, so a share of √h each keeps their sum at the tolerance: where the tolerance
    limits the steps, the error on a path is proportional to it. Sample i takes the same steps in any batch.

    The steps make the samples too narrow. On Gaussian data, steps of the length `longest` reduce the standard deviation
    by 1.4 % at 0.15, 2.5 % at 0.2 and 12 % at 0.5, on every process: the bias is that of the step, of order h². The
    tolerance does not limit it where the standard deviation is small beside `atol`, so `longest` does.
    ``python experiments/adaptive.py --sde`` measures both. By default the standard deviation of data of 1, 0.6 and 0.1
    is too small by 0.2, 0.5 and 1.7 % at most, with 60 to 115 evaluations. With ``AdaptiveSDE(rtol=0.05, atol=0.05,
    longest=0.5)`` it is too small by 3 to 5, 6 to 10 and 12 %, with 21 to 39.

    A run starts by default at T, or just before T where α(T) = 0. Where σ(t_end) = 0, it stops at ``sde.t_min`` and
    returns E[x_0 | x] there, with one more evaluation; otherwise it returns the state at t_end.

    Arguments:
        eta: Noise level η: 1 for the reverse SDE, or another positive number; 0 for the flow.
        rtol: Relative tolerance of a step.
        atol: Absolute tolerance of a step, in units of the state.
        first_step: First step, in λ.
        longest: Longest step, in λ, which bounds the bias; in a much longer step, D may also change and change back
            without effect on the error.
        max_steps: Number of attempted steps, accepted or rejected, that a sample may take.

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.1)
        >>> solution = ss.solve(mix, (4, 1), ss.integrators.AdaptiveSDE(), seed=0)
        >>> bool(((solution.x.abs() - 1).abs() < 0.5).all()), bool(solution.stats.finished.all())
        (True, True)
    """

    grads = ("off", "full", "checkpoint")
    watches = ("progress",)

    eta: float = 1.0
    rtol: float = 0.02
    atol: float = 0.02
    first_step: float = 0.1
    longest: float = 0.15
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        check.number("eta", self.eta, at_least=0)
        check_tolerances(self.rtol, self.atol)
        check.number("longest", self.longest, above=0)
        check.number("first_step", self.first_step, above=0, at_most=self.longest)
        check.integer("max_steps", self.max_steps, at_least=1)

    @property
    def control(self) -> Control:
        """Tolerances, limits and gains, as :func:`~scoresde.integrators.loop.integrate` needs them."""
        return Control(
            self.rtol,
            self.atol,
            factors=(0.2, 3.0),
            first_step=self.first_step,
            lengths=(1 / LATTICE, self.longest),
            balance=False,
            lattice=LATTICE,
            max_nfe=1 + self.max_steps,
            limit=f"`max_steps` = {self.max_steps} attempts",
        )

    def run(self, problem: Problem) -> Solution:
        refuse_ddp(problem.model)
        sde = problem.model.sde
        start, end = _ends(sde, problem.t_start, problem.t_end)
        stop = clean_stop(sde, start, end)
        x = problem.draw(start)
        u, v = (torch.full((len(x),), sde.lam(t), dtype=torch.float64) for t in (start, stop))
        path = BrownianPath(problem.steps, x.shape, dtype=x.dtype, device=x.device)
        scheme = BrownianStep(sde, self.eta, path, torch.arange(len(x)))
        with Bar(problem.watch.progress, 1.0, "adaptive SDE", "run") as bar:
            run = integrate(
                DataEquation(problem, (start, stop)),
                (x, scheme.value(u)),
                u,
                v,
                scheme,
                self.control,
                observers=progress(bar, u, v) if problem.watch.progress else (),
            )
        x, stats = run.y[0], run.stats
        if stop != end:
            x, stats = problem.denoise(x, stop), replace(stats, nfe=stats.nfe + 1)
        return problem.solution(x, [start, end], stats=stats)


@dataclass(frozen=True)
class DataEquation(Equation):
    """Data predictions of a denoiser at clock λ.

    Arguments:
        problem: Problem with the denoiser and its gradient mode.
        ends: First and last time, which are used as they are, without rounding in λ.
    """

    problem: Problem
    ends: tuple[float, float]

    def slopes(self, u: Tensor, y: Parts) -> Parts:
        return (self.problem.denoise(y[0], on_device(self.time(u), y[0])),)

    def rows(self, index: Tensor) -> DataEquation:
        return replace(self, problem=replace(self.problem, model=self.problem.model.rows(index)))

    def time(self, u: Tensor) -> Tensor:
        sde = self.problem.model.sde
        t = sde.t_of_lam(u)
        for end in self.ends:
            t = torch.where(u == sde.lam(end), end, t)
        return t


@dataclass(frozen=True)
class BrownianStep(Scheme):
    """The step of the reverse SDE on given Brownian paths; the state is x and the path's value.

    Arguments:
        sde: Process.
        eta: Noise level η.
        path: Brownian paths of the whole batch.
        samples: Numbers of the samples in the whole batch, (b,).
    """

    sde: SDE
    eta: float
    path: BrownianPath
    samples: Tensor

    @property
    def order(self) -> int:
        return 1

    @property
    def calls(self) -> int:
        return 1

    def rows(self, index: Tensor) -> BrownianStep:
        return replace(self, samples=self.samples[index])

    def value(self, u: Tensor) -> Tensor:
        """Normalised values of the paths at clock λ, (b, *event)."""
        if self.eta == 0:
            return torch.zeros((len(u), *self.path.shape[1:]), dtype=self.path.dtype, device=self.path.device)
        return self.path.unit(self._time(u), self.samples.tolist())

    def attempt(self, evaluate: Evaluate, weigh: Weigh, s: Tensor, t: Tensor, y: Parts, past: Past) -> Attempt:
        (x, W_s), (d_s,), h = y, past.f[0], t - s
        alpha_s, alpha = self.sde.alpha(self.sde.t_of_lam(s)), self.sde.alpha(self.sde.t_of_lam(t))
        decay = (1 + self.eta**2) * h
        of_x = torch.exp(-decay) * alpha / alpha_s
        of_d = -alpha * torch.expm1(-decay)
        of_change = alpha * (1 + torch.expm1(-decay) / decay)
        std = alpha * (-t).exp() * (-torch.expm1(-2 * self.eta**2 * h)).sqrt()
        root = h.sqrt()
        weights = on_device(torch.stack([of_x, of_d, of_change, std, root]), x)
        of_x, of_d, of_change, std, root = (wide(w, x) for w in weights)
        x_1, W_t = of_x * x + of_d * d_s, W_s
        if self.eta > 0:
            W_t = self.value(t)
            x_1 = x_1 + std * self.path.between(self._time(s), self._time(t), W_s, W_t)
        (d_t,) = evaluate(t, (x_1, W_t))
        x_2 = x_1 + of_change * (d_t - d_s)
        return Attempt((x_2, W_t), (d_t,), (x_2 - x_1) / root, 1.0)

    def _time(self, u: Tensor) -> Tensor:
        """Time c of the Brownian path at clock λ."""
        return (2 * self.eta**2 * u).exp()


def _ends(sde: SDE, t_start: float | None, t_end: float) -> tuple[float, float]:
    """First and last time, where neither α nor, before the denoised state, σ vanishes."""
    last = sde.T if sde.alpha(sde.T) > 0 else (1 - 1e-3) * sde.T
    start = last if t_start is None else check.number("t_start", t_start, above=0, at_most=sde.T)
    if sde.alpha(start) == 0:
        raise ValueError(f"`t_start` = {start:g} has α = 0, where λ is infinite; start later, such as at {last:g}.")
    end = check.number("t_end", t_end, at_least=0, below=start)
    return start, end
