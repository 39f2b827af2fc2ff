"""Train a denoiser as a Lightning module; a run that stops and resumes ends at the same weights.

    pip install lightning
    python experiments/interop/lightning_module.py
    python experiments/interop/lightning_module.py --quick    # seconds, for CI

Lightning saves the module, so also a learned weighting and learned times, and the optimiser. The module adds the
average and torch's generator, for dropout. The rows and the noise of a step follow from the seed and the number of the
step, so nothing of them is saved, and they are the same for any number of processes. The script trains once without a
stop and once with a stop in the middle, and prints the largest difference of weights and averages.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import scoresde as ss
from scoresde.training import times, weightings
from scoresde.training.data_order import DataOrder, parts


class Diffusion(pl.LightningModule):
    """A denoiser with its loss and average, trained on points (N, 2); `batch` is over all processes."""

    def __init__(self, net: nn.Module, data: Tensor, batch: int = 64, seed: int = 0) -> None:
        super().__init__()
        model = ss.Denoiser(net, ss.VP(), predicts="eps")
        self.loss = ss.DSM(model, weightings.Uncertainty("simple"), proposal=times.LossAware())
        self.ema = ss.EMA(model, decay=0.999)  # no module: its weights are not parameters
        self.data, self.batch, self.seed = data, batch, seed
        self.generators: dict[str, Any] = {}

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches without end, from the next step on; Lightning calls this after it has loaded a checkpoint."""
        order = DataOrder(len(self.data), self.batch, self.seed)
        rows = parts(order, self.global_step, self.global_rank, self.trainer.world_size, 1)
        return DataLoader(TensorDataset(self.data), batch_sampler=rows, generator=torch.Generator())

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        (x,) = batch
        noise = ss.Noise(self.seed, offset=self.global_rank * len(x)).fork(self.global_step)
        value = self.loss(x, noise)
        self.log("loss", value, prog_bar=True)
        return value

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.loss.parameters(), 1e-3)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.ema.update()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ema"] = self.ema.state_dict()
        on_gpu = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        checkpoint["generators"] = {"cpu": torch.get_rng_state(), "cuda": on_gpu}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.ema.load_state_dict(checkpoint["ema"])
        self.generators = checkpoint["generators"]

    def on_train_start(self) -> None:
        if self.generators:
            torch.set_rng_state(self.generators["cpu"].cpu())
            if self.device.type == "cuda" and self.generators["cuda"] is not None:
                torch.cuda.set_rng_state(self.generators["cuda"].cpu(), self.device)


def fit(module: Diffusion, steps: int, folder: Path, every: int = 100) -> Diffusion:
    """Train up to step `steps` of the run in `folder`, from its newest checkpoint if there is one."""
    saved = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=every)
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,  # train_dataloader gives each process its rows
        callbacks=[saved],
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    last = folder / "last.ckpt"
    trainer.fit(module, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    return module


def points(n: int) -> Tensor:
    """Points in the plane, (n, 2), near a circle of radius 1."""
    angle = 2 * torch.pi * ss.Noise(0).uniform((n,), 0)
    return torch.stack([angle.cos(), angle.sin()], dim=1) + 0.05 * ss.Noise(0).normal((n, 2), 1)


def main(steps: int, folder: Path) -> None:
    data = points(10_000)

    def new() -> Diffusion:
        return Diffusion(ss.nn.MLP(2, hidden=64, depth=2, seed=0), data)

    once = fit(new(), steps, folder / "once", every=steps // 2)
    fit(new(), steps // 2, folder / "twice", every=steps // 2)  # the run stops here
    twice = fit(new(), steps, folder / "twice", every=steps // 2)  # the same script is started again
    pairs = [*zip(once.state_dict().values(), twice.state_dict().values(), strict=True)]
    pairs += zip(once.ema.weights.values(), twice.ema.weights.values(), strict=True)
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    print(f"largest difference between the run that stopped and the run that did not: {difference:g}")
    with once.ema.swapped():
        x = ss.sample(once.loss.model.eval(), (1000, 2), nfe=20, seed=0)
    print(f"distance of samples to data, sliced W2: {ss.metrics.sliced_w2(x.cpu(), data):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    main(40 if given.quick else given.steps, Path(tempfile.mkdtemp()))
