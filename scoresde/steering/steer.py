r"""Steering: particles of any stochastic plan, weighted and resampled towards :math:`p(x_0)\,e^{r(x_0)}`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked_with, words
from scoresde._progress import Bar
from scoresde.denoisers.base import AbstractDenoiser, Counter, check_model, same_process
from scoresde.denoisers.gaussian import Gaussian
from scoresde.denoisers.modes import check_ready
from scoresde.denoisers.start import Start, as_start
from scoresde.grids.spacings import quadratic_vp
from scoresde.guidance.classifier import Graph, before_silence, gradient
from scoresde.noise.keyed import Noise, as_noise
from scoresde.noise.streams import Stream
from scoresde.plan.rows import Weight
from scoresde.plan.run import Pause, pauses
from scoresde.plan.table import Plan
from scoresde.solvers.rule import Solver
from scoresde.solvers.stochastic import SDEDPMSolverPP
from scoresde.steering.driven import Driven, added_score
from scoresde.steering.particles import Population, Steered
from scoresde.steering.potentials import Potential, Schedule, as_schedule
from scoresde.steering.resampling import Resampling, Rule, as_resampling

Seed = int | Sequence[int] | Noise | None

# Hints for the words of other doors and libraries.
WORDS = words("""
nfe steps num_steps n_steps num_inference_steps timesteps: use `grid`, a number of steps or a list of times
reward fn likelihood log_likelihood: use `potential`, as in potential=ss.steering.Reward(fn)
num_particles n_particles num_samples n_samples batch_size: use `particles`, the number of particles of each problem
generator rng random_state manual_seed: use `seed`, an integer or a Noise
device dtype: use `start`, as in start=ss.Start(device=..., dtype=...)
resampling resampler: use `resample`, as in resample="systematic"
""")


@checked_with(WORDS)
@torch.no_grad()
def steer(
    model: AbstractDenoiser,
    potential: Potential,
    shape_or_x: Sequence[int] | Tensor,
    solver: Solver | Plan | None = None,
    *,
    particles: int = 100,
    proposal: str | AbstractDenoiser | None = None,
    grid: int | Tensor | Sequence[float] | None = None,
    schedule: str | Schedule = "difference",
    resample: str | Rule | Resampling = "systematic",
    start: Start | Gaussian | None = None,
    seed: Seed = None,
    progress: bool | str = False,
) -> Steered:
    r"""Steer a model by a potential with sequential Monte Carlo.

    The target is :math:`p(x_0)\,e^{r(x_0)} / Z`, where p is the distribution of the samples of the plan. N particles
    run through the plan. At each evaluation of the network their weights are multiplied by

    .. math:: \frac{\text{plan}(x_s \mid x_{\ge t})}{\text{proposal}(x_s \mid x_{\ge t})}\;e^{H_s - H_t}, \qquad
              H_0 = r(x_0),

    with a log-potential H that depends on the path: by default the twist of the state, a guess of
    :math:`\log E[e^{r(x_0)} \mid x_t]`. If the weights are uneven, the particles are resampled. As N grows the result
    is exact, for any twist, schedule, proposal and rule; the estimate of Z is unbiased for any N.

    The proposal shifts the normals of the plan, so that plans with stages, with a memory or with several normals in a
    step can be steered too. Steps without fresh noise, as the last one, are those of the model.

    Arguments:
        model: Denoiser of p. Conditions belong to it, with one row for each problem.
        potential: Potential: a :class:`Reward`, a ``inverse.Likelihood``, or your own :class:`Potential`.
        shape_or_x: Shape (P, *event) of P independent problems, or their particles at the first time, (P, N, *event).
        solver: Stochastic solver or plan; by default SDE-DPM-Solver++ of order 2.
        particles: Number N of particles of each problem.
        proposal: Guidance of the particles: None, a denoiser such as ``ClassifierFree(model, ...)`` or
            ``inverse.MMPS(model, ...)``, or ``"gradient"`` for the gradient of the twist, through the network.
        grid: Decreasing times, or a number of steps, by default 50; a plan has its own.
        schedule: Log-potential of a path from its twists: ``"difference"`` for the last one; ``"max"`` for the sum over
            the steps of the largest so far; ``"sum"`` for that of the sum so far; or a :data:`Schedule`.
        resample: Rule of resampling: ``"systematic"``, ``"stratified"``, ``"residual"``, ``"multinomial"``, or a
            :class:`Resampling` with a threshold.
        start: Scale, dtype and device of the initial particles, as in ``ss.solve``.
        seed: Seed of the noise: an integer, one integer for each problem, or a :class:`Noise`.
        progress: True for a progress bar in a terminal or notebook; ``"always"`` shows it everywhere.

    Returns:
        A :class:`Steered`: particles, weights, log Z and its error, effective sample sizes and ancestry.

    References:
        | A General Framework for Inference-time Scaling and Steering of Diffusion Models (Singhal et al., 2025),
          arXiv:2501.06848
        | Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Wu et al., 2023),
          arXiv:2306.17775

    Example:
        >>> import torch, scoresde as ss
        >>> prior = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.2)
        >>> reward = ss.steering.Reward(lambda x: 2 * x[:, 0])
        >>> run = ss.steering.steer(prior, reward, (1, 1), particles=500, proposal="gradient", seed=0)
        >>> run.mean().shape, float(run.log_z_error) < 0.1
        (torch.Size([1, 1]), True)
    """
    check_ready(model)
    plan = plan_of(model, solver, grid)
    counter = Counter()
    x, noise, shape = begin(model, shape_or_x, particles, plan.rows[0].t, start, seed)
    index = torch.arange(shape[0], device=x.device).repeat_interleave(shape[1])
    evaluate = Evaluation(model, proposal, potential, index, counter)
    population = Population(*shape, as_resampling(resample), noise, x.device)
    normals = Driven(plan, noise.fork(Stream.STEPS), shape)
    with Bar(progress, len(plan.rows), "steering", "row") as bar:
        x = _run(plan, evaluate, x, normals, population, as_schedule(schedule), bar)
    log_value = evaluate.potential.log_value(x)
    if population.finite.problem() is not None:
        evaluate.blame()
    check.warn_unless_finite(x.unflatten(0, shape))
    out = Steered(
        x=x.unflatten(0, shape),
        nfe=-(-counter.states // max(1, len(x))),
        calls=counter.calls,
        times=plan.times,
        seed=noise.seed,
        plan=plan,
        log_potential=log_value.unflatten(0, shape),
        **population.result(),
    )
    object.__setattr__(out, "sde", model.sde)
    population.warn_if_collapsed()
    return out


def _run(
    plan: Plan, evaluate: Evaluation, x: Tensor, normals: Driven, population: Population, schedule: Schedule, bar: Bar
) -> Tensor:
    """Run the particles through the plan; return their last states."""
    stops = checkpoints(plan)[:: population.resampling.every]
    run = pauses(plan, x, normals)
    del x
    twists: Tensor | None = None
    log_h: Tensor | float = 0.0
    try:
        pause = next(run)
        while True:
            here = pause.row in stops
            x0, slope, twist = evaluate(pause.x, pause.t, twist=here)
            if here:
                assert twist is not None
                twists = twist[:, None] if twists is None else torch.cat([twists, twist[:, None]], dim=1)
                new = schedule(twists)
                population.add(_with(new - log_h, normals.take()), number(pause.t))
                log_h = new
                index = population.settle()
                if index is not None:
                    pause = _resampled(pause, index)
                    x0, twists, log_h = x0[index], twists[index], log_h[index]
                    slope = None if slope is None else slope[index]
                    normals.select(index)
                    run = pauses(plan, pause.x, normals, row=pause.row, stored=pause.stored)
                    next(run)
            normals.steer(pause.row, slope)
            bar.to(pause.row + 1)
            pause = run.send(x0)
    except StopIteration as end:
        last: Tensor = end.value
    bar.to(len(plan.rows))
    final = evaluate.potential.log_value(last)
    evaluate.record(last, final, plan.rows[-1].t)
    population.add(_with(final - log_h, normals.take()), number(plan.rows[-1].t))
    return last


class Evaluation:
    """One evaluation of everything that steering needs at a state.

    Arguments:
        model: Denoiser.
        proposal: Guided denoiser, ``"gradient"`` or None.
        potential: Potential.
        index: Problem of each particle, (P N,).
        counter: Counter of the evaluations.
    """

    def __init__(
        self,
        model: AbstractDenoiser,
        proposal: str | AbstractDenoiser | None,
        potential: Potential,
        index: Tensor,
        counter: Counter,
    ) -> None:
        if not isinstance(potential, Potential):
            raise TypeError(
                f"`potential` must be a Potential, such as Reward(function), got {type(potential).__name__}."
            )
        self.model = model.rows(index).counted(counter)
        self.potential = potential.rows(index)
        self.wrong: list[tuple[Tensor, Weight]] = []
        self.gradient = isinstance(proposal, str)
        self.proposal: AbstractDenoiser | None = None
        if isinstance(proposal, str):
            check.choice("proposal", proposal, ("gradient",))
        elif proposal is not None:
            same_process(model, check_model(proposal, "proposal"), "proposal")
            self.proposal = proposal.rows(index).counted(counter)

    def record(self, x0: Tensor, value: Tensor, t: Weight) -> None:
        """Record whether the potential is NaN or +∞, or its gradient not finite, for finite samples.

        Arguments:
            x0: Samples that the potential has seen, (P N, *event).
            value: Its values, (P N,), or its gradient, (P N, *event).
            t: Time.
        """
        bad = value.isnan() | (value == math.inf)
        self.wrong.append(((bad.flatten(1).any(1) if bad.ndim > 1 else bad) & x0.isfinite().flatten(1).all(1), t))

    def blame(self) -> None:
        """Raise an error that names the potential, if it was the first that was not finite."""
        for bad, t in self.wrong:
            if bool(bad.any()):
                raise ValueError(
                    f"`potential`, a {type(self.potential).__name__}, is NaN or +∞, or its gradient is, for "
                    f"{int(bad.sum())} of {len(bad)} particles at t = {number(t):g}, where the samples are finite; "
                    f"mend its function. −∞ is allowed and excludes a sample."
                )

    def __call__(self, x: Tensor, t: Weight, *, twist: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Data prediction, the score that the proposal adds, and the twist."""
        sde, potential = self.model.sde, self.potential
        if self.gradient:
            return self._by_gradient(x, t)
        x0 = self.model.x0(x, t)
        slope = None
        if self.proposal is not None:
            slope = added_score(sde.alpha(number(t)), sde.sigma(number(t)), self.proposal.x0(x, t) - x0)
        value = potential.twist(x, x0, t, sde) if twist else None
        if value is not None:
            self.record(x0, value, t)
        return x0, slope, value

    def _by_gradient(self, x: Tensor, t: Weight) -> tuple[Tensor, Tensor, Tensor]:
        sde, potential = self.model.sde, self.potential
        at = before_silence(sde, t)
        graph = Graph(self.model, x, at, {})
        x0 = graph.x0.detach()
        if potential.sees_state:
            slope = gradient(lambda z: potential.twist(z, x0, at, sde), x, self.model)
        else:
            slope = graph.pull(gradient(lambda z: potential.twist(x, z, at, sde), x0, self.model))
        if number(at) != number(t):
            x0 = self.model.x0(x, t)  # the model's own step, which the limit of the gradient must not change
        value = potential.twist(x, x0, t, sde)
        self.record(x0, value, t)
        self.record(x0, slope, t)
        return x0, slope, value


