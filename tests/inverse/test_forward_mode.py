"""Denoisers that compute gradients themselves, inside forward-mode differentiation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import scoresde as ss
from scoresde import inverse
from scoresde.guidance import ClassifierGuidance
from scoresde.likelihood import Probes, Tolerance, jacobian_products

F64 = torch.float64
MIX = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0, 0.5, 0.0], [1.0, -0.5, 0.3]], dtype=F64), std=0.4)
X = MIX.sample(3, seed=1)
MASK = inverse.Mask(torch.tensor([True, False, True]))
SEEN = inverse.Measurement(MASK, torch.tensor([[0.1, -0.3], [0.0, 0.2], [0.4, 0.0]], dtype=F64), std=0.5)


class Small(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), activation, nn.Linear(8, 3)).double()
        weights = ss.Noise(2).normal((sum(p.numel() for p in self.parameters()),), 0, dtype=F64)
        nn.utils.vector_to_parameters(0.4 * weights, self.parameters())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


NET = ss.Denoiser(Small(nn.Tanh()), ss.VP(), predicts="x0")


def wrapped(model: ss.denoisers.AbstractDenoiser) -> dict[str, ss.denoisers.AbstractDenoiser]:
    return {
        "DPS": inverse.DPS(model, SEEN),
        "DPS of the norm": inverse.DPS(model, SEEN, norm=True),
        "PiGDM": inverse.PiGDM(model, SEEN),
        "MMPS": inverse.MMPS(model, SEEN),
        "TMPD": inverse.TMPD(model, SEEN),
        "classifier": ClassifierGuidance(model, lambda x, t: -(x**4).sum(1)),
        "classifier of x0": ClassifierGuidance(model, lambda x: -(x**4).sum(1), sees="x0"),
    }


@pytest.mark.parametrize("name", wrapped(MIX))
@pytest.mark.parametrize("model", [MIX, NET], ids=["mixture", "network"])
@pytest.mark.parametrize("recorded", [False, True], ids=["no_grad", "grad"])
def test_forward_products_are_those_of_the_whole_jacobian(
    name: str, model: ss.denoisers.AbstractDenoiser, recorded: bool
) -> None:
    denoiser = wrapped(model)[name]
    f = lambda x: denoiser.x0(x, 0.4)  # noqa: E731
    v = ss.Noise(3).normal((2, 3, 3), 0, dtype=F64)
    with torch.set_grad_enabled(recorded):
        found = jacobian_products(f, X, autodiff="forward")(v)
    step = 1e-5
    expected = torch.stack([(f(X + step * u) - f(X - step * u)) / (2 * step) for u in v]).detach()
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-6)  # step² and rounding / step


@pytest.mark.parametrize("name", ["PiGDM", "MMPS", "classifier of x0"])
def test_log_densities_do_not_depend_on_the_mode(name: str) -> None:
    two = Tolerance(steps=2)
    forward, reverse = (
        ss.log_prob(wrapped(MIX)[name], X, probes=Probes(autodiff=mode), tolerance=two).value
        for mode in ("forward", "reverse")
    )
    torch.testing.assert_close(forward, reverse, rtol=1e-10, atol=1e-10)


def test_an_operation_without_a_forward_mode_is_named_with_the_fix() -> None:
    silu = ss.Denoiser(Small(nn.SiLU()), ss.VP(), predicts="x0")
    with pytest.raises(NotImplementedError, match=r"silu_backward.*use `autodiff`='reverse'"):
        ss.log_prob(inverse.DPS(silu, SEEN), X, probes=Probes(autodiff="forward"), tolerance=Tolerance(steps=1))
