"""Reinforcement learning of samplers, against exact optima.

    python experiments/policies.py           # about 4 minutes of CPU on one core
    python experiments/policies.py --quick   # seconds, for CI: the digits are poor

A mixture of two Gaussians p and a linear reward r: the law p·exp(r/β)/Z is again a mixture, and β log Z is the largest
value of J = E[r] − β KL(paths). A network that corrects the denoiser of p is trained by policy gradients. The first
variant has the three properties that the theory asks for; each other variant lacks one of them. The columns: value J
with its standard error (of the untrained sampler it is E[r]), the value of the exact denoiser of p·exp(r/β)/Z with the
same steps, the bound β log E exp(r/β) of the untrained sampler, mean and standard deviation of the samples, share of
the right mode, and the Wasserstein distance to p·exp(r/β)/Z. The rows "p" and "p exp(r/β)/Z" are exact samples.

Digits: a small UNet is trained on scikit-learn's digits, and fine-tuned to a reward, the probability of a class by a
classifier. The yardstick is the reference sampler itself, reweighted: for every f, E f under p·exp(r/β)/Z is
E[f e^(r/β)]/E[e^(r/β)] under p. A second judge, which the training does not see, tells whether the reward was hacked.
Two lines compare a network's results between a rollout and its replay, in the same batch and in parts of it.

The script writes two tables and a figure.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from _digits import Digits, Judge, load, small_unet, tiles
from torch import Tensor, nn
from tqdm import trange

import scoresde as ss
from scoresde import policies

ONE = ss.Start(dtype=torch.float32)


@dataclass
class Options:
    """Options of the command line."""

    updates: int = 120
    paths: int = 512
    steps: int = 16
    tests: int = 20000
    training: int = 500
    digit_updates: int = 40
    digit_paths: int = 64
    digit_steps: int = 10
    digit_tests: int = 300
    seed: int = 0
    out: Path = Path(__file__).parent / "out"


# A mixture.

MIXTURE = ss.GaussianMixture(ss.VP(), [[-1.0], [1.2]], std=[0.5, 0.3], weights=[0.6, 0.4])
BETA, SLOPE = 0.5, 0.4


def reward(x: Tensor) -> Tensor:
    """Linear, r = 0.4 x."""
    return SLOPE * x[:, 0]


class Corrected(ss.denoisers.Wrapped):
    """A denoiser plus a network that starts at zero."""

    def __init__(self, model: ss.denoisers.AbstractDenoiser, seed: int) -> None:
        super().__init__(model)
        self.net = ss.nn.MLP(1, hidden=32, depth=2, seed=seed)
        last = [m for m in self.net.modules() if isinstance(m, nn.Linear)][-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def x0(self, x: Tensor, t: float | Tensor, **cond: object) -> Tensor:
        lam = torch.as_tensor(self.sde.lam(t), dtype=torch.float32).expand(len(x))
        return self.model.x0(x, t) + self.net(x.float(), torch.sigmoid(lam / 2)).to(x)


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Arguments:
        name: Name in the table.
        solver: Sampler.
        to_go: Whether the advantage pays for the penalties of later steps.
        scale: Scale of the advantages.
    """

    name: str
    solver: ss.solvers.Solver
    to_go: bool = True
    scale: str = "none"


SDE2 = ss.SDEDPMSolverPP(2)

VARIANTS = (
    Variant("SDE-DPM-Solver++ 2M, reward to go", SDE2),
    Variant("the same, final reward only", SDE2, to_go=False),
    Variant("the same, divided by the deviation", SDE2, scale="group"),
    Variant("DDIM(0.5), reward to go", ss.DDIM(0.5)),
    Variant("DDPM, reward to go", ss.DDPM()),
    Variant("CPS(0.8), reward to go", ss.solvers.CPS(0.8)),
)


