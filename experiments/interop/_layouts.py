"""Networks in the layouts of EDM and of guided diffusion, with the losses and samplers of their papers.

The classes have the attributes and the signatures of those code bases; the code is ours. Inside is a diffusers UNet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from _trained import Recipe, train, unet
from diffusers import UNet2DModel
from torch import Tensor, nn

CLASSES = 10


def conditional_unet(width: int, out_channels: int = 1) -> UNet2DModel:
    """The UNet of `_trained`, with class labels; label 10 is the null class."""
    return unet(width, out_channels, labels=CLASSES + 1)


class EDMPrecond(nn.Module):
    """The preconditioned network of EDM: ``net(x, sigma, class_labels)`` returns the denoised image.

    Class labels are one-hot rows; zeros, or None, are the null class.
    """

    def __init__(self, width: int, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = 28, 1, CLASSES
        self.use_fp16, self.sigma_min, self.sigma_max, self.sigma_data = False, 0.0, float("inf"), sigma_data
        self.model = conditional_unet(width)

    def forward(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, force_fp32: bool = False, **kwargs: object
    ) -> Tensor:
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        size = (sigma**2 + self.sigma_data**2).sqrt()
        c_skip, c_out = self.sigma_data**2 / size**2, sigma * self.sigma_data / size
        one_hot = torch.zeros(len(x), CLASSES) if class_labels is None else class_labels.reshape(-1, CLASSES)
        label = torch.where(one_hot.sum(1) > 0, one_hot.argmax(1), CLASSES).expand(len(x))
        # The UNet's labels go from 0 to 1000; c_noise = ln(σ)/4 from −1.6 to 1.1.
        c_noise = sigma.flatten().log() / 4
        out = self.model(x / size, (500 + 250 * c_noise).expand(len(x)), class_labels=label).sample
        return c_skip * x + c_out * out

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        return torch.as_tensor(sigma)


def edm_loss(net: nn.Module, batch: Tensor, labels: Tensor, P_mean: float = -1.2, P_std: float = 1.2) -> Tensor:
    """The loss of EDM, table 1: log-normal σ, weight (σ² + σ_data²) / (σ σ_data)²; a tenth of the labels dropped."""
    sigma = (torch.randn(len(batch), 1, 1, 1) * P_std + P_mean).exp()
    weight = (sigma**2 + net.sigma_data**2) / (sigma * net.sigma_data) ** 2
    one_hot = nn.functional.one_hot(labels, CLASSES).float() * (torch.rand(len(batch), 1) > 0.1)
    denoised = net(batch + sigma * torch.randn_like(batch), sigma, one_hot)
    return (weight * (denoised - batch) ** 2).mean()


@torch.no_grad()
def edm_sampler(
    net: nn.Module,
    latents: Tensor,
    class_labels: Tensor | None = None,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> list[Tensor]:
    """Algorithm 1 of EDM (arXiv:2206.00364), deterministic; returns all states."""
    i = torch.arange(num_steps, dtype=torch.float64)
    sigmas = sigma_max ** (1 / rho) + i / (num_steps - 1) * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))
    t_steps = torch.cat([sigmas**rho, torch.zeros(1, dtype=torch.float64)])
    x = latents.double() * t_steps[0]
    states = [x]
    for k, (t_cur, t_next) in enumerate(pairwise(t_steps)):
        d_cur = (x - net(x, t_cur, class_labels).double()) / t_cur
        x_next = x + (t_next - t_cur) * d_cur
        if k < num_steps - 1:
            d_prime = (x_next - net(x_next, t_next, class_labels).double()) / t_next
            x_next = x + (t_next - t_cur) * (d_cur + d_prime) / 2
        x = x_next
        states.append(x)
    return states


def cosine_betas(n: int = 1000) -> Tensor:
    """The schedule of improved diffusion (arXiv:2102.09672)."""
    bar = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
    return torch.tensor([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(n)], dtype=torch.float64)


class GuidedDiffusionUNet(nn.Module):
    """A network of guided diffusion: ``net(x, timesteps, y)`` returns ε and the interpolation of log-variances."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.num_classes = 1, 2, CLASSES
        self.model = conditional_unet(width, out_channels=2)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        y = torch.full((len(x),), CLASSES) if y is None else y
        return self.model(x, timesteps, class_labels=y).sample


