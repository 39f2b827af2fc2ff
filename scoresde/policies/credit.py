r"""Rewards of a rollout as advantages of its steps.

With a penalty on the divergence of the paths from those of a reference model, the objective and its gradient are

.. math:: J = E\Big[r(x_0) - \beta\sum_s \mathrm{KL}_s\Big], \qquad
          \nabla J = E\sum_s \Big[\nabla\log p_s\,\Big(r - \beta\sum_{j > s} \mathrm{KL}_j\Big)
          - \beta\,\nabla\mathrm{KL}_s\Big],

where KL_s is the divergence of transition s at its state. :func:`reward_to_go` is the round bracket.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked


@checked
def reward_to_go(rewards: Tensor, kl: Tensor, beta: float) -> Tensor:
    r"""Reward minus the penalty of all later steps, (S, B).

    .. math:: R_s = r - \beta\sum_{j > s} \mathrm{KL}_j

    Without the later penalties the fixed point of the updates is not p·exp(r/β)/Z, except where these do not depend on
    the state, as for Gaussian data and a linear reward.

    Arguments:
        rewards: Rewards of the samples, (B,).
        kl: KL divergence of each step from the reference, in the order of the run, (S, B); its gradient is dropped.
        beta: Weight β of the penalty.

    Example:
        >>> import torch, scoresde as ss
        >>> ss.policies.reward_to_go(torch.tensor([1.0]), torch.tensor([[0.5], [0.2], [0.1]]), beta=1.0)
        tensor([[0.7000],
                [0.9000],
                [1.0000]])
    """
    check.number("beta", beta, at_least=0)
    if kl.ndim != 2 or rewards.shape != kl.shape[1:]:
        raise ValueError(
            f"`rewards` and `kl` must have shapes (B,) and (S, B), got {tuple(rewards.shape)} and {tuple(kl.shape)}."
        )
    kl = kl.detach()
    later = kl.flip(0).cumsum(0).flip(0) - kl
    return rewards.to(kl) - beta * later


@checked
def advantages(rewards: Tensor, groups: Tensor | None = None, *, scale: str = "none", epsilon: float = 1e-4) -> Tensor:
    r"""Rewards relative to those of the same group: :math:`A_i = (r_i - \bar r_g) / (s + \epsilon)`.

    GRPO divides by the standard deviation of the group. Each group then has its own unit of reward: with a penalty β
    the optimum is that of β times this deviation. Without a scale the penalty keeps its meaning.

    Arguments:
        rewards: Rewards, (B,), or (S, B) with one for each step.
        groups: Number of the group of each sample, integers (B,), such as that of the prompt; by default one group.
        scale: Deviation s: ``"none"`` for no division, ``"group"`` for that of the group, ``"batch"`` for that of all.
        epsilon: Number ε that keeps the division finite where all rewards of a group are equal.

    References:
        | DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models (Shao et al., 2024),
          arXiv:2402.03300
        | Understanding R1-Zero-Like Training: A Critical Perspective (Liu et al., 2025), arXiv:2503.20783

    Example:
        >>> import torch, scoresde as ss
        >>> ss.policies.advantages(torch.tensor([1.0, 3.0, 10.0, 10.0]), torch.tensor([0, 0, 1, 1]))
        tensor([-1.,  1.,  0.,  0.])
    """
    check.choice("scale", scale, ("none", "group", "batch"))
    check.number("epsilon", epsilon, at_least=0)
    if rewards.ndim not in (1, 2) or not rewards.is_floating_point():
        raise ValueError(f"`rewards` must be floats (B,) or (S, B), got {rewards.dtype} {tuple(rewards.shape)}.")
    n = rewards.shape[-1]
    if groups is None:
        groups = torch.zeros(n, dtype=torch.int64, device=rewards.device)
    if groups.shape != (n,) or groups.is_floating_point():
        raise ValueError(f"`groups` must be {n} integers, one for each sample, got {tuple(groups.shape)}.")
    number = groups.unique(return_inverse=True)[1]
    centred = rewards - _group_mean(rewards, number)
    if scale == "none":
        return centred
    square = centred.square()
    variance = _group_mean(square, number) if scale == "group" else square.mean(-1, keepdim=True)
    return centred / (variance.sqrt() + epsilon)


def _group_mean(values: Tensor, number: Tensor) -> Tensor:
    """Mean over each group along the last axis, for every sample of the group."""
    groups = int(number.max()) + 1 if len(number) else 0
    count = torch.bincount(number, minlength=groups).to(values)
    total = values.new_zeros(*values.shape[:-1], groups).index_add(-1, number, values)
    return (total / count)[..., number]
