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

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.noise.keyed import Noise


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
    r"""Langevin corrector: a ``hook`` of :func:`solve` that runs Langevin steps at every node.

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
        check.integer("steps", self.steps, at_least=1)
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


def _clean(model: AbstractDenoiser, t: Any) -> bool:
    sigma = model.sde.sigma(t)
    return bool((sigma == 0).any()) if isinstance(sigma, Tensor) else sigma == 0
