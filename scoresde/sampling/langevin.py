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

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser, check_model, same_process
from scoresde.denoisers.modes import check_ready
from scoresde.noise.keyed import Noise, as_noise


@checked
def langevin(
    model: AbstractDenoiser,
    x: Tensor,
    t: float,
    step: float | Tensor,
    n: int = 1,
    *,
    seed: int | Noise | None = None,
) -> Tensor:
    """Run `n` unadjusted Langevin steps at time `t`, with `n` evaluations.

    Arguments:
        model: Denoiser; conditions belong to it, as in ``model.given(label=y)``.
        x: State, (B, *event).
        t: Time of the noise level, with σ(t) > 0.
        step: Step size ε, a number or (B,); for a Gaussian of variance v ≥ σ(t)² the step is stable if ε < 2v.
        n: Number of steps.
        seed: Integer, :class:`Noise`, or None for a random seed.
    """
    noise = as_noise(seed)
    check_ready(model)
    epsilon = check.expand(step, check.state("x", x), "step")
    finite = check.Finite("the states")
    for k in range(check.integer("n", n)):
        x = x + epsilon * model.score(x, t) + (2 * epsilon) ** 0.5 * noise.like(x, k)
    finite.add(x, t)
    finite.warn()
    return x


@checked
@dataclass(frozen=True, eq=False)
class LangevinCorrector:
    r"""Langevin corrector: a hook of :func:`solve` that runs Langevin steps at every node.

    .. math:: \epsilon_b = 2\left(\mathrm{snr}\,\frac{\sqrt D}{|\nabla\log p_t(x_b)|}\right)^2 \le \sigma_t^2
              \quad\text{or}\quad \epsilon = \tfrac{r}{2}\,\sigma_t^2

    The step size is set for each sample b; the authors' code averages norms over the batch. D is the number of entries
    of a sample, and √D replaces the norm of the noise, because ε must not depend on the noise it multiplies. At each
    node the solver steps, the corrector runs, and the solver then evaluates the network at the corrected state. The
    corrector skips σ = 0 and, by default, the start.

    The first form, with `snr`, is for images. Its ε depends on the state, so the stationary density is p/ε, not p: for
    a Gaussian, the variance grows by 1 + 2/D for any step size. In fewer than 2/snr² dimensions this error exceeds the
    discretisation bias 1/(1 − snr²). There √D/σ replaces the norm of the score.
    It is the root of the largest possible mean square of the norm, and gives the second form with r = 4 snr².

    Arguments:
        snr: Ratio of the drift to the noise of a step; 0.16 suits VP and VE on images.
        r: Step size ε in units of σ²/2, as in :class:`AnnealedLangevin`; if given, `snr` is not used.
        steps: Number of steps at each node; each needs one evaluation.
        seed: Integer, :class:`Noise`, or None for a random seed.
        start: Whether to correct the start too.
        model: Denoiser of the corrector, by default the one that is solved. The number of function evaluations of the
            solution contains those of the corrector by default, and not those of a model that is given here.

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          arXiv:2011.13456, algorithms 4 and 5

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.1)
        >>> corrector = ss.sampling.LangevinCorrector(snr=0.1, seed=1)
        >>> ss.solve(mix, (4, 1), ss.DDIM(), steps=10, seed=0, watch=ss.Watch(hook=corrector)).nfe
        19
    """

    snr: float = 0.16
    r: float | None = None
    steps: int = 1
    seed: int | Noise | None = None
    start: bool = False
    model: AbstractDenoiser | None = None

    def __post_init__(self) -> None:
        check.number("snr", self.snr, above=0)
        check.integer("steps", self.steps, at_least=1)
        if self.r is not None:
            check.number("r", self.r, above=0, below=4)
        if self.model is not None:
            check_model(self.model)
        object.__setattr__(self, "seed", as_noise(self.seed))

    def bind(self, model: AbstractDenoiser) -> LangevinCorrector:
        """The corrector with a denoiser: its own, or else `model`; :func:`solve` calls this method.

        Arguments:
            model: Denoiser that is solved.
        """
        if self.model is None:
            return replace(self, model=model)
        same_process(model, self.model, "corrector.model")
        return self

    def __call__(self, node: int, t: float | Tensor, x: Tensor) -> Tensor:
        """Run the corrector at one node and return the new state."""
        model, noise = self.model, self.seed
        if model is None:
            raise ValueError("the corrector has no `model`; call corrector.bind(model), as `solve` does.")
        assert isinstance(noise, Noise)
        sigma = model.sde.sigma(t)
        clean = bool((sigma == 0).any()) if isinstance(sigma, Tensor) else sigma == 0
        if clean or (node == 0 and not self.start):
            return x
        for k in range(self.steps):
            z = noise.like(x, node * self.steps + k)
            score = model.score(x, t)
            epsilon = check.expand(self._step_size(sigma**2, score), x)
            x = x + epsilon * score + (2 * epsilon) ** 0.5 * z
        return x

    def _step_size(self, sigma2: float | Tensor, score: Tensor) -> float | Tensor:
        rows = score.flatten(1) if score.ndim > 1 else score[:, None]
        D = rows.shape[1]
        if self.r is not None or D * self.snr**2 < 2:
            return (2 * self.snr**2 if self.r is None else self.r / 2) * sigma2
        return torch.minimum(2 * self.snr**2 * D / rows.square().sum(1), torch.as_tensor(sigma2).to(rows))
