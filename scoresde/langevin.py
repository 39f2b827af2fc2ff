r"""Langevin dynamics at a noise level: annealed, and as the corrector of a predictor–corrector sampler.

.. math:: x' = x + \epsilon\,\nabla\log p_t(x) + \sqrt{2\epsilon}\, z

keeps the marginal p_t up to a bias that vanishes with ε: on a Gaussian of variance v its own stationary variance is
:math:`v / (1 - \epsilon/2v)`. With a fixed ε a step is affine, so annealed dynamics is a plan; with a step size that
depends on the state it is a hook.

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
    """Make `n` unadjusted Langevin steps at time `t`; `n` evaluations.

    Arguments:
        model: A denoiser.
        x: State, (B, *event).
        t: The noise level's time; σ must not vanish there.
        step: ε, a number or (B,); stable on a Gaussian of variance v below 2v, and σ(t)² is the least of these.
        n: Steps.
        seed: An integer, a :class:`Noise`, or None for a fresh one.
        **cond: Conditions, handed to the network.
    """
    check.conditions(cond, langevin)
    noise = seed if isinstance(seed, Noise) else Noise(seed)
    epsilon = check.expand(step, check.state("x", x), "step")
    for k in range(check.integer("n", n)):
        x = x + epsilon * model.score(x, t, **cond) + (2 * epsilon) ** 0.5 * noise.like(x, k)
    return x


@dataclass(frozen=True, eq=False)
class LangevinCorrector:
    r"""Langevin steps at every node, as the ``hook`` of :func:`scoresde.sampling.solve`, with any predictor.

    .. math:: \epsilon_b = 2\left(\mathrm{snr}\,\frac{\sqrt D}{|\nabla\log p_t(x_b)|}\right)^2 \le \sigma_t^2
              \quad\text{or}\quad \epsilon = \tfrac{r}{2}\,\sigma_t^2

    for each sample b by itself, where public code averages norms over the batch; √D, with D numbers in a sample,
    stands for the norm of the noise, which may not decide the step it is multiplied by. The order: the predictor steps
    to a node, then the corrector works there, and only then does the predictor ask the network at the node. The start
    is not corrected, and neither is σ = 0: the last leg denoises the last corrected state.

    The first form is for images. A step that depends on the state keeps p/ε, not p: on a Gaussian it inflates the
    variance by 1 + 2/D in the long run, however small its steps. Where that is more than the steps' own bias of
    1/(1 − snr²), in fewer than 2/snr² dimensions, the score's norm is taken for its largest expectation √D/σ instead,
    which makes it the second form with r = 4 snr². That keeps p.

    Arguments:
        model: A denoiser, usually the one that is solved.
        snr: Ratio of the steps' drift to their noise; 0.16 suits VP and VE on images.
        r: Instead: the step size over σ²/2, as in :class:`AnnealedLangevin`.
        steps: Steps at each node; each is an evaluation, which the solution's `nfe` does not count.
        seed: An integer, a :class:`Noise`, or None for a fresh one.
        start: Correct the start as well.
        cond: Conditions, handed to the network.

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
        """The state at a node, corrected."""
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
    r"""Annealed Langevin dynamics (NCSN): `n` steps at each noise level of the grid, from noise to data.

    .. math:: x' = x + \tfrac{a}{2}\nabla\log p_t(x) + \sqrt{a}\,z, \qquad a = r\,\sigma_t^2

    Between levels x/α is kept. A grid that ends at σ = 0 ends with E[x_0 | x] at its last level, which is the
    "denoising" that removes the noise of the last steps; one that ends at a positive time makes its steps there too.

    Arguments:
        n: Steps at each level.
        r: Step size over σ². The paper's ε is r σ_L² at its last level: 2e-5 with σ_L = 0.01 is r = 0.2.

    References:
        | Generative Modeling by Estimating Gradients of the Data Distribution (Song & Ermon, 2019), arXiv:1907.05600,
          algorithm 1
        | Adversarial score matching and improved sampling for image generation (Jolicoeur-Martineau et al., 2021),
          arXiv:2009.05475, on the denoising
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
        """None to speak of: more levels do not make its error vanish, smaller steps and more of them do."""
        return 0

    @property
    def stages(self) -> int:
        """Evaluations that one level costs."""
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
        """One Langevin step at the level of row `now`, then on to the level of t, x/α unchanged."""
        sde, s = tape.sde, tape.time(now)
        alpha, sigma = sde.alpha(s), sde.sigma(s)
        if not isinstance(alpha, Tensor) and alpha == 0:
            raise ValueError(
                f"`times` starts at t = {s:g}, where α = 0 and x/α says nothing; start a little before it."
            )
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
