"""Samplers as policies: rollouts, replays, advantages, and the losses of reinforcement learning and of preferences."""

from scoresde.policies.credit import advantages, reward_to_go
from scoresde.policies.losses import dpo_loss, grpo_loss, log_ratio, nft_loss, optimality, step_kl
from scoresde.policies.optimum import start_share, tilted
from scoresde.policies.rollout import Rollout, minibatches, replay, rollout

__all__ = [
    "Rollout",
    "advantages",
    "dpo_loss",
    "grpo_loss",
    "log_ratio",
    "minibatches",
    "nft_loss",
    "optimality",
    "replay",
    "reward_to_go",
    "rollout",
    "start_share",
    "step_kl",
    "tilted",
]
