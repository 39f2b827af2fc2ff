"""Networks that were trained in other libraries' code, kept in a folder so that each is trained once.

The training loops use nothing of scoresde: they are the loops of the libraries' own examples, with their classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from _mnist import load
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import trange

OUT = Path(__file__).parents[1] / "out" / "interop"

SCHEDULES = {
    "epsilon, linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "epsilon"},
    "v, cosine": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "velocity, flow": {"shift": 1.0},
    "epsilon, scaled linear": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "epsilon",
    },
    "velocity, shifted flow": {"shift": 3.0},
    "x0, cosine": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    # As a list, because few of diffusers' schedulers know the name.
    "epsilon, sigmoid": {
        "trained_betas": DDPMScheduler(beta_schedule="sigmoid").betas.tolist(),
        "prediction_type": "epsilon",
    },
    "epsilon, quadratic": {
        "num_train_timesteps": 500,
        "trained_betas": torch.linspace(1e-4**0.5, 0.04**0.5, 500).square().tolist(),
        "prediction_type": "epsilon",
    },
    "velocity, labelled flow": {"shift": 1.0},
    "epsilon, labelled scaled linear": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "epsilon",
    },
}
NO_LABEL = 10


@dataclass(frozen=True)
class Recipe:
    """Size of the training.

    Arguments:
        steps: Number of optimiser steps.
        batch: Number of images in a batch.
        width: Channels at the highest resolution.
        rate: Learning rate.
    """

    steps: int = 800
    batch: int = 32
    width: int = 16
    rate: float = 2e-3

    @property
    def name(self) -> str:
        return f"{self.steps}x{self.batch}-{self.width}"


QUICK = Recipe(steps=4, batch=8, width=8)


def unet(width: int, out_channels: int = 1, labels: int | None = None) -> UNet2DModel:
    """A diffusers UNet for 28 × 28 images."""
    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=out_channels,
        num_class_embeds=labels,
        layers_per_block=1,
        block_out_channels=(width, 2 * width, 2 * width),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
    )


def scheduler(kind: str) -> DDPMScheduler | FlowMatchEulerDiscreteScheduler:
    """The diffusers scheduler that a network of this kind is trained with."""
    config = SCHEDULES[kind]
    if "flow" in kind:
        return FlowMatchEulerDiscreteScheduler(**config)
    return DDPMScheduler(**{"num_train_timesteps": 1000, "clip_sample": False, **config})


def diffusers_loss(kind: str) -> Callable[..., Tensor]:
    """The loss of diffusers' training examples for this kind of network."""
    schedule = scheduler(kind)
    if "flow" in kind:

        def flow(net: nn.Module, x: Tensor, **labels: Tensor) -> Tensor:
            noise = torch.randn_like(x)
            index = torch.randint(len(schedule.timesteps), (len(x),))
            sigma = schedule.sigmas[index][:, None, None, None]
            noisy = (1 - sigma) * x + sigma * noise
            return (net(noisy, schedule.timesteps[index], **labels).sample - (noise - x)).square().mean()

        return flow
    target = SCHEDULES[kind]["prediction_type"]

    def discrete(net: nn.Module, x: Tensor, **labels: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        t = torch.randint(0, schedule.config.num_train_timesteps, (len(x),))
        noisy = schedule.add_noise(x, noise, t)
        wanted = {"epsilon": noise, "sample": x}.get(target)
        wanted = schedule.get_velocity(x, noise, t) if wanted is None else wanted
        return (net(noisy, t, **labels).sample - wanted).square().mean()

    return discrete


def train(
    name: str, net: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor], images: Tensor, recipe: Recipe
) -> nn.Module:
    """Train a network with AdamW, average its weights over the last part, and keep them in a file.

    Arguments:
        name: Name of the file.
        net: Network.
        loss: Function of the network and a batch of `images`.
        images: Training images, (N, *event), or their numbers, (N,).
        recipe: Size of the training.
    """
    path = OUT / f"{name.replace(', ', '-').replace(' ', '_')}-{recipe.name}.safetensors"
    if path.exists():
        net.load_state_dict(load_file(path))
        return net.eval()
    torch.manual_seed(0)
    optimiser = torch.optim.AdamW(net.parameters(), recipe.rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.steps)
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    for _ in trange(recipe.steps, desc=name, disable=None):
        value = loss(net, images[torch.randint(len(images), (recipe.batch,))])
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        average.update_parameters(net)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {key: value.contiguous() for key, value in average.module.state_dict().items()}
    save_file(weights, path)
    net.load_state_dict(weights)
    return net.eval()


def diffusers_network(kind: str, recipe: Recipe) -> UNet2DModel:
    """A UNet trained on the digits by diffusers' own loop; a labelled one without its label in a tenth of the rows."""
    torch.manual_seed(0)
    if "labelled" in kind:
        data, loss = load(), diffusers_loss(kind)

        def dropped(net: nn.Module, index: Tensor) -> Tensor:
            labels = data.labels[index].masked_fill(torch.rand(len(index)) < 0.1, NO_LABEL)
            return loss(net, data.images[index], class_labels=labels)

        return train(kind, unet(recipe.width, labels=NO_LABEL + 1), dropped, torch.arange(len(data.images)), recipe)
    return train(kind, unet(recipe.width), diffusers_loss(kind), load().images, recipe)


if __name__ == "__main__":
    import time

    for kind in SCHEDULES:
        started = time.monotonic()
        diffusers_network(kind, Recipe())
        print(f"{kind}: {time.monotonic() - started:.0f} s")
