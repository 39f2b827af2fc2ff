"""What is lost or kept when a scheduler of ours replaces one of diffusers: clipping, and the process of the network."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import scoresde as ss
from scoresde.interop import from_diffusers, sde_from_diffusers, to_diffusers

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; it comes with the extra `test`")


@pytest.mark.parametrize(
    ("config", "fix"),
    [
        ({}, r"clip_sample=True.*clip=1\.0 .*or clip=None"),
        ({"clip_sample_range": 2.5}, r"clip=2\.5 \(their `clip_sample_range`\)"),
        ({"clip_sample": False, "thresholding": True}, r"thresholding=True.*clip=1\.0 "),
    ],
)
def test_lost_clipping_is_named_once_and_an_explicit_value_is_silent(config: dict[str, Any], fix: str) -> None:
    theirs = diffusers.DDPMScheduler(**config)
    with pytest.warns(UserWarning, match=fix) as seen:
        made = to_diffusers(ss.UniPC(3), theirs)
    assert len(seen) == 1 and seen[0].filename == __file__ and made.clip is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.set_timesteps(3)
        assert to_diffusers(ss.UniPC(3), theirs, clip=None).clip is None
        assert to_diffusers(ss.UniPC(3), theirs, clip=2.0).clip == 2
    with pytest.raises(ValueError, match="`clip` must be one of 'warn', got 'yes'"):
        to_diffusers(ss.UniPC(3), theirs, clip="yes")


@pytest.mark.parametrize(
    "theirs", [diffusers.DDPMScheduler(clip_sample=False), diffusers.FlowMatchEulerDiscreteScheduler()]
)
def test_schedulers_that_do_not_clip_are_replaced_silently(theirs: Any) -> None:
    assert to_diffusers(ss.UniPC(3), theirs).clip is None


@pytest.mark.parametrize(
    "theirs",
    [
        diffusers.DDPMScheduler(prediction_type="v_prediction", clip_sample=False),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.EDMEulerScheduler(),
    ],
)
def test_our_scheduler_is_read_as_the_one_it_replaced(theirs: Any) -> None:
    net, x = torch.nn.Conv2d(3, 3, 1), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pipe = SimpleNamespace(unet=lambda x, timestep: net(x) * timestep.reshape(-1, 1, 1, 1), scheduler=theirs)
    before = from_diffusers(pipe)
    pipe.scheduler = to_diffusers(ss.UniPC(3), theirs, grid="uniform_lam", seed=1, clip=1.0)
    after = from_diffusers(pipe)
    t = before.sde.T / 2
    assert repr(after.sde) == repr(before.sde) and torch.equal(after.x0(x, t), before.x0(x, t))
    plan = ss.DDIM().plan(before.sde, ss.grids.uniform_lam(before.sde, 2))
    for config in (pipe.scheduler.config, json.loads(to_diffusers(plan, theirs).to_json_string())):
        assert repr(sde_from_diffusers(config)) == repr(before.sde)
