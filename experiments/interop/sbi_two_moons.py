"""Two moons, trained by sbi's NPSE and FMPE: sbi's own samplers and ours, against the exact posterior.

    python experiments/interop/sbi_two_moons.py            # minutes on two cores
    python experiments/interop/sbi_two_moons.py --quick    # seconds, for CI

The task is that of the benchmark sbibm (arXiv:2101.04653): a uniform prior on [-1, 1]², and a crescent that the
parameters move. Its posterior has two crescents and can be sampled exactly, because x - p(θ) determines θ up to a sign.
The script trains in sbi's code, and compares posteriors by the accuracy of a classifier that separates samples from
exact ones (C2ST; 0.5 is equal) and by the sliced Wasserstein distance, with the values for two exact sets beside them.
With sbi's Euler-Maruyama sampler and ours on the same network, what is left of the error is the network's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from _judging import from_command_line, write
from _sbi_tasks import two_moons as simulate
from _sbi_tasks import two_moons_posterior as exact_posterior
from torch import Tensor
from torch.distributions import Independent, Uniform

import scoresde as ss
from scoresde.metrics import c2st, sliced_w2


@dataclass
class Options:
    """Options of the command line."""

    simulations: int = 4000
    epochs: int = 120
    observations: int = 3
    samples: int = 1000
    quick: bool = False


class Calls:
    """A count of the forward passes of a network; those that draw rejected samples again are part of it."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.count = 0
        net.register_forward_hook(self.add)

    def add(self, *_: object) -> None:
        self.count += 1


def main(options: Options) -> str:
    from sbi.inference import FMPE, NPSE

    generator = torch.Generator().manual_seed(0)
    prior = Independent(Uniform(-torch.ones(2), torch.ones(2)), 1)
    torch.manual_seed(0)
    theta = prior.sample((options.simulations,))
    x = simulate(theta, generator)
    trainers = {
        "NPSE, VP": NPSE(prior, sde_type="vp", show_progress_bars=False),
        "NPSE, VE": NPSE(prior, sde_type="ve", show_progress_bars=False),
        "FMPE": FMPE(prior, show_progress_bars=False),
    }
    observed = [simulate(prior.sample((1,)), generator)[0] for _ in range(options.observations)]
    reference = [exact_posterior(x_o, options.samples, generator) for x_o in observed]
    others = [exact_posterior(x_o, options.samples, generator) for x_o in observed]
    lines = [
        "| network | sampler | evaluations | C2ST | sliced W2 | seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    lines.append(row("two exact sets", "", "", others, reference, 0.0))
    for name, inference in trainers.items():
        torch.manual_seed(0)
        estimator = inference.append_simulations(theta, x).train(
            stop_after_epochs=options.epochs, max_num_epochs=options.epochs, training_batch_size=200
        )
        own = inference.build_posterior(estimator)
        calls = Calls(own.vector_field_estimator.net)
        quiet = {"show_progress_bars": False}
        samplers = {"sbi": lambda x_o, p=own, quiet=quiet: p.sample((options.samples,), x=x_o, **quiet)}
        for nfe in (8, 12, 20, 50):
            mine = ss.interop.sbi_posterior(own, nfe=nfe)
            samplers[f"ours, nfe={nfe}"] = lambda x_o, p=mine: p.sample((options.samples,), x=x_o, seed=0)
        for label, draw in samplers.items():
            calls.count, started = 0, time.perf_counter()
            drawn = [draw(x_o) for x_o in observed]
            seconds, evaluations = (total / len(drawn) for total in (time.perf_counter() - started, calls.count))
            lines.append(row(name, label, f"{evaluations:.0f}", drawn, reference, seconds))
    return write("sbi_two_moons", lines)


def row(name: str, sampler: str, nfe: str, drawn: list[Tensor], reference: list[Tensor], seconds: float) -> str:
    """A row of the table: means over the observations."""
    pairs = list(zip(drawn, reference, strict=True))
    accuracy = sum(c2st(a, b) for a, b in pairs) / len(pairs)
    distance = sum(sliced_w2(a, b) for a, b in pairs) / len(pairs)
    return f"| {name} | {sampler} | {nfe} | {accuracy:.3f} | {distance:.4f} | {seconds:.1f} |"


if __name__ == "__main__":
    main(
        from_command_line(
            Options, __doc__.splitlines()[0], {"simulations": 200, "epochs": 2, "observations": 1, "samples": 100}
        )
    )
