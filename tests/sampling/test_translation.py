"""From one kind of image to another: by two models that share their noise, and by a network that sees the one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import scoresde as ss

F64 = torch.float64
VP = ss.VP()


def pair(here: ss.SDE, there: ss.SDE) -> tuple[ss.GaussianMixture, ss.GaussianMixture]:
    """Two mixtures in the plane with nothing in common."""
    a = ss.GaussianMixture(here, [[-1.5, 0.0], [1.0, 1.0]], std=[0.3, 0.5], weights=[0.3, 0.7])
    b = ss.GaussianMixture(there, [[0.0, -1.0], [1.2, 0.8], [-1.0, 1.0]], std=[0.4, 0.3, 0.5], weights=[0.5, 0.3, 0.2])
    return a, b


# By two models.


@pytest.mark.parametrize("there", [VP, ss.EDM(), ss.Flow(T=0.99)], ids=repr)
def test_what_one_model_encodes_the_other_decodes_to_its_own_law(there: ss.SDE) -> None:
    a, b = pair(VP, there)
    b = b if there is VP else ss.denoisers.Rescheduled(b, VP)  # type: ignore[assignment]
    x = a.sample(4000, VP.t_min, seed=0)
    y = ss.decode(b, ss.encode(a, x, steps=40), steps=40)
    exact = pair(VP, VP)[1].sample(4000, VP.t_min, seed=1)
    assert ss.metrics.moments(exact, y).max_z < 4
    assert ss.metrics.sliced_w2(y, exact) < 1.5 * ss.metrics.sliced_w2(exact, pair(VP, VP)[1].sample(4000, seed=2))
    assert ss.metrics.moments(exact, x).max_z > 20, "the two are told apart"
    back = ss.decode(a, ss.encode(b, y, steps=40), steps=40)
    assert float((back - x).square().mean().sqrt()) < 5e-4


def test_the_way_there_and_back_is_as_near_as_the_steps_are_many() -> None:
    a, b = pair(VP, VP)
    x = a.sample(200, VP.t_min, seed=0)
    gaps = []
    for steps in (20, 40, 80):
        y = ss.decode(b, ss.encode(a, x, steps=steps), steps=steps)
        back = ss.decode(a, ss.encode(b, y, steps=steps), steps=steps)
        gaps.append(float((back - x).square().mean().sqrt()))
    assert gaps[1] < gaps[0] / 3 and gaps[2] < gaps[1] / 3, gaps


def test_one_model_translates_between_its_conditions() -> None:
    a, b = pair(VP, VP)
    net = lambda x, t, label: torch.where(label[:, None] == 0, a.x0(x, t), b.x0(x, t))  # noqa: E731
    model = ss.Denoiser(net, VP, predicts="x0")
    x = a.sample(50, VP.t_min, seed=0)
    from_a, to_b = torch.zeros(50), torch.ones(50)
    y = ss.decode(model.given(label=to_b), ss.encode(model.given(label=from_a), x, steps=30), steps=30)
    torch.testing.assert_close(y, ss.decode(b, ss.encode(a, x, steps=30), steps=30), rtol=1e-4, atol=1e-4)


# By a network that sees the other image.


def pictures(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two steps y, and x = −0.8 y + 0.3 n, whose law given y is known."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(n, 1, 2, generator=g).repeat_interleave(4, dim=2)
    return -0.8 * y + 0.3 * torch.randn(n, 1, 8, generator=g), y


def test_a_network_that_sees_an_image_learns_what_follows_from_it() -> None:
    net = ss.nn.UNet(1, dims=1, width=16, multipliers=(1,), blocks=1, attention=(), heads=2, image_condition=1, seed=0)
    model = ss.Denoiser(net, VP, predicts="v")
    loss = ss.DSM(model)
    adam = torch.optim.Adam(net.parameters(), 4e-3)
    for step in range(300):
        x, y = pictures(64, step)
        adam.param_groups[0]["lr"] = 4e-3 * (1 - step / 300)
        adam.zero_grad()
        loss(x, noise=step, image=y).backward()
        adam.step()
    _, y = pictures(200, 1000)
    x = ss.sample(model.eval().given(image=y), (200, 1, 8), nfe=12, seed=0)
    assert float((x + 0.8 * y).square().mean().sqrt()) == pytest.approx(0.3, abs=0.08)
    assert float((x - x.mean(0)).square().mean().sqrt()) > 0.7, "and the image decides"
    one = ss.sample(model.given(image=y[:1]), (400, 1, 8), nfe=12, seed=0)
    assert float((one.mean(0) + 0.8 * y[0]).abs().max()) < 0.15
    assert float((one.std(0) - 0.3).abs().max()) < 0.12
