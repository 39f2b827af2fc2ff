r"""Weightings of the noise levels: weights w(t) on the squared error of x0.

All weights refer to :math:`|\hat x_0 - x_0|^2`, because they are then finite wherever σ > 0, also where α = 0. At a
given state the errors of all predictions are proportional. A prediction :math:`(a\,x_0 + b\,\varepsilon)/c` has the
squared error

.. math:: \left(\frac{a\sigma - b\alpha}{\sigma c}\right)^2 |\hat x_0 - x_0|^2,
   \qquad\text{as } \hat\varepsilon - \varepsilon = -\tfrac{\alpha}{\sigma}(\hat x_0 - x_0).

A weighting is any function ``(sde, t) -> w`` of a tensor of times (B,). With ρ = σ/α, SNR = 1/ρ²:

=================  =====================================================  =======================================
name               w on x0                                                the same weight on another error
=================  =====================================================  =======================================
``simple``, eps    SNR                                                    1 on ε
``x0``             1
``v``              (α² + σ²)²/σ²                                          1 on v
``velocity``       (dσ/dt − ρ dα/dt)²/ρ²                                  1 on the velocity: flow matching
``edm``            (ρ² + s²)/(ρ s)²                                       1 on EDM's F
``likelihood``     g² α²/σ⁴                                               g² on the score
``min_snr``        min(SNR, γ)
``soft_min_snr``   γ SNR/(γ + SNR)
``p2``             SNR/(k + SNR)^γ                                        (k + SNR)^−γ on ε
``sigmoid``        SNR · sigmoid(b − log SNR)                             sigmoid(b − log SNR) on ε
=================  =====================================================  =======================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.predictions import PREDICTIONS, form_of
from scoresde.processes.sde import SDE
from scoresde.training.describe import describe

Weighting = Callable[[SDE, Tensor], Tensor]

NAMES = ("simple", "eps", "x0", "v", "velocity", "edm", "likelihood", "min_snr", "soft_min_snr", "p2", "sigmoid")


@checked
def sensitivity(prediction: str, sde: SDE, t: Tensor, sigma_data: float = 1.0) -> Tensor:
    r"""Ratio of a prediction's squared error to that of x0, :math:`((a\sigma - b\alpha)/(\sigma c))^2`.

    Arguments:
        prediction: Name: ``"eps"``, ``"score"``, ``"x0"``, ``"v"``, ``"velocity"`` or ``"F"``.
        sde: Process.
        t: Times, (B,), positive.
        sigma_data: Standard deviation s of the data, for ``"F"``.
    """
    check.choice("prediction", prediction, PREDICTIONS)
    check.number("sigma_data", sigma_data, above=0)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    form = form_of(prediction, sde, t, alpha, sigma, sigma_data)
    out: Tensor = ((form.a - form.b * (alpha / sigma)) / form.scale) ** 2
    return out if isinstance(out, Tensor) else torch.full_like(t, out)


@checked
@dataclass(frozen=True)
class On:
    """Weight 1 on the squared error of one prediction, which need not be the network's output.

    Arguments:
        prediction: Name: ``"eps"``, ``"score"``, ``"x0"``, ``"v"``, ``"velocity"`` or ``"F"``.
        sigma_data: Standard deviation of the data, for ``"F"``, EDM's weighting.

    References:
        | Denoising Diffusion Probabilistic Models (Ho et al., 2020), arXiv:2006.11239, for ε
        | Progressive Distillation (Salimans & Ho, 2022), arXiv:2202.00512, for v
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv:2206.00364,
          for F
    """

    prediction: str
    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        check.choice("prediction", self.prediction, PREDICTIONS)
        check.number("sigma_data", self.sigma_data, above=0)

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return sensitivity(self.prediction, sde, t, self.sigma_data)


@checked
def likelihood(sde: SDE, t: Tensor) -> Tensor:
    r"""Weight g² on the squared error of the score.

    .. math:: w = g^2\frac{\alpha^2}{\sigma^4} = \frac{2\alpha(\dot\sigma\alpha - \dot\alpha\sigma)}{\sigma^3}

    With uniform times, :math:`\tfrac{D(T - t_{min})}{2}` times the loss bounds −log p in nats, up to a term that does
    not depend on the network. The code uses the second form, which is finite where α = 0 and g is infinite.

    Arguments:
        sde: Process.
        t: Times, (B,), positive.

    References:
        | Maximum Likelihood Training of Score-Based Diffusion Models (Song et al., 2021), arXiv:2101.09258
    """
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    return 2 * (alpha / sigma) * (sde.sigma_dot(t) * (alpha / sigma) - sde.alpha_dot(t)) / sigma


@checked
@dataclass(frozen=True)
class MinSNR:
    """The weighting min(SNR, γ).

    Arguments:
        gamma: Largest weight γ.

    References:
        | Efficient Diffusion Training via Min-SNR Weighting Strategy (Hang et al., 2023), arXiv:2303.09556
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        check.number("gamma", self.gamma, above=0)

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return _snr(sde, t).clamp_max(self.gamma)