def improve(
    model: ss.denoisers.AbstractDenoiser,
    reference: ss.denoisers.AbstractDenoiser,
    run: policies.Rollout,
    rewards: Tensor,
    beta: float,
    optimiser: torch.optim.Optimizer,
    *,
    variant: Variant,
    rows: int,
    seed: int,
) -> None:
    """Take an optimiser step for each minibatch of the steps of a rollout."""
    with torch.no_grad():
        theirs = policies.replay(run, reference)
    kl = policies.step_kl(run.at(), theirs)
    returns = policies.reward_to_go(rewards, kl, beta) if variant.to_go else rewards.expand_as(kl)
    gains = policies.advantages(returns, scale=variant.scale)
    where = {row: k for k, row in enumerate(run.rows)}
    for part, _ in policies.minibatches(run, rows, seed=seed):
        chosen = [where[row] for row in part]
        new = policies.replay(run, model, part)
        loss = policies.grpo_loss(
            policies.log_ratio(new, run.at(part)),
            gains[chosen],
            kl=policies.step_kl(new, [theirs[k] for k in chosen]),
            beta=beta,
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def value(run: policies.Rollout, reference: ss.denoisers.AbstractDenoiser, rewards: Tensor, beta: float) -> Tensor:
    """Reward minus β times the divergence of the paths, for each sample."""
    with torch.no_grad():
        theirs = policies.replay(run, reference)
        return rewards - beta * policies.step_kl(run.at(), theirs).sum(0)


def bound(x: Tensor) -> float:
    """Largest value for the law of some samples, β log E exp(r/β)."""
    return BETA * float((reward(x).double() / BETA).logsumexp(0) - math.log(len(x)))


def grid(sde: ss.SDE, steps: int) -> Tensor:
    """Times down to t = 0.01, where a step still has noise, and then to 0."""
    return torch.cat([ss.grids.quadratic_vp(sde, steps - 1, t_end=0.002), torch.zeros(1, dtype=torch.float64)])


def mixture(options: Options) -> tuple[list[str], dict[str, Tensor]]:
    """Table of the variants, and their samples."""
    base = MIXTURE
    best, log_z = policies.tilted(base, torch.tensor([SLOPE / BETA], dtype=torch.float64))
    times = grid(base.sde, options.steps)
    samples = {"p": base.sample(options.tests, seed=1), "p exp(r/β)/Z": best.sample(options.tests, seed=2)}
    lines = [
        f"mixture: β log Z = {BETA * log_z:.4f}, the largest value",
        "",
        "| sampler | value J | ± | exact denoiser's J | bound | mean | std | right mode | W1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def line(
        name: str, x: Tensor, j: Tensor | None = None, exact: float | None = None, most: float | None = None
    ) -> str:
        numbers = ["", ""] if j is None else [f"{float(j.mean()):.4f}", f"{float(j.std()) / math.sqrt(len(j)):.4f}"]
        numbers += ["" if v is None else f"{v:.4f}" for v in (exact, most)]
        right = float((x > 0.2).double().mean())
        gap = float((x[:, 0].sort().values - samples["p exp(r/β)/Z"][: len(x), 0].sort().values).abs().mean())
        numbers += [f"{v:.3f}" for v in (float(x.mean()), float(x.std()), right, gap)]
        return f"| {name} | {' | '.join(numbers)} |"

    lines += [line("p", samples["p"], reward(samples["p"]))]
    lines += [line("p exp(r/β)/Z, other samples", best.sample(options.tests, seed=3), most=BETA * log_z)]
    for variant in VARIANTS:
        model = Corrected(base, options.seed)
        optimiser = torch.optim.Adam(model.net.parameters(), 5e-3)
        decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: 1 - 0.95 * k / options.updates)
        for k in trange(options.updates, desc=variant.name, disable=None):
            run = policies.rollout(model, (options.paths, 1), variant.solver, grid=times, seed=10 + k, start=ONE)
            improve(model, base, run, reward(run.x), BETA, optimiser, variant=variant, rows=options.steps, seed=k)
            decay.step()
        before = policies.rollout(base, (options.tests, 1), variant.solver, grid=times, seed=4, start=ONE)
        run = policies.rollout(model, (options.tests, 1), variant.solver, grid=times, seed=5, start=ONE)
        samples[variant.name] = run.x
        ideal = policies.rollout(best, (options.tests, 1), variant.solver, grid=times, seed=5, start=ONE)
        exact = float(value(ideal, base, reward(ideal.x), BETA).mean())
        j = value(run, base, reward(run.x), BETA)
        lines.append(line(variant.name, run.x.double(), j, exact, bound(before.x)))
    return lines, samples