class NoisyClassifier(nn.Module):
    """The classifier of guided diffusion: ``net(x, timesteps)`` returns logits of noisy images."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 4 * width))
        self.first = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1), nn.SiLU(), nn.Conv2d(width, 2 * width, 3, 2, 1))
        self.last = nn.Sequential(nn.SiLU(), nn.Flatten(), nn.Linear(2 * width * 49, 96), nn.SiLU(), nn.Linear(96, 10))

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        scale, shift = self.time(timesteps.float().reshape(-1, 1) / 1000)[:, :, None, None].chunk(2, 1)
        return self.last(self.first(x) * (1 + scale) + shift)


class GaussianDiffusion:
    """The discrete process of guided diffusion in float64, with learned variances (arXiv:2102.09672, section 3).

    Arguments:
        betas: List of β, (N,).
    """

    def __init__(self, betas: Tensor) -> None:
        self.betas, self.num_timesteps = betas, len(betas)
        self.bar = (1 - betas).cumprod(0)
        self.bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.bar[:-1]])
        variance = betas * (1 - self.bar_prev) / (1 - self.bar)
        self.log_small = torch.cat([variance[1:2], variance[1:]]).log()

    def at(self, values: Tensor, t: Tensor) -> Tensor:
        """Values at the indices `t`, (B, 1, 1, 1)."""
        return values[t].reshape(-1, 1, 1, 1)

    def q_sample(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noisy images at the indices `t`."""
        return (self.at(self.bar, t).sqrt() * x + (1 - self.at(self.bar, t)).sqrt() * noise).to(x.dtype)

    def posterior_mean(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0)."""
        bar, prev, beta = (self.at(z, t) for z in (self.bar, self.bar_prev, self.betas))
        return (beta * prev.sqrt() * x0 + (1 - prev) * (1 - beta).sqrt() * x) / (1 - bar)

    def log_variance(self, v: Tensor, t: Tensor) -> Tensor:
        """Log-variance between the two bounds, from an output between −1 and 1."""
        share = (v + 1) / 2
        return share * self.at(self.betas.log(), t) + (1 - share) * self.at(self.log_small, t)

    def p_mean_variance(self, out: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of p(x_{t-1} | x_t) from the network's output."""
        eps, v = out.double().chunk(2, 1)
        bar = self.at(self.bar, t)
        x0 = (x - (1 - bar).sqrt() * eps) / bar.sqrt()
        return self.posterior_mean(x0, x, t), self.log_variance(v, t)

    def loss(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Hybrid loss: squared error of ε, and the variational bound × N / 1000 with the mean held fixed."""
        t, noise = torch.randint(self.num_timesteps, (len(x),)), torch.randn_like(x)
        noisy = self.q_sample(x, t, noise)
        y = torch.where(torch.rand(len(y)) < 0.1, CLASSES, y)
        out = net(noisy, t, y)
        eps, v = out.chunk(2, 1)
        mean, log_var = self.p_mean_variance(torch.cat([eps.detach(), v], 1), noisy.double(), t)
        true_mean, true_log = self.posterior_mean(x.double(), noisy.double(), t), self.at(self.log_small, t)
        kl = 0.5 * (log_var - true_log - 1 + (true_log - log_var).exp() + (true_mean - mean) ** 2 * (-log_var).exp())
        return (eps - noise).square().mean() + kl.mean().float() * self.num_timesteps / 1000

    def p_sample_loop(
        self,
        net: nn.Module,
        x: Tensor,
        normals: Sequence[Tensor],
        y: Tensor | None = None,
        classifier: nn.Module | None = None,
        scale: float = 1.0,
    ) -> list[Tensor]:
        """Ancestral sampling with given normals, and classifier guidance (arXiv:2105.05233, algorithm 1)."""
        x, states = x.double(), [x.double()]
        for i in reversed(range(self.num_timesteps)):
            t = torch.full((len(x),), i)
            with torch.no_grad():
                mean, log_var = self.p_mean_variance(net(x.float(), t, y), x, t)
            if classifier is not None:
                with torch.enable_grad():
                    inside = x.float().requires_grad_()
                    log_p = classifier(inside, t).log_softmax(1)[range(len(x)), y]
                    gradient = torch.autograd.grad(log_p.sum(), inside)[0].double()
                mean = mean + log_var.exp() * scale * gradient
            x = mean if i == 0 else mean + (0.5 * log_var).exp() * normals[self.num_timesteps - 1 - i]
            states.append(x)
        return states


def labelled(images: Tensor, labels: Tensor) -> Tensor:
    """Images with their labels as one more row of pixels, so that a batch is one tensor."""
    row = labels.float().reshape(-1, 1, 1, 1).expand(-1, 1, 1, images.shape[-1])
    return torch.cat([images, row], 2)


def parts(batch: Tensor) -> tuple[Tensor, Tensor]:
    """The images and the labels of :func:`labelled`."""
    return batch[:, :, :-1], batch[:, 0, -1, 0].long()


def edm_network(recipe: Recipe, data: Tensor) -> EDMPrecond:
    """An EDM network trained with EDM's loss on labelled images."""
    torch.manual_seed(0)
    return train("edm", EDMPrecond(recipe.width), lambda net, batch: edm_loss(net, *parts(batch)), data, recipe)


def guided_network(recipe: Recipe, data: Tensor) -> GuidedDiffusionUNet:
    """A guided-diffusion network trained with the hybrid loss on labelled images."""
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(cosine_betas())
    net = GuidedDiffusionUNet(recipe.width)
    return train("guided diffusion", net, lambda net, batch: diffusion.loss(net, *parts(batch)), data, recipe)


def noisy_classifier(recipe: Recipe, data: Tensor) -> NoisyClassifier:
    """A classifier of noisy images."""
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(cosine_betas())

    def loss(net: nn.Module, batch: Tensor) -> Tensor:
        x, y = parts(batch)
        t = torch.randint(diffusion.num_timesteps, (len(x),))
        return nn.functional.cross_entropy(net(diffusion.q_sample(x, t, torch.randn_like(x)), t), y)

    return train("noisy classifier", NoisyClassifier(), loss, data, recipe)


if __name__ == "__main__":
    from _mnist import load

    digits = load()
    for make in (edm_network, guided_network, noisy_classifier):
        make(Recipe(), labelled(digits.images, digits.labels))
