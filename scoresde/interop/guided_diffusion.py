"""Denoisers from networks of DDPM, improved diffusion and guided diffusion, and classifiers of guided diffusion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.clocks import Rescaled
from scoresde.denoisers.network import Denoiser
from scoresde.grids.grid import check_grid
from scoresde.interop.networks import Adapted, Net
from scoresde.processes.discrete import Discrete
from scoresde.processes.discrete import betas as make_betas


@checked
def from_ddpm(
    net: Net, betas: Sequence[float] | Tensor, *, predicts: str = "eps", learned_variance: bool | str = False
) -> Denoiser:
    """Denoiser from a network of DDPM, improved or guided diffusion: ``net(x, index)`` on a β list, index 0 … N − 1.

    Arguments:
        net: Network.
        betas: List of β that it was trained on.
        predicts: Output of the network, ``"eps"`` in those code bases unless configured otherwise.
        learned_variance: Whether the network returns twice the channels: ``"range"`` for their ``LEARNED_RANGE``,
            ``"log"`` for ``LEARNED``.

    References:
        | Denoising Diffusion Probabilistic Models (Ho et al., 2020), arXiv:2006.11239
    """
    return Denoiser(Adapted(net), Discrete(betas), predicts=predicts, time="index", learned_variance=learned_variance)


@checked
def from_guided_diffusion(
    net: Net,
    noise_schedule: str | Sequence[float] | Tensor = "linear",
    *,
    diffusion_steps: int = 1000,
    learn_sigma: bool = True,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
) -> Denoiser:
    """Denoiser from a UNet of guided diffusion, by the flags of that code base: ``net(x, timesteps, y=None)``.

    A model that was sampled with ``timestep_respacing`` gets the same labels as in training; the respacing is a grid:
    see :func:`respaced`. Class labels are the condition `y`.

    Arguments:
        net: UNetModel.
        noise_schedule: ``"linear"``, scaled with the number of steps as there, ``"cosine"``, or a list of β, (N,).
        diffusion_steps: Number of steps N of training.
        learn_sigma: Whether the network returns twice the channels, six for images.
        predict_xstart: Whether the network predicts the data instead of the noise.
        rescale_timesteps: Whether labels are rescaled to 0 … 1000.

    References:
        | Diffusion Models Beat GANs on Image Synthesis (Dhariwal and Nichol, 2021), arXiv:2105.05233
    """
    N = check.integer("diffusion_steps", diffusion_steps, at_least=1)
    if isinstance(noise_schedule, str):
        kind = check.choice("noise_schedule", noise_schedule, ("linear", "cosine"))
        ends = {"beta_start": 0.1 / N, "beta_end": 20 / N} if kind == "linear" else {}
        noise_schedule = make_betas(kind, N, **ends)
    return Denoiser(
        Adapted(net),
        Discrete(noise_schedule),
        predicts="x0" if predict_xstart else "eps",
        time=Rescaled(N) if rescale_timesteps else "index",
        learned_variance="range" if learn_sigma else False,
    )


@checked
class Classifier(torch.nn.Module):
    r"""Log-likelihood of a noisy classifier of guided diffusion, for :class:`ClassifierGuidance`.

    Arguments:
        net: Classifier ``net(x, timesteps)`` that returns logits (B, classes).
        sde: Process of the classifier, ``model.sde``.
        rescale_timesteps: Whether its labels are rescaled to 0 … 1000.

    Example:
        >>> import torch, scoresde as ss
        >>> model = ss.interop.from_guided_diffusion(lambda x, i, y=None: torch.zeros_like(x), learn_sigma=False)
        >>> logits = lambda x, i: torch.stack([x.sum(1), -x.sum(1)], dim=1)
        >>> log_prob = ss.interop.Classifier(logits, model.sde)
        >>> guided = ss.guidance.ClassifierGuidance(model, log_prob, scale=1.0, known=["y"])
        >>> guided.given(y=torch.tensor([0, 1])).x0(torch.zeros(2, 3), 500.0).shape
        torch.Size([2, 3])

    References:
        | Diffusion Models Beat GANs on Image Synthesis (Dhariwal and Nichol, 2021), arXiv:2105.05233
    """

    def __init__(self, net: Net, sde: Discrete, *, rescale_timesteps: bool = False) -> None:
        super().__init__()
        if not isinstance(sde, Discrete):
            raise TypeError(f"`sde` must be the Discrete process of the classifier, got {type(sde).__name__}.")
        self.net = Adapted(net)
        self.sde = sde
        self.rescale_timesteps = rescale_timesteps

    def forward(self, x: Tensor, t: float | Tensor, y: Tensor) -> Tensor:
        """Log-probability of the classes `y`, (B,), given the states at time `t`."""
        times = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        scale = 1000 / self.sde.N if self.rescale_timesteps else 1.0
        logits = self.net(x, self.sde.index_of_t(times) * scale)
        log_probs = logits.to(x.dtype).log_softmax(dim=-1)
        chosen: Tensor = log_probs.gather(1, y.reshape(-1, 1).to(x.device))
        return chosen[:, 0]


@checked
def respaced(sde: Discrete, timestep_respacing: str | Sequence[int]) -> Tensor:
    """Grid of a ``timestep_respacing`` of guided diffusion, then t = 0.

    Arguments:
        sde: Process of the network, ``model.sde``.
        timestep_respacing: ``"ddimN"`` for N labels at a whole stride, or the numbers of labels in equal sections of
            the process, data first: ``"250"``, ``"10,15,20"`` or a list.

    Returns:
        Times, (N + 1,).

    Example:
        >>> import scoresde as ss
        >>> sde = ss.Discrete(ss.processes.betas("linear", 1000))
        >>> ss.interop.respaced(sde, "ddim4").tolist()
        [751.0, 501.0, 251.0, 1.0, 0.0]
        >>> ss.interop.respaced(sde, "2,3").tolist()
        [1000.0, 751.0, 501.0, 500.0, 1.0, 0.0]

    References:
        | Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), arXiv:2102.09672
    """
    if not isinstance(sde, Discrete):
        raise TypeError(f"`sde` must be a Discrete process, got {type(sde).__name__}.")
    N = sde.N
    if isinstance(timestep_respacing, str) and timestep_respacing.startswith("ddim"):
        count = check.integer("timestep_respacing", int(timestep_respacing[4:]), at_least=1)
        stride = next((s for s in range(1, N + 1) if len(range(0, N, s)) == count), None)
        if stride is None:
            raise ValueError(f"`timestep_respacing`={timestep_respacing!r} needs a whole stride of {N} labels.")
        index = list(range(0, N, stride))
    else:
        text = timestep_respacing.split(",") if isinstance(timestep_respacing, str) else timestep_respacing
        index = _sections(N, [int(n) for n in text])
    return check_grid(sde, torch.tensor([*(i + 1 for i in reversed(index)), 0], dtype=torch.float64))


def _sections(N: int, counts: list[int]) -> list[int]:
    """Labels of sections of nearly equal size, `counts` of them in each, with both ends of every section."""
    size, rest = divmod(N, len(counts))
    index, start = [], 0
    for i, count in enumerate(counts):
        length = size + (i < rest)
        if not 1 <= count <= length:
            raise ValueError(f"`timestep_respacing` asks for {count} labels in a section of {length}.")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        index += [start + round(k * stride) for k in range(count)]
        start += length
    return index
