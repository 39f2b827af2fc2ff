"""Checks of the first batch of a run: mistakes in the data that no later step shows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

from torch import Tensor

from scoresde import _checks as check
from scoresde.denoisers.base import AbstractDenoiser, Condition
from scoresde.denoisers.modes import takes_label
from scoresde.denoisers.network import Denoiser
from scoresde.processes.sde import LARGEST_SNR

SMALLEST, LARGEST = 0.1, 5.0  # standard deviations relative to the assumed one
FARTHEST = 5.0  # largest mean relative to the assumed standard deviation


def check_first_batch(model: AbstractDenoiser, x: Tensor, cond: Mapping[str, Condition]) -> None:
    """Warn of data on a scale that the model does not assume, forgotten labels, and a process that keeps the data.

    Images from −1 to 1 have the usual scale, whatever their standard deviation.

    Arguments:
        model: Denoiser to train.
        x: Data of the first batch, (B, *event).
        cond: Conditions of that batch, by name.
    """
    if "label" not in cond and takes_label(model):
        warn_unlabelled("Trainer(loss, {'x': x, 'label': y})")
    assumed = assumed_std(model)
    _check_end(model, assumed)
    if assumed is None or not x.is_floating_point() or x.numel() < 2:
        return
    wide = x.detach().float()
    std, mean = float(wide.std(correction=0)), float(wide.mean())
    if not std > 1e-6 * abs(mean):  # a constant, or values that are not finite, have no scale
        return
    if fix := check.unscaled_images(x):
        warnings.warn(f"the first batch {fix}.", stacklevel=check.levels_to_user())
        return
    usual = check.looks_like_images(x) or (
        SMALLEST * assumed <= std <= LARGEST * assumed and abs(mean) <= FARTHEST * assumed
    )
    if usual or not math.isfinite(std):
        return
    target = "" if assumed == 1 else f", target={assumed:g}"
    warnings.warn(
        f"the first batch has mean {mean:.3g} and standard deviation {std:.3g}, and the model assumes a mean near 0 "
        f"and a standard deviation near {assumed:g}: the noise levels do not suit such data; train on scale(data) with "
        f"scale = ss.data.Standardize.fit(data{target}), and map samples back by scale.inverse(samples).",
        stacklevel=check.levels_to_user(),
    )


def _check_end(model: AbstractDenoiser, assumed: float | None) -> None:
    """Warn if x_T still shows the data, so that no run could start from noise."""
    sde = model.sde
    snr = 0.0 if assumed is None else (sde.alpha(sde.T) * assumed / sde.sigma(sde.T)) ** 2
    if snr > LARGEST_SNR:
        warnings.warn(
            f"at t = T = {sde.T:g} the signal-to-noise ratio of {sde!r:.80} is {snr:.2g}, far from that of noise, so "
            f"samples cannot start from a Gaussian; make the process with more noise, such as ss.VP(). The β of DDPM, "
            f"1e-4 … 0.02, belong to steps: Discrete(betas('linear', 1000)).",
            stacklevel=check.levels_to_user(),
        )


def warn_unlabelled(example: str) -> None:
    """Warn that a class-conditional network is trained without labels.

    Arguments:
        example: Call that gives the labels.
    """
    warnings.warn(
        f"the network takes class labels and the data have none, so every sample trains its index of no class; give "
        f"the labels with the data, as in {example}, or make the network without `classes`.",
        stacklevel=check.levels_to_user(),
    )


def assumed_std(model: AbstractDenoiser) -> float | None:
    """Standard deviation of the data that a model assumes; None where data of any scale are usual.

    It is `sigma_data` of a :class:`Preconditioning`, else 1 for processes that mix data and noise. Processes that keep
    the data as they are, α(T) = 1, have noise levels for data of any scale.

    Arguments:
        model: Denoiser.
    """
    if isinstance(model, Denoiser) and model.precondition is not None:
        return model.precondition.sigma_data
    return None if model.sde.alpha(model.sde.T) >= 1 else 1.0
