"""Saved models of every adapter: with the bare network given again, the loaded one samples the same to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_code_bases import ADAPTERS
from torch import Tensor, nn

import scoresde as ss
from scoresde import interop
from scoresde.denoisers import clocks
from scoresde.denoisers.saving import MANIFEST
from scoresde.interop import LoadError


class Own(nn.Module):
    """A network that the library does not know, whose output depends on its label in every digit."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(3, outputs)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        out: Tensor = self.linear(x) + torch.sin(1e-2 * timestep)[:, None].to(x.dtype)
        return out


def same(first: ss.Denoiser, again: ss.Denoiser, event: tuple[int, ...]) -> None:
    assert type(again.net) is type(first.net)
    t = torch.linspace(first.sde.t_min, first.sde.T, 41, dtype=torch.float64)
    if isinstance(first.time, str) or first.time is None:
        assert again.time == first.time
    else:
        assert torch.equal(again.time(t), first.time(t))  # type: ignore[operator, misc]
    draws = [ss.sample(m.eval(), (4, *event), nfe=5, seed=0) for m in (first, again)]
    assert draws[0].isfinite().all() and torch.equal(*draws)


@pytest.mark.parametrize("name", ADAPTERS)
def test_networks_of_code_bases_are_given_bare(name: str, tmp_path: Path) -> None:
    make, adapt, _ = ADAPTERS[name]
    net = make()
    net.scale.data.fill_(0.9)  # type: ignore[union-attr]
    first = adapt(net)
    path = first.save(tmp_path / "m")
    again = ss.load(path, net=make())
    same(first, again, (2, 1, 1))
    same(first, ss.load(path, net=adapt(make()).net), (2, 1, 1))  # type: ignore[arg-type]
    with pytest.raises(LoadError, match=rf"how to build its network, .*{type(net).__name__}; give the network as load"):
        ss.load(path)


MORE = {
    "DDPM, data, log-variance": lambda net: interop.from_ddpm(
        net, torch.linspace(1e-3, 0.3, 50), predicts="x0", learned_variance="log"
    ),
    "guided diffusion, cosine": lambda net: interop.from_guided_diffusion(
        net, "cosine", diffusion_steps=300, rescale_timesteps=True, predict_xstart=True
    ),
    "score_sde ve, levels": lambda net: interop.from_score_sde(net, "ve", discrete=37, sigma_min=0.02, sigma_max=30.0),
    "score_sde vp, levels": lambda net: interop.from_score_sde(net, "vp", discrete=37, beta_max=15.0),
    "score_sde vp": lambda net: interop.from_score_sde(net, "vp", beta_min=0.2),
    "k-diffusion": lambda net: interop.from_kdiffusion(net, sigma_max=20.0),
    "EDM": lambda net: interop.from_edm(net, sigma_max=50.0),
    "rectified flow": interop.from_flow,
    "flow on another process": lambda net: interop.from_flow(net, sde=ss.Trig(), data_at=1, time_first=False),
}


@pytest.mark.parametrize("name", MORE)
def test_options_of_adapters_are_kept(name: str, tmp_path: Path) -> None:
    twice = name.startswith(("DDPM", "guided"))
    make = lambda: Own(6 if twice else 3)  # noqa: E731
    first = MORE[name](make())
    again = ss.load(first.save(tmp_path / "m"), net=make())
    assert again.kind == first.kind and again.shared == first.shared
    same(first, again, (3,))
    same(again, ss.load(again.save(tmp_path / "twice"), net=make()), (3,))


TOKENS = {"BlockRefinement", "DiscreteDDIM", "EntropyBound", "Helios", "HeliosDMD", "Piflow"}
NAMELESS = {"Amused", "RFD4Proteina", "VQDiffusion", "ConsistencyDecoder"}  # no defaults; refused like the tokens


@pytest.mark.filterwarnings("ignore")  # of their own deprecations
def test_every_scheduler_of_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; it comes with the extra `test`")
    names = {n for n in dir(diffusers) if n.endswith("Scheduler")} - {f"{n}Scheduler" for n in TOKENS | NAMELESS}
    configs: list[Any] = [getattr(diffusers, n)() for n in sorted(names)]
    configs += [
        diffusers.DDPMWuerstchenScheduler(scaler=k, s=0.01) for k in (0.5, 2.0)
    ] + [
        diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
        diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=700),
    ]  # fmt: skip
    for k, scheduler in enumerate(configs):
        first = interop.from_diffusers(Own(), scheduler)
        path = first.save(tmp_path / str(k))
        if "given" in json.loads((path / MANIFEST).read_text())["process"]:
            with pytest.raises(LoadError, match=r"process is defined by code.*load\(folder, sde=\.\.\.\)"):
                ss.load(path, net=Own())
            same(first, ss.load(path, net=Own(), sde=interop.sde_from_diffusers(scheduler)), (3,))
        else:
            same(first, ss.load(path, net=Own()), (3,))


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_a_compiled_network_inside_is_saved_as_the_network(tmp_path: Path) -> None:
    net = Own()
    first = interop.from_flow(torch.compile(net, backend="eager"), data_at=1)
    path = first.save(tmp_path / "m")
    for given in (Own(), torch.compile(Own(), backend="eager")):
        same(first, ss.load(path, net=given), (3,))
    inside = ss.nn.MLP(3, hidden=8)
    first = interop.from_flow(torch.compile(inside, backend="eager"))
    same(first, ss.load(first.save(tmp_path / "known")), (3,))


def test_a_function_inside_an_adapter_has_no_weights_to_save(tmp_path: Path) -> None:
    for adapted in (interop.from_edm(lambda x, sigma: x), interop.from_flow(lambda x, t: x)):
        with pytest.raises(TypeError, match="`net` must be a module to be saved, got the function <lambda>"):
            adapted.save(tmp_path / "m")


def test_another_network_than_that_of_the_adapter_is_refused(tmp_path: Path) -> None:
    path = interop.from_edm(Own()).save(tmp_path / "m")
    with pytest.raises(LoadError, match=r"do not fit <EDMNet.*\(3, 3\) instead of \(5, 3\)"):
        ss.load(path, net=Own(5))


class Named(clocks.Affine):
    """A time of one's own that looks like one of the library's."""

    def __call__(self, t: Tensor) -> Tensor:
        return torch.exp(self.a * t)


def test_a_time_of_ones_own_is_code_even_if_it_is_derived_from_ours(tmp_path: Path) -> None:
    path = ss.Denoiser(Own(), ss.VP(), predicts="eps", time=Named(2.0, 1.0)).save(tmp_path / "m")
    with pytest.raises(LoadError, match="time is a function, Named"):
        ss.load(path, net=Own())
    again = ss.load(path, net=Own(), time=Named(2.0, 1.0))
    assert isinstance(again.time, Named)
