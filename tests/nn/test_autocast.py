"""Half precision inside a network, float32 outside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import scoresde as ss
from scoresde.nn import Autocast
from scoresde.plan import run

VP = ss.VP()


class Seen(nn.Module):
    """A network that notes the dtypes of its state and of its activations."""

    width = 7

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.dtypes: list[tuple[torch.dtype, torch.dtype]] = []
        self.layouts: list[bool] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x)
        self.dtypes.append((x.dtype, h.dtype))
        self.layouts.append(x.is_contiguous(memory_format=torch.channels_last))
        out: Tensor = self.last(h.sin() + t.to(h.dtype)[:, None, None, None])
        return out


SHAPE = (2, 3, 8, 8)


@pytest.mark.parametrize("solver", [ss.DDIM(), ss.UniPC(2), ss.SDEDPMSolverPP(2)], ids=repr)
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_the_state_stays_in_float32_and_the_run_near_that_of_float32(how: str, solver: ss.solvers.Solver) -> None:
    exact = Seen().requires_grad_(False).eval()
    half = Seen().requires_grad_(False).eval()
    net = Autocast(half).eval() if how == "autocast" else half.bfloat16()
    plan = solver.plan(VP, ss.grids.uniform_lam(VP, 6))
    states: list[Tensor] = []
    runs = []
    for each in (exact, net):
        model = ss.Denoiser(each, VP, predicts="velocity")
        x = ss.Noise(0).normal(SHAPE, 0)
        runs.append(run(plan, model, x, ss.Noise(1), callback=lambda step: states.append(step.x)))
    assert {x.dtype for x in states} == {torch.float32}
    inside = (torch.float32, torch.bfloat16) if how == "autocast" else (torch.bfloat16, torch.bfloat16)
    assert set(half.dtypes) == {inside}
    error = float((runs[1] - runs[0]).abs().max() / runs[0].abs().max())
    assert 0 < error < 0.03, "a few units of bfloat16, 2⁻⁸"


def test_autocast_passes_on_what_the_network_has_and_refuses_other_dtypes() -> None:
    net = Autocast(Seen())
    assert net.width == 7 and net.inner_dtype is torch.bfloat16 and "bfloat16" in repr(net)
    with pytest.raises(AttributeError, match="height"):
        net.height  # noqa: B018
    with pytest.raises(ValueError, match=r"`dtype` must be torch\.bfloat16 or torch\.float16"):
        Autocast(Seen(), torch.float32)
    x = torch.ones(SHAPE)
    assert net(x, torch.ones(2)).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu"), "and nothing else is under autocast"


def test_a_start_follows_the_layout_of_the_convolutions() -> None:
    net = Seen().requires_grad_(False).eval()
    model = ss.Denoiser(net, VP, predicts="v")
    rows = ss.sample(model, SHAPE, steps=2, seed=0)
    assert not any(net.layouts)
    net.layouts.clear()
    net.to(memory_format=torch.channels_last)
    columns = ss.sample(model, SHAPE, steps=2, seed=0)
    assert all(net.layouts) and columns.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(columns, rows, rtol=1e-4, atol=1e-4)
