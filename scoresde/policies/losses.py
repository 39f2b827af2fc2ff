r"""Losses of reinforcement learning and of preferences: GRPO, DiffusionNFT, diffusion DPO.

They are functions of numbers or of denoisers; the loop around them is yours. Each returns a scalar to minimise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.sampling.transitions import Transition


@checked
def log_ratio(new: Sequence[Transition], old: Sequence[Transition]) -> Tensor:
    """Log-ratio of the densities of each step, (S, B), see :meth:`Transition.log_ratio`; 0 at equal means.

    Arguments:
        new: Transitions of a replay.
        old: Transitions of the rollout, or of a replay, of the same rows.
    """
    return torch.stack([a.log_ratio(b) for a, b in zip(*_paired(new, old), strict=True)])


@checked
def step_kl(new: Sequence[Transition], reference: Sequence[Transition]) -> Tensor:
    """KL divergence of each step to that of a reference model, in nats, (S, B), see :meth:`Transition.kl`.

    Arguments:
        new: Transitions of a replay.
        reference: Transitions of the same rows under the reference model.
    """
    return torch.stack([a.kl(b) for a, b in zip(*_paired(new, reference), strict=True)])


@checked
def grpo_loss(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    kl: Tensor | None = None,
    beta: float = 0.0,
    elements: int = 1,
) -> Tensor:
    r"""Clipped policy loss of PPO and GRPO, with a penalty on the divergence from a reference model.

    .. math:: L = -\overline{\min\big(\varrho A,\ \mathrm{clip}(\varrho, 1 - c, 1 + c')\,A\big)}
              + \beta\,\overline{\mathrm{KL}}, \qquad \varrho = e^{\ell/n}

    The mean is over steps and samples. At the parameters of the rollout, ϱ = 1 and the gradient is that of REINFORCE;
    with advantages of :func:`reward_to_go` it is −1/S times the gradient of E[r] − β KL(paths). DDPO's loss is the same
    without penalty.

    Arguments:
        log_ratio: Log-ratio ℓ of the new and the old density of each step, (S, B), from :func:`log_ratio`.
        advantages: Advantages A, (B,) or (S, B).
        clip: Bound c below 1; the gradient vanishes where the ratio has already moved so far in its direction.
        clip_high: Bound c′ above 1, by default `clip`.
        kl: Divergence of each step from the reference, (S, B), from :func:`step_kl`.
        beta: Weight β of the penalty.
        elements: Number n that divides the log-ratio. 1 is the ratio of the densities. Public code averages over the D
            elements of a state, n = D, and clips at about 1e-4; the gradient is then smaller by 1/n.

    References:
        | Training Diffusion Models with Reinforcement Learning (Black et al., 2024), arXiv:2305.13301
        | Flow-GRPO: Training Flow Matching Models via Online RL (Liu et al., 2025), arXiv:2505.05470

    Example:
        >>> import torch, scoresde as ss
        >>> ratio = torch.zeros(3, 4, requires_grad=True)
        >>> ss.policies.grpo_loss(ratio, torch.tensor([1.0, -1.0, 2.0, -2.0])).backward()
        >>> (-12 * ratio.grad[0]).tolist()
        [1.0, -1.0, 2.0, -2.0]
    """
    check.number("clip", clip, above=0)
    high = clip if clip_high is None else check.number("clip_high", clip_high, above=0)
    check.number("beta", beta, at_least=0)
    if log_ratio.ndim != 2 or advantages.shape not in (log_ratio.shape, log_ratio.shape[1:]):
        raise ValueError(
            f"`log_ratio` must have shape (S, B) and `advantages` (S, B) or (B,), got {tuple(log_ratio.shape)} and "
            f"{tuple(advantages.shape)}."
        )
    if (kl is None) != (beta == 0):
        raise ValueError("give `kl` and `beta` > 0 together, or neither.")
    ratio = (log_ratio / check.integer("elements", elements, at_least=1)).exp()
    gain = advantages.detach().to(ratio)
    loss = -torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + high) * gain).mean()
    return loss if kl is None else loss + beta * kl.mean()


@checked
def optimality(advantages: Tensor, limit: float) -> Tensor:
    r"""Advantages as probabilities of being optimal, :math:`r = \tfrac12 + \tfrac12\,\mathrm{clip}(A/\ell, -1, 1)`.

    Arguments:
        advantages: Advantages A, (B,).
        limit: Advantage ℓ > 0 at which the probability is 1.
    """
    check.state("advantages", advantages)
    return 0.5 + 0.5 * (advantages / check.number("limit", limit, above=0)).clamp(-1, 1)


@checked
def nft_loss(
    model: AbstractDenoiser,
    old: AbstractDenoiser,
    x: Tensor,
    t: Tensor,
    eps: Tensor,
    reward: Tensor,
    *,
    strength: float = 1.0,
    prediction: str = "velocity",
) -> Tensor:
    r"""Loss of DiffusionNFT, which needs samples and rewards but no rollout: any solver may make the samples.

    .. math:: L = \overline{r\,|v^+ - v|^2 + (1 - r)\,|v^- - v|^2}, \qquad
              v^\pm = v_{old} \pm b\,(v_\theta - v_{old})

    v is the target of `prediction` at x_t = α x + σ ε. If the samples are from `old` and its prediction is exact, the
    minimum is at

    .. math:: v_\theta = v_{old} + \tfrac1b\,E[(2r - 1)(v - v_{old}) \mid x_t]
              = v_{old} + \tfrac2b\,E[r \mid x_t]\,(v_{r} - v_{old}),

    where :math:`v_r` is the prediction for the samples weighted by r.

    Arguments:
        model: Denoiser to train.
        old: Denoiser that made the samples; it gets no gradient.
        x: Samples, (B, *event).
        t: Times, (B,).
        eps: Standard normals of the shape of `x`.
        reward: Probability r of being optimal, in [0, 1], (B,), from :func:`optimality`.
        strength: Factor b > 0; a smaller one makes larger updates.
        prediction: Prediction of the squared error: ``"velocity"``, ``"v"``, ``"eps"`` or ``"x0"``.

    References:
        | DiffusionNFT: Online Diffusion Reinforcement with Forward Process (Zheng et al., 2025), arXiv:2509.16117
    """
    check.number("strength", strength, above=0)
    check.choice("prediction", prediction, ("velocity", "v", "eps", "x0"))
    _same_process(model, old, "old")
    check.state("x", x)
    if reward.shape != (len(x),):
        raise ValueError(f"`reward` must have shape ({len(x)},), one for each sample, got {tuple(reward.shape)}.")
    if reward.device.type == "cpu" and bool(((reward < 0) | (reward > 1)).any()):
        raise ValueError(f"`reward` must lie in [0, 1], got {float(reward.min())} to {float(reward.max())}.")
    x_t = model.sde.perturb(x, t, check.match("eps", eps, "x", x))
    target = model.convert("x0", x, prediction, x_t, t)
    with torch.no_grad():
        before = old.predict(prediction, x_t, t)
    change = strength * (model.predict(prediction, x_t, t) - before)
    good, bad = (_mean_square(before + sign * change - target) for sign in (1, -1))
    reward = reward.to(x)
    return (reward * good + (1 - reward) * bad).mean()


@checked
def dpo_loss(
    model: AbstractDenoiser,
    reference: AbstractDenoiser,
    chosen: Tensor,
    rejected: Tensor,
    t: Tensor,
    eps: Tensor,
    *,
    strength: float | Tensor,
    prediction: str = "eps",
) -> Tensor:
    r"""Diffusion DPO: preferences between pairs of samples, without a reward.

    .. math:: L = -\overline{\log\mathrm{sigmoid}\big(-b\,[\delta(x^w) - \delta(x^l)]\big)}, \qquad
              \delta(x) = |\varepsilon - \varepsilon_\theta(x_t, t)|^2 - |\varepsilon - \varepsilon_{ref}(x_t, t)|^2

    The norms are sums over the elements. b is βTω(λ_t) of the paper. With :math:`b = \beta T c^2/(2 s^2)`, where c is
    the coefficient of the prediction in the mean of DDPM's step and s² its variance, −b δ is βT times the mean
    log-ratio of the step, given x and x_t.

    Arguments:
        model: Denoiser to train.
        reference: Denoiser before training; it gets no gradient.
        chosen: Preferred samples x^w, (B, *event).
        rejected: Other samples x^l of the pairs, (B, *event).
        t: Times, (B,), the same for both samples of a pair.
        eps: Standard normals of the shape of `chosen`, the same for both.
        strength: Weight b, a number or (B,).
        prediction: Prediction of the squared error: ``"eps"``, ``"velocity"``, ``"v"`` or ``"x0"``.

    References:
        | Diffusion Model Alignment Using Direct Preference Optimization (Wallace et al., 2024), arXiv:2311.12908
    """
    check.choice("prediction", prediction, ("eps", "velocity", "v", "x0"))
    _same_process(model, reference, "reference")
    check.match("rejected", rejected, "chosen", check.state("chosen", chosen))
    check.match("eps", eps, "chosen", chosen)

    def excess(x: Tensor) -> Tensor:
        x_t = model.sde.perturb(x, t, eps)
        target = model.convert("x0", x, prediction, x_t, t)
        with torch.no_grad():
            before = (reference.predict(prediction, x_t, t) - target).square().flatten(1).sum(1)
        return (model.predict(prediction, x_t, t) - target).square().flatten(1).sum(1) - before

    if isinstance(strength, Tensor) and (strength.shape not in ((), (len(chosen),)) or strength.is_complex()):
        raise ValueError(f"`strength` must be a number or {len(chosen)} floats, got shape {tuple(strength.shape)}.")
    return -logsigmoid(-strength * (excess(chosen) - excess(rejected))).mean()


def _mean_square(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(1)


def _paired(new: Sequence[Transition], old: Sequence[Transition]) -> tuple[Sequence[Transition], Sequence[Transition]]:
    if not all(isinstance(step, Transition) for step in (*new, *old)):
        raise TypeError("give transitions, as those of replay(...) and rollout.at().")
    if len(new) != len(old) or not new:
        raise ValueError(f"give the same rows twice, at least one: got {len(new)} and {len(old)} transitions.")
    return new, old


def _same_process(model: AbstractDenoiser, other: AbstractDenoiser, name: str) -> None:
    if model.sde != other.sde:
        raise ValueError(f"`{name}` is on {other.sde!r}, and the model on {model.sde!r}; both need one process.")
