"""Diffusion in the latent space of a VAE: decoded samples of digits, and bounds on the likelihood.

    python experiments/latent.py
    python experiments/latent.py --quick    # seconds, for CI: the samples are poor

A VAE is trained first, on its evidence lower bound, and then fixed. A diffusion model learns its standardised latents
z ~ q(z | x) and replaces the VAE's prior N(0, I):

    log p(x) ≥ E_q[log p(x | z)] + E_q[log p_diffusion(z)] + H(q(z | x)),

where log p_diffusion is replaced by its own bound in continuous time, `ss.elbo`. The script writes three bounds on
held-out digits, in nats: the VAE's, its importance-weighted one with 32 latents, and the one with diffusion. Decoded
samples of both priors, held-out digits and their reconstructions are evaluated as in quickstart.py.

Measured, in two minutes on one core: the bounds are −10, −6 and −8 nats; diffusion gains 2.4 ± 0.3 over the VAE's
prior. Decoded samples have a confidence of 0.75 with diffusion and 0.60 without (real digits 0.92), a sliced W2 to
held-out digits of 0.109 and 0.127 (0.074), and a C2ST of 0.69 and 0.75 (0.49; reconstructions 0.61).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from _digits import HEAD, Judge, line, load, tiles
from torch import Tensor, nn
from tqdm import trange

import scoresde as ss


@dataclass
class Options:
    """Options of the command line."""

    vae_steps: int = 1000
    steps: int = 1200
    batch: int = 64
    rate: float = 2e-3
    std: float = 0.25
    latent: int = 2
    width: int = 16
    samples: int = 300
    calls: int = 20
    draws: int = 32
    latents: int = 32
    held_out: int = 250
    seed: int = 0
    out: Path = Path(__file__).parent / "out"


def fit(loss: Callable[[Tensor], Tensor], module: nn.Module, data: Tensor, steps: int, options: Options, name: str):
    """Train the module, and then load the average of its weights into it."""
    generator = torch.Generator().manual_seed(options.seed)
    optimiser, ema = torch.optim.Adam(module.parameters(), options.rate), ss.EMA(module, 0.995)
    with trange(steps, desc=name, disable=None) as bar:
        for step in bar:
            optimiser.param_groups[0]["lr"] = options.rate * (1 - step / steps)
            optimiser.zero_grad()
            value = loss(data[torch.randint(len(data), (options.batch,), generator=generator)])
            value.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()
            ema.update()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{value.item():.4g}")
    module.load_state_dict(ema.weights)
    module.eval()


def train(images: Tensor, options: Options) -> tuple[ss.nn.VAE, ss.data.Standardize, ss.Denoiser]:
    """Train the autoencoder and the diffusion model; return them with the scale of the latents between them."""
    torch.manual_seed(options.seed)
    vae = ss.nn.VAE(1, options.latent, width=options.width, blocks=1, std=options.std, seed=options.seed)
    fit(lambda x: -vae(x).elbo.mean() / x[0].numel(), vae, images, options.vae_steps, options, "VAE")
    with torch.no_grad():
        q = vae.encode(images)
        scale = ss.data.Standardize.fit(q.sample(), "channel")
    net = ss.nn.UNet(options.latent, width=2 * options.width, multipliers=(1, 2), blocks=1, seed=options.seed)
    model = ss.Denoiser(net, ss.VP(), predicts="v")
    loss = ss.DSM(model)

    def of_images(x: Tensor) -> Tensor:
        with torch.no_grad():
            z = scale(vae.encode(x).sample())
        return loss(z)

    fit(of_images, model, images, options.steps, options, "diffusion")
    return vae, scale, model


@torch.no_grad()
def bounds(
    vae: ss.nn.VAE, scale: ss.data.Standardize, model: ss.Denoiser, x: Tensor, options: Options
) -> dict[str, Tensor]:
    """Lower bounds on log p(x) in nats, (B,) each."""
    noise = ss.Noise(options.seed)
    q = vae.encode(x)
    z = q.sample(noise)
    entropy = 0.5 * (q.log_var + 1 + math.log(2 * math.pi)).flatten(1).sum(1)
    monte_carlo = ss.likelihood.MonteCarlo(n_times=options.draws, repeats=1)
    log_p = ss.elbo(model, z, monte_carlo=monte_carlo, scale=scale, seed=noise.fork(2)).value
    return {
        "VAE": vae.elbo(x, noise).elbo,
        f"VAE, {options.latents} latents": vae.importance_bound(x, options.latents, noise),
        "VAE + diffusion": vae.likelihood(z).log_prob(x) + log_p + entropy,
    }


def main(options: Options) -> Path:
    digits = load()
    vae, scale, model = train(digits.images, options)
    shape = vae.latent_shape((options.samples, 1, 8, 8))
    with torch.no_grad():
        drawn = ss.sample(model, shape, nfe=options.calls, seed=options.seed)
        pictures = {
            "held-out digits": digits.held_out,
            "their reconstructions": vae.decode(vae.encode(digits.held_out).mean),
            "VAE, z ~ N(0, I)": vae.sample((options.samples, 1, 8, 8), seed=options.seed),
            "VAE, z from diffusion": vae.decode(scale.inverse(drawn)),
        }
    held_out = digits.held_out[: options.held_out]
    bound = bounds(vae, scale, model, held_out, options)
    table = [f"log p(x) of {len(held_out)} held-out digits is at least, in nats (± standard error of the mean):"]
    table += [f"{name:24} {v.mean():8.2f} ± {v.std() / len(v) ** 0.5:.2f}" for name, v in bound.items()]
    gain = bound["VAE + diffusion"] - bound["VAE"]
    table += [f"{'gain of diffusion':24} {gain.mean():+8.2f} ± {gain.std() / len(gain) ** 0.5:.2f}", "", HEAD]
    judge = Judge(digits)
    table += judge.yardsticks()
    for name in list(pictures)[1:]:
        table.append(line(name, options.calls if "diffusion" in name else "", judge(pictures[name])))
    text = "\n".join(table)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "latent.txt").write_text(text + "\n")
    page = options.out / "latent.png"
    draw(pictures, page)
    print(f"\nfigure: {page}")
    return page


def draw(pictures: dict[str, Tensor], page: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(pictures), figsize=(3.6 * len(pictures), 3.2))
    for ax, (title, images) in zip(axes, pictures.items(), strict=True):
        ax.imshow(-tiles(images[:80]), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        ax.set_title(title, fontsize=10)
        ax.axis("off")
    figure.tight_layout()
    figure.savefig(page, dpi=110)
    plt.close(figure)


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in vars(Options()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="seconds, for CI: the samples are poor")
    given = vars(parser.parse_args())
    if given.pop("quick"):
        given.update(vae_steps=20, steps=20, batch=32, samples=40, calls=5, draws=4, latents=4, held_out=40)
    return Options(**given)


if __name__ == "__main__":
    main(parse())