def plan_of(model: AbstractDenoiser, solver: Solver | Plan | None, grid: int | Tensor | Sequence[float] | None) -> Plan:
    """The plan of a run; raises an error if it draws no noise.

    Arguments:
        model: Denoiser.
        solver: Solver, plan or None.
        grid: Times, a number of steps, or None.
    """
    if isinstance(solver, Plan):
        if grid is not None:
            raise ValueError("a plan has its own grid; drop `grid`.")
        plan = solver
    else:
        count = 50 if grid is None else grid
        times = quadratic_vp(model.sde, check.integer("grid", count, at_least=1)) if check.is_integer(count) else count
        rule = SDEDPMSolverPP(2) if solver is None else solver
        plan = rule.plan(model.sde, times)  # type: ignore[arg-type]
    if not plan.stochastic:
        raise ValueError(
            f"`solver` must be stochastic, because its noise makes the particles differ, got "
            f"{plan.name or 'a plan'}; use SDEDPMSolverPP(), DDPM() or DDIM(eta=1)."
        )
    return plan


def begin(
    model: AbstractDenoiser,
    shape_or_x: Sequence[int] | Tensor,
    particles: int,
    t: Weight,
    start: Start | Gaussian | None,
    seed: Seed,
) -> tuple[Tensor, Noise, tuple[int, int]]:
    """Initial particles (P N, *event), the noise, and the pair (P, N).

    Arguments:
        model: Denoiser.
        shape_or_x: Shape (P, *event), or particles (P, N, *event).
        particles: Number N of particles.
        t: First time.
        start: Distribution of the initial particles.
        seed: Seed.
    """
    noise, start = as_noise(seed), as_start(start)
    check.integer("particles", particles, at_least=1)
    if isinstance(shape_or_x, Tensor):
        x = check.state("x", shape_or_x)
        if x.ndim < 3 or x.shape[1] != particles:
            raise ValueError(
                f"`shape_or_x` as a state must have shape (P, N, *event) with N = `particles` = {particles}, got "
                f"{tuple(x.shape)}."
            )
        return start.draw(model, x.flatten(0, 1), t, noise), noise, (x.shape[0], particles)
    problems, *event = check.shape("shape_or_x", shape_or_x)
    shape = (check.integer("shape_or_x", problems, at_least=1), particles)
    normals = start.normals(model, (*shape, *event), noise).flatten(0, 1)
    if start.gaussian is not None:
        return start.gaussian.carry(normals, number(t)), noise, shape
    prior = model.sde.prior(number(t), std=start.data_std)
    return prior.mean + prior.std * normals, noise, shape


def checkpoints(plan: Plan) -> list[int]:
    """The evaluated row of each node: the node itself, or the last prediction of its state before a corrector.

    Arguments:
        plan: Plan.
    """
    found, since = [], 0
    for r, row in enumerate(plan.rows):
        if row.node is None:
            continue
        at = [k for k in range(since, r + 1) if plan.rows[k].evaluates and number(plan.rows[k].t) == number(row.t)]
        found += at[-1:]
        since = r + 1
    return found


def number(t: Weight) -> float:
    """A time as a number; raises an error for one time of each sample."""
    if isinstance(t, Tensor) and t.ndim:
        raise ValueError("the plan has times of each sample, which particles cannot be resampled over; use one grid.")
    return float(t)


def _with(factor: Tensor, cost: Tensor | None) -> Tensor:
    return factor if cost is None else factor + cost


def _resampled(pause: Pause, index: Tensor) -> Pause:
    return pause._replace(x=pause.x[index], stored={k: v[index] for k, v in pause.stored.items()})
