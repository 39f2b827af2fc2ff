r"""Langevin dynamics at a fixed noise level, annealed Langevin dynamics, and the corrector of predictor–corrector.

.. math:: x' = x + \epsilon\,\nabla\log p_t(x) + \sqrt{2\epsilon}\, z

preserves p_t up to a bias that vanishes with ε: for a Gaussian of variance v, the stationary variance is
:math:`v / (1 - \epsilon/2v)`. Annealed dynamics has a fixed ε and is a :class:`Solver`; the corrector's ε may depend on
the state, so the corrector is a hook.

References:
    | Generative Modeling by Estimating Gradients of the Data Distribution (Song & Ermon, 2019), arXiv:1907.05600
    | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021), arXiv:2011.13456
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.denoiser import AbstractDenoiser
from scoresde.noise import Noise
from scoresde.plan import Weight
from scoresde.solvers.base import Solver
from scoresde.tape import Tape


def langevin(
    model: AbstractDenoiser,
    x: Tensor,
    t: float,
    step: float | Tensor,
    n: int = 1,
    *,
    seed: int | Noise | None = None,
    **cond: Any,
) -> Tensor:
    """Run `n` unadjusted Langevin steps at time `t`, with `n` evaluations.

    Arguments:
        model: A denoiser.
        x: State, (B, *event).
        t: Time of the noise level, with σ(t) > 0.
        step: Step size ε, a number or (B,); for a Gaussian of variance v ≥ σ(t)² the step is stable if ε < 2v.
        n: Number of steps.
        seed: Integer, :class:`Noise`, or None for a random seed.
        **cond: Conditions for the network.
    """
    check.conditions(cond, langevin)
    noise = seed if isinstance(seed, Noise) else Noise(seed)
    epsilon = check.expand(step, check.state("x", x), "step")
    for k in range(check.integer("n", n)):
        x = x + epsilon * model.score(x, t, **cond) + (2 * epsilon) ** 0.5 * noise.like(x, k)
    return x


@dataclass(frozen=True, eq=False)
class LangevinCorrector:
    r"""Langevin corrector: a ``hook`` of :func:`scoresde.sampling.solve` that runs Langevin steps at every node.

    .. math:: \epsilon_b = 2\left(\mathrm{snr}\,\frac{\sqrt D}{|\nabla\log p_t(x_b)|}\right)^2 \le \sigma_t^2
              \quad\text{or}\quad \epsilon = \tfrac{r}{2}\,\sigma_t^2

    The step size is set for each sample b; the authors' code averages norms over the batch. D is the number of entries
    of a sample, and √D replaces the norm of the noise, because ε must not depend on the noise it multiplies. At each
    node the solver steps, the corrector runs, and the solver then evaluates the network at the corrected state. The
    corrector skips σ = 0 and, by default, the start.

    The first form, with `snr`, is for images. Its ε depends on the state, so the stationary density is p/ε, not p: for
    a Gaussian, the variance grows by 1 + 2/D for any step size. In fewer than 2/snr² dimensions this error exceeds the
    discretisation bias 1/(1 − snr²). There |∇log p| is replaced by √D/σ, the square root of the largest possible
    E|∇log p|², which is the second form with r = 4 snr².

    Arguments:
        model: A denoiser, usually the one that is sampled.
        snr: Ratio of the drift to the noise of a step; 0.16 suits VP and VE on images.
        r: Step size ε in units of σ²/2, as in :class:`AnnealedLangevin`; if given, `snr` is not used.
        steps: Number of steps at each node; each needs one evaluation, which is not counted in `nfe` of the solution.
        seed: Integer, :class:`Noise`, or None for a random seed.
        start: Correct the start too.
        cond: Conditions for the network.

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.1)
        >>> corrector = LangevinCorrector(mix, snr=0.1, seed=1)
        >>> ss.sample(mix, (4, 1), ss.DDIM(), steps=10, seed=0, hook=corrector).shape
        torch.Size([4, 1])
    """

    model: AbstractDenoiser
    snr: float = 0.16
    r: float | None = None
    steps: int = 1
    seed: int | Noise | None = None
    start: bool = False
    cond: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check.number("snr", self.snr, above=0)
        check.integer("steps", self.steps, least=1)
        if self.r is not None:
            check.number("r", self.r, above=0, below=4)
        if not isinstance(self.seed, Noise):
            object.__setattr__(self, "seed", Noise(self.seed))

    def __call__(self, node: int, t: Any, x: Tensor) -> Tensor:
        """Run the corrector at one node and return the new state."""
        if (node == 0 and not self.start) or _clean(self.model, t):
            return x
        assert isinstance(self.seed, Noise)
        for k in range(self.steps):
            z = self.seed.like(x, node * self.steps + k)
            score = self.model.score(x, t, **self.cond)
            epsilon = check.expand(self._step_size(t, score), x)
            x = x + epsilon * score + (2 * epsilon) ** 0.5 * z
        return x

    def _step_size(self, t: Any, score: Tensor) -> float | Tensor:
        sigma2: float | Tensor = self.model.sde.sigma(t) ** 2
        rows = score.flatten(1) if score.ndim > 1 else score[:, None]
        D = rows.shape[1]
        if self.r is not None or D * self.snr**2 < 2:
            return (2 * self.snr**2 if self.r is None else self.r / 2) * sigma2
        return torch.minimum(2 * self.snr**2 * D / rows.square().sum(1), torch.as_tensor(sigma2).to(rows))


@dataclass(frozen=True, repr=False)
class AnnealedLangevin(Solver):
    r"""Annealed Langevin dynamics (NCSN): `n` Langevin steps at each noise level of the grid.

    .. math:: x' = x + \tfrac{a}{2}\nabla\log p_t(x) + \sqrt{a}\,z, \qquad a = r\,\sigma_t^2

    Between two levels x/α does not change. If the grid ends at σ = 0, the result is E[x_0 | x] at the last level with
    σ > 0 (the denoising step); otherwise the solver runs `n` steps at the last time too.

    Arguments:
        n: Number of steps at each level.
        r: Step size a in units of σ². The paper's ε is r σ_L² at the last level: 2e-5 with σ_L = 0.01 is r = 0.2.

    References:
        | Generative Modeling by Estimating Gradients of the Data Distribution (Song & Ermon, 2019), arXiv:1907.05600,
          algorithm 1
        | Adversarial score matching and improved sampling for image generation (Jolicoeur-Martineau et al., 2021),
          arXiv:2009.05475, on the denoising step
    """

    n: int = 10
    r: float = 0.2

    def __post_init__(self) -> None:
        check.integer("n", self.n, least=1)
        check.number("r", self.r, above=0, below=4)

    def __repr__(self) -> str:
        return f"AnnealedLangevin(n={self.n}, r={self.r:g})"

    @property
    def declared_order(self) -> int:
        """Order 0: the error does not vanish with more levels, only with more and smaller steps at each level."""
        return 0

    @property
    def stages(self) -> int:
        """Number of evaluations at each level."""
        return self.n

    def _leg(self, tape: Tape, now: int, history: list[int], t: Weight, asks: bool, node: int) -> tuple[int, list[int]]:
        sde, s = tape.sde, tape.time(now)
        sigma = sde.sigma(t)
        clean = bool((sigma == 0).all()) if isinstance(sigma, Tensor) else sigma == 0
        for _ in range(self.n - 1):
            now = self._step(tape, now, s)
        if clean:
            now = self._step(tape, now, s)
            now = tape.append(t, d=[(now, sde.alpha(t))], evaluates=False, node=node, note="denoise")
        elif asks:
            now = self._step(tape, now, t, node=node)
        else:
            now = self._step(tape, now, t)
            for _ in range(self.n - 1):
                now = self._step(tape, now, t)
            now = self._step(tape, now, t, evaluates=False, node=node)
        return now, [now]

    def _step(self, tape: Tape, now: int, t: Weight, *, evaluates: bool = True, node: int | None = None) -> int:
        """Append one Langevin step at the level of row `now`, followed by a rescaling to the level of t."""
        sde, s = tape.sde, tape.time(now)
        alpha, sigma = sde.alpha(s), sde.sigma(s)
        if not isinstance(alpha, Tensor) and alpha == 0:
            raise ValueError(f"the grid starts at t = {s:g}, where α = 0 and x/α is undefined; start at a smaller t.")
        scale = sde.alpha(t) / alpha
        return tape.append(
            t,
            x=[(now, scale * (1 - self.r / 2))],
            d=[(now, scale * self.r / 2 * alpha)],
            z=[(tape.draw(), scale * math.sqrt(self.r) * sigma)],
            evaluates=evaluates,
            node=node,
            note="Langevin",
        )


def _clean(model: AbstractDenoiser, t: Any) -> bool:
    sigma = model.sde.sigma(t)
    return bool((sigma == 0).any()) if isinstance(sigma, Tensor) else sigma == 0
