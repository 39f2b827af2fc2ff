"""Fitted plans of 5 evaluations for a trained network, and the budget at which the default plan is as accurate.

    python experiments/fitted_unet.py            # 10 minutes on an idle core; the network is saved
    python experiments/fitted_unet.py --quick    # seconds, for CI: an untrained network

The network is the class-conditional UNet of ``conditional.py`` on scikit-learn's digits, without labels and under
classifier-free guidance. ``ss.fit(5, model, x)`` fits a plan, from T and with a Gaussian start (mean and covariance of
the training digits), to a fine solve from 72 initial states. On fresh noise, the script then compares the fitted plan's
distance from the fine solve, per pixel, with that of the default at every budget, and reports for each measure the
smallest budget at which the default is as close. It also runs the plan that was fitted under one guidance scale under
other scales.

The script writes a table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import conditional
import torch
from _digits import Digits, load, small_unet
from torch import Tensor

import scoresde as ss

MEASURES = ("median", "q90", "q99", "RMSE")


@dataclass
class Options:
    """Options of the command line."""

    train: int = 600  # training steps of the network
    nfe: int = 5
    trajectories: int = 72
    steps: int = 50  # iterations of a fit
    fresh: int = 100
    fine: int = 60  # number of evaluations of the teacher
    starts: str = "T,Gaussian"
    scale: float = 2.0
    others: str = "0,1,3,4"
    budgets: str = "5,6,8,10,12,15,20,30"
    seed: int = 0
    out: Path = Path(__file__).parent / "out"


def network(digits: Digits, options: Options) -> ss.Denoiser:
    """Trained network with averaged weights; it is saved for each number of training steps."""
    model = ss.Denoiser(small_unet(classes=10), ss.VP(), predicts="v")
    page = options.out / f"fitted_unet_{options.train}.pt"
    if page.exists():
        model.load_state_dict(torch.load(page))
    else:
        trainer = conditional.train(digits, conditional.Options(steps=options.train))
        assert trainer.ema is not None
        with trainer.ema.swapped():
            model.load_state_dict(trainer.model.state_dict())
        torch.save(model.state_dict(), page)
    return model.eval().requires_grad_(False)


def errors(x: Tensor, truth: Tensor) -> dict[str, float]:
    """Quantiles and root mean square of the distance per pixel."""
    e = (x - truth).flatten(1).double().square().mean(1).sqrt()
    q = e.quantile(torch.tensor([0.5, 0.9, 0.99], dtype=e.dtype)).tolist()
    return dict(zip(MEASURES, (*q, float(e.square().mean().sqrt())), strict=True))


class Case:
    """A model with trajectories for fits, fresh ones, and the errors of the default on the fresh ones."""

    def __init__(self, model: Any, options: Options) -> None:
        self.sde = model.sde
        self.truth: Tensor | None = None
        n = options.trajectories
        make = torch.Generator().manual_seed(options.seed + 1)
        labels = torch.randint(0, 10, (n + options.fresh,), generator=make)
        self.to_fit, self.to_test = model.given(label=labels[:n]), model.given(label=labels[n:])
        starts = self.sde.prior(std=0.75).sample(
            (n + options.fresh, *conditional.EVENT), ss.Noise(options.seed + 2), dtype=torch.float32
        )
        self.x, self.fresh = starts[:n], starts[n:]
        self.target = self.fine(self.to_test, self.fresh, options)
        self.default = {
            n: errors(ss.sample(self.to_test, self.fresh, nfe=n), self.target)
            for n in map(int, options.budgets.split(","))
        }

    def fine(self, model: ss.denoisers.AbstractDenoiser, x: Tensor, options: Options) -> Tensor:
        return ss.sample(model, x, ss.VelocityAB(3), grid=ss.grids.quadratic_vp(self.sde, options.fine))

    def measure(self, plan: ss.Plan, start: ss.Gaussian | None) -> dict[str, float]:
        return errors(ss.sample(self.to_test, self.fresh, plan, start=start), self.target)

    def needs(self, values: dict[str, float]) -> str:
        """Smallest budget at which the default is as close, by each measure."""
        cells = []
        for word in MEASURES:
            enough = [n for n, e in self.default.items() if e[word] <= values[word]]
            cells.append(str(min(enough)) if enough else f"> {max(self.default)}")
        return " | ".join(cells)

    def fit(self, gaussian: ss.Gaussian | None, options: Options) -> ss.Plan:
        if self.truth is None:
            self.truth = self.fine(self.to_fit, self.x, options)
        return ss.fit(options.nfe, self.to_fit, self.x, start=gaussian, teacher=self.truth, steps=options.steps)


def row(words: Sequence[object], values: dict[str, float], needed: str) -> str:
    return f"| {' | '.join(map(str, words))} | {' | '.join(f'{values[w]:.4f}' for w in MEASURES)} | {needed} |"


def head(words: Sequence[str]) -> list[str]:
    needed = " | ".join(f"NFE of the default: {w}" for w in MEASURES)
    return [f"| {' | '.join(words)} | {' | '.join(MEASURES)} | {needed} |", "|:--" * len(words) + "|--:" * 8 + "|"]


def main(options: Options) -> str:
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    digits = load()
    began = time.perf_counter()
    model = network(digits, options)
    print(f"network: {time.perf_counter() - began:.0f} s", flush=True)
    gaussian = ss.Gaussian.estimate(model.sde, digits.images)
    null = {"label": conditional.NONE}
    lines = [
        "# Fitted evaluations of a trained network",
        "",
        f"Digits; {options.nfe} evaluations fitted on {options.trajectories} trajectories, a third of which decide "
        f"when to stop. Distance per pixel from a solve with {options.fine} evaluations, on {options.fresh} others.",
        "",
        *head(("model", "plan")),
    ]
    best: dict[str, ss.Plan] = {}
    for name, scale in {"no labels": 0.0, f"guidance {options.scale:g}": options.scale}.items():
        case = Case(ss.ClassifierFree(model, scale, null=null, one_forward=True), options)
        lines.append(row((name, f"default, {options.nfe}"), case.default[options.nfe], " | ".join([""] * 4)))
        for start in (gaussian if word == "Gaussian" else None for word in options.starts.split(",")):
            began = time.perf_counter()
            plan = case.fit(start, options)
            word = "fitted, Gaussian start" if start else "fitted"
            values = case.measure(plan, start)
            lines.append(row((name, word), values, case.needs(values)))
            own = plan.meta["train"]["after"]["median"]
            print(
                f"{lines[-1]}\n  median on its own trajectories {own:.4f}, on fresh ones {values['median']:.4f}; "
                f"{plan.meta['iterations']} iterations, {time.perf_counter() - began:.0f} s",
                flush=True,
            )
            lines[-1] += f" {own:.4f} |"
            best[name] = plan
    name = f"guidance {options.scale:g}"
    lines += ["", f"## The plan with a Gaussian start fitted under {name}, under other scales", ""]
    lines += head(("scale", "plan"))
    for scale in map(float, options.others.split(",")):
        case = Case(ss.ClassifierFree(model, scale, null=null, one_forward=True), options)
        values = case.measure(best[name], gaussian)
        lines.append(row((f"{scale:g}", f"default, {options.nfe}"), case.default[options.nfe], " | ".join([""] * 4)))
        lines.append(row((f"{scale:g}", f"fitted at {options.scale:g}"), values, case.needs(values)))
        print(lines[-1], flush=True)
    lines[4] += " median on its own trajectories |"
    lines[5] += "--:|"
    text = "\n".join(lines)
    (options.out / "fitted_unet.md").write_text(text + "\n")
    print(text)
    return text


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in vars(Options()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="seconds, for CI")
    given = vars(parser.parse_args())
    if given.pop("quick"):
        given.update(
            train=5, trajectories=6, steps=1, fresh=4, fine=8, starts="Gaussian", others="1", budgets="2", nfe=2
        )
    return Options(**given)


if __name__ == "__main__":
    main(parse())