@checked
@dataclass(frozen=True)
class SoftMinSNR:
    r"""A smooth minimum, :math:`\gamma\,\mathrm{SNR}/(\gamma + \mathrm{SNR}) = 1/(\rho^2 + 1/\gamma)`.

    Arguments:
        gamma: Limit γ of the weight; 1/s² for data of standard deviation s.

    References:
        | Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion Transformers
          (Crowson et al., 2024), arXiv:2401.11605
    """

    gamma: float = 4.0

    def __post_init__(self) -> None:
        check.number("gamma", self.gamma, above=0)

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        alpha2, sigma2 = sde.alpha(t) ** 2, sde.sigma(t) ** 2
        return self.gamma * alpha2 / (self.gamma * sigma2 + alpha2)


@checked
@dataclass(frozen=True)
class P2:
    r"""Perception-prioritised weighting: weight :math:`(k + \mathrm{SNR})^{-\gamma}` on ε.

    Arguments:
        k: Offset k of the SNR.
        gamma: Exponent γ; 0 gives ``simple``.

    References:
        | Perception Prioritized Training of Diffusion Models (Choi et al., 2022), arXiv:2204.00227
    """

    k: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        check.number("k", self.k, above=0)
        check.number("gamma", self.gamma, at_least=0)

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        snr = _snr(sde, t)
        return snr * (self.k + snr) ** -self.gamma


@checked
@dataclass(frozen=True)
class Sigmoid:
    r"""Weight sigmoid(b − log SNR) on ε; b = log γ gives :class:`SoftMinSNR`.

    Arguments:
        b: Log signal-to-noise ratio at which the weight on ε is one half.

    References:
        | Understanding Diffusion Objectives as the ELBO with Simple Data Augmentation (Kingma & Gao, 2023),
          arXiv:2303.00848
        | Simpler Diffusion (Hoogeboom et al., 2024), arXiv:2410.19324
    """

    b: float = 2.0

    def __post_init__(self) -> None:
        check.number("b", self.b)

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return SoftMinSNR(math.exp(self.b))(sde, t)


@checked
class Uncertainty(nn.Module):
    r"""Learned balance of the noise levels: the loss at t is divided by a learned estimate of its mean.

    .. math:: \frac{w(t)\,e}{\exp u(t)} + u(t), \qquad \min_u \Rightarrow e^{u(t)} = E[w\,e \mid t]

    u is a linear map of Fourier features of λ, initially zero. Its parameters belong to the :class:`DSM`, not to the
    network: construct the optimiser with ``loss.parameters()``.

    Arguments:
        base: Weighting w to balance, a name or a function; default ``"edm"``, with the `sigma_data` of the model.
        features: Number of Fourier features.

    References:
        | Multi-Task Learning Using Uncertainty to Weigh Losses (Kendall et al., 2018), arXiv:1705.07115
        | Analyzing and Improving the Training Dynamics of Diffusion Models (Karras et al., 2024), arXiv:2312.02696
    """

    frequencies: Tensor

    def __init__(self, base: str | Weighting = "edm", features: int = 64) -> None:
        super().__init__()
        self.base = check.choice("base", base, NAMES) if isinstance(base, str) else base
        check.integer("features", features, at_least=2)
        self.register_buffer("frequencies", torch.linspace(0, 2, features // 2).exp2() - 1)
        self.linear = nn.Linear(2 * (features // 2) + 1, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def __repr__(self) -> str:
        return f"Uncertainty({describe(self.base)}, features={len(self.frequencies) * 2})"

    @checked
    def log_loss(self, sde: SDE, t: Tensor) -> Tensor:
        """Logarithm u(t) of the estimated loss, (B,)."""
        lam = (sde.lam(t) / 4).clamp(-5, 5).to(self.frequencies)[:, None]
        angle = lam * self.frequencies
        features = torch.cat([lam, angle.cos(), angle.sin()], dim=1)
        # Under autocast, self.linear(features) would compute u in half precision.
        return (features * self.linear.weight).sum(1) + self.linear.bias

    @checked
    def forward(self, loss: Tensor, sde: SDE, t: Tensor) -> Tensor:
        """Balanced loss of each sample, (B,), from the weighted loss, (B,)."""
        u = self.log_loss(sde, t).to(loss)
        return loss * (-u).exp() + u


@checked
def named(name: str, sigma_data: float = 1.0) -> Weighting:
    """Return the weighting with a given name and default parameters.

    Arguments:
        name: Name in the table at the top of this module.
        sigma_data: Standard deviation of the data, for ``"edm"``.
    """
    known: dict[str, Weighting] = {
        "simple": On("eps"),
        **{kind: On(kind) for kind in ("eps", "x0", "v", "velocity")},
        "edm": On("F", sigma_data),
        "likelihood": likelihood,
        "min_snr": MinSNR(),
        "soft_min_snr": SoftMinSNR(),
        "p2": P2(),
        "sigmoid": Sigmoid(),
    }
    return known[check.choice("weighting", name, NAMES)]


def _snr(sde: SDE, t: Tensor) -> Tensor:
    return (sde.alpha(t) / sde.sigma(t)) ** 2