# Digits.

CLASS, DIGIT_BETA = 3, 0.25


class Classifier(nn.Module):
    """Probability of one class; the reward."""

    def __init__(self, digits: Digits) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)
        )
        optimiser = torch.optim.Adam(self.net.parameters(), 3e-3)
        for _ in range(300):
            index = torch.randint(len(digits.images), (128,))
            noisy = digits.images[index] + 0.1 * torch.randn(128, 1, 8, 8)
            loss = nn.functional.cross_entropy(self.net(noisy), digits.labels[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x.float()).softmax(1)[:, CLASS]
        return out


def train(digits: Digits, options: Options) -> ss.Denoiser:
    """The reference network."""
    model = ss.Denoiser(small_unet(16, seed=options.seed), ss.VP(), predicts="v")
    loss = ss.DSM(model)
    trainer = ss.Trainer(
        loss,
        {"x": digits.images},
        torch.optim.Adam(loss.parameters(), 2e-3),
        batch=64,
        ema=0.995,
        update=ss.training.Update(warmup=options.training // 20),
        hooks=(),
        seed=options.seed,
    )
    trainer.fit(options.training)
    with trainer.ema.swapped():
        out = copy.deepcopy(model)
    return out.eval().requires_grad_(False)


def digit_line(name: str, x: Tensor, r: Tensor, j: Tensor | None, judge: Judge, weights: Tensor | None = None) -> str:
    """Row of the table: means over samples, or over weighted samples."""
    w = torch.full((len(x),), 1 / len(x)) if weights is None else weights
    label, confidence = judge.classes(x)
    numbers = [float((w * v).sum()) for v in (r, (label == CLASS).float(), confidence)]
    of_class = label == CLASS
    j_text = "" if j is None else f"{float(j.mean()):.3f} ± {float(j.std()) / math.sqrt(len(j)):.3f}"
    spread = float(torch.pdist(x[of_class].flatten(1)).mean()) if int(of_class.sum()) > 1 else math.nan
    return f"| {name} | {j_text} | {numbers[0]:.3f} | {numbers[1]:.3f} | {numbers[2]:.2f} | {spread:.2f} |"


def digits(options: Options) -> tuple[list[str], dict[str, Tensor]]:
    """Table of the fine-tuned network, samples before and after, and the equality of rollout and replay."""
    data = load()
    judge, scorer, reference = Judge(data), Classifier(data), train(data, options)
    model = copy.deepcopy(reference).requires_grad_(True)
    start = ss.Start(data_std=0.75)
    times = torch.cat(
        [ss.grids.quadratic_vp(reference.sde, options.digit_steps - 1, t_end=0.01), torch.zeros(1, dtype=torch.float64)]
    )
    variant = Variant("digits", ss.DDPM())

    def roll(net: ss.Denoiser, n: int, seed: int) -> policies.Rollout:
        return policies.rollout(net, (n, 1, 8, 8), variant.solver, grid=times, seed=seed, start=start)

    before = roll(reference, options.digit_tests, 1)
    r = scorer(before.x)
    weights = (r / DIGIT_BETA).softmax(0)
    largest = DIGIT_BETA * float((r / DIGIT_BETA).logsumexp(0) - math.log(len(r)))
    optimiser = torch.optim.Adam(model.parameters(), 3e-4)
    for k in trange(options.digit_updates, desc="digits", disable=None):
        run = roll(model, options.digit_paths, 100 + k)
        rewards = scorer(run.x)
        improve(
            model,
            reference,
            run,
            rewards,
            DIGIT_BETA,
            optimiser,
            variant=variant,
            rows=(len(run.rows) + 1) // 2,
            seed=k,
        )
    model.requires_grad_(False)
    after = roll(model, options.digit_tests, 2)
    final = scorer(after.x)
    effective = 1 / float(weights.square().sum())
    real = data.held_out
    lines = [
        f"digits: β log Z = {largest:.3f}, from {len(r)} samples (effective {effective:.0f}); β = {DIGIT_BETA}",
        "",
        f"| samples | value J | reward | class {CLASS} by the judge | confidence | distance within the class |",
        "|---|---|---|---|---|---|",
        digit_line("held-out digits", real, scorer(real), None, judge),
        digit_line("reference", before.x, r, r, judge),
        digit_line("reference, reweighted by exp(r/β)", before.x, r, None, judge, weights),
        digit_line("fine-tuned", after.x, final, value(after, reference, final, DIGIT_BETA), judge),
        "",
        *equality(model, after),
    ]
    return lines, {"reference": before.x[:40], "fine-tuned": after.x[:40]}


@torch.no_grad()
def equality(model: ss.Denoiser, run: policies.Rollout) -> list[str]:
    """Largest log-ratio between a rollout and its replay, in one batch and in parts."""
    whole = policies.log_ratio(policies.replay(run, model), run.at()).abs().max()
    lines = [f"largest |log-ratio| of the replay at equal parameters, same batch of {len(run)}: {float(whole):g}"]
    for size in (1, 7, 64):
        parts = [run[i : i + size] for i in range(0, min(len(run), 4 * size), size)]
        gaps = [policies.log_ratio(policies.replay(part, model), part.at()).abs().max() for part in parts]
        lines.append(f"the same in parts of {size}: {float(torch.stack(gaps).max()):.1e} nats")
    return lines


def picture(options: Options, samples: dict[str, Tensor], images: dict[str, Tensor]) -> Path:
    """Densities of the mixture's variants, and digits before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 1 + len(images), figsize=(12, 3.6), width_ratios=(1.6, *[1] * len(images)))
    x = torch.linspace(-3, 3, 400, dtype=torch.float64)[:, None]
    best, _ = policies.tilted(MIXTURE, torch.tensor([SLOPE / BETA], dtype=torch.float64))
    axes[0].plot(x, MIXTURE.log_prob(x).exp(), "k:", label="p")
    axes[0].plot(x, best.log_prob(x).exp(), "k", label="p exp(r/β)/Z")
    for variant in VARIANTS:
        drawn = samples[variant.name][:, 0].numpy()
        axes[0].hist(drawn, bins=120, range=(-3, 3), density=True, histtype="step", label=variant.name)
    axes[0].legend(fontsize=7)
    axes[0].set(xlabel="x", ylabel="density")
    for ax, (name, shown) in zip(axes[1:], images.items(), strict=True):
        ax.imshow(tiles(shown, columns=8), cmap="gray")
        ax.set(title=name, xticks=[], yticks=[])
    path = options.out / "policies.png"
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.process_time()
    lines, samples = mixture(options)
    print("\n".join(lines), flush=True)
    more, images = digits(options)
    print("\n".join(["", *more]), flush=True)
    path = picture(options, samples, images)
    text = [*lines, "", *more, "", f"{time.process_time() - begin:.0f} s of CPU"]
    (options.out / "policies.txt").write_text("\n".join(text) + "\n")
    print(f"\n{text[-1]}; figure: {path.name}")


QUICK = Options(
    updates=2,
    paths=32,
    steps=5,
    tests=200,
    training=4,
    digit_updates=1,
    digit_paths=8,
    digit_steps=4,
    digit_tests=32,
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    main(QUICK if quick else Options())
