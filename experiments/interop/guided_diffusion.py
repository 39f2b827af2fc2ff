"""A network in guided diffusion's layout: learned variances, classes and a classifier of noisy images.

    python experiments/interop/guided_diffusion.py            # minutes on two cores
    python experiments/interop/guided_diffusion.py --quick    # seconds, for CI

The script trains the network with the hybrid loss on 5,000 MNIST digits, loads it with `ss.interop`, and prints the
largest difference between ancestral sampling as written in arXiv:2102.09672 and `ss.sampling.LearnedVariance()` with
the same normals, over all the steps. It then compares our default at 10 evaluations with DDIM, which that code base
uses for few steps, at 10, 20 and 50, by the distance to a fine solve and by the Fréchet distance. All of these clamp
the denoised image to [-1, 1], as that code base does: on a cosine schedule α(T) is 5e-5, and the error of ε is divided
by it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from _judging import from_command_line, judge, table, write
from _layouts import CLASSES, GaussianDiffusion, cosine_betas, guided_network, labelled, noisy_classifier
from _mnist import Judge, load
from _trained import QUICK, Recipe

import scoresde as ss


@dataclass
class Options:
    """Options of the command line."""

    samples: int = 128
    compared: int = 8
    fine: int = 200
    quick: bool = False


def main(options: Options) -> str:
    data = load()
    recipe, digits = QUICK if options.quick else Recipe(), labelled(data.images, data.labels)
    net, classifier = guided_network(recipe, digits), noisy_classifier(recipe, digits)
    table_of_betas = cosine_betas()
    model = ss.interop.from_guided_diffusion(net, "cosine")
    sde, lines = model.sde, []

    # The same steps, with the normals that our sampler draws.
    y = torch.arange(options.compared) % CLASSES
    shape = (options.compared, 1, 28, 28)
    N = 50 if options.quick else sde.N
    diffusion = GaussianDiffusion(table_of_betas[:N])
    noise = ss.Noise(0)
    x = noise.fork(ss.noise.streams.Stream.START).like(torch.empty(shape, dtype=torch.float64), 0)
    steps = noise.fork(ss.noise.streams.Stream.STEPS)
    normals = [steps.like(x, k) for k in range(N)]
    theirs = diffusion.p_sample_loop(net, x, normals, y)
    grid = ss.grids.index_grid(sde, sde.N)[sde.N - N :]
    ours = ss.sample(model.given(y=y), x, ss.sampling.LearnedVariance(), grid=grid, seed=noise)
    gap = float((ours - theirs[-1]).abs().max() / (1 + theirs[-1].abs().max()))
    lines.append(f"largest relative difference after {N} ancestral steps, ours to theirs: {gap:.1e}")

    # Guidance by the classifier: the gradient at the same state and time.
    log_prob = ss.interop.Classifier(classifier, sde)
    guided = ss.guidance.ClassifierGuidance(model.given(y=y), lambda x, t: log_prob(x, t, y), scale=1.0)
    t = float(grid[-min(N, 200)])
    leaf = theirs[0].float().requires_grad_()
    index = torch.full((len(leaf),), int(sde.index_of_t(t)))
    log_p = classifier(leaf, index).log_softmax(1)[range(len(leaf)), y]
    slope = torch.autograd.grad(log_p.sum(), leaf)[0].double()
    push = guided.score(theirs[0], t) - model.given(y=y).score(theirs[0], t)
    push = push.detach()
    relative = float((push - slope).abs().max() / slope.abs().max())
    lines += [f"largest relative difference of the classifier's push on the score: {relative:.1e}", ""]

    labels = torch.arange(options.samples) % CLASSES
    z = torch.randn(options.samples, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    conditioned = ss.guidance.Clamp(model.given(y=labels))  # `clip_denoised`, the default of that code base
    jury = Judge(data, steps=20 if options.quick else 600)
    fine = ss.sample(conditioned, z, ss.DPMSolverPP(3), steps=options.fine)
    samplers = [("default", 10, lambda: ss.sample(conditioned, z, nfe=10))]
    for n in (10, 20, 50):
        at = ss.grids.index_grid(sde, n, "linspace")
        samplers.append((f"DDIM, {n} steps", n, lambda at=at: ss.sample(conditioned, z, ss.DDIM(), grid=at)))
    rows = judge(samplers, fine, jury)
    lines += [table(rows), "", f"floor of the Fréchet distance: {jury.floor(options.samples)}"]
    text = write("guided_diffusion", lines)
    assert gap < 1e-4 and relative < 1e-4, "the adapter must take the steps of the network's own sampler"
    return text


if __name__ == "__main__":
    main(from_command_line(Options, __doc__.splitlines()[0], {"samples": 8, "fine": 10, "compared": 2}))
