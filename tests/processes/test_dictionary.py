"""Processes as dictionaries: what is read back is what was written, to the last bit."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from instances import SDES, inner_times
from torch import Tensor

import scoresde as ss
from scoresde.processes.dictionary import CLASSES

BY_CODE = (ss.processes.FromFunctions, ss.processes.FromDrift)
WRITTEN = {name: sde for name, sde in SDES.items() if not isinstance(sde, BY_CODE)} | {
    "one step": ss.Discrete([0.5]),
    "t_min of its own": ss.VE(sigma_max=7.0, T=0.9, t_min=0.02),
    "integers": ss.VP(beta_min=1, beta_max=3, T=2),
    "betas of float32": ss.Discrete(torch.linspace(1e-4, 0.02, 10), t_min=0.25),
    "Shifted twice": ss.processes.Shifted(ss.processes.Shifted(ss.Cosine(), 2.0), 1.5),
}


@dataclass(frozen=True)
class Power(ss.SDE):
    n: float = 2.0

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - t**self.n

    def _sigma(self, t: Tensor) -> Tensor:
        return t


@pytest.mark.parametrize("sde", WRITTEN.values(), ids=WRITTEN)
def test_the_round_trip_through_json_is_exact(sde: ss.SDE) -> None:
    back = ss.SDE.from_dict(json.loads(json.dumps(sde.to_dict(), allow_nan=False)))
    assert type(back) is type(sde) and back == sde
    t = torch.cat([inner_times(sde), torch.tensor([0.0, sde.t_min, sde.T], dtype=torch.float64)])
    for name in ("alpha", "sigma", "log_alpha", "log_sigma"):
        assert torch.equal(getattr(back, name)(t), getattr(sde, name)(t)), name
    assert torch.equal(back.g2(t[:-1]), sde.g2(t[:-1]))  # infinite at T where α(T) = 0
    assert (back.T, back.t_min) == (sde.T, sde.t_min)


def test_every_process_of_the_library_is_written_or_is_code() -> None:
    public = {v for v in vars(ss.processes).values() if isinstance(v, type) and issubclass(v, ss.SDE)} - {ss.SDE}
    assert public == {*CLASSES, *BY_CODE}
    assert {type(sde) for sde in WRITTEN.values()} == set(CLASSES)


@pytest.mark.parametrize(
    "sde", [SDES["two functions"], SDES["VP by drift"], Power()], ids=["functions", "drift", "own"]
)
def test_a_process_made_of_code_is_refused_with_the_way_to_do_it(sde: ss.SDE) -> None:
    with pytest.raises(TypeError, match=rf"{type(sde).__name__} is defined by code.*VP.*Rebuild.*sde="):
        sde.to_dict()
    if isinstance(sde, Power):
        with pytest.raises(TypeError, match="Power is defined by code"):
            ss.processes.Shifted(sde, 2.0).to_dict()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"process": "Warp"}, "process='Warp'.*VP, SubVP"),
        ({"process": ["VP"]}, "not one of"),
        ({"beta_min": 0.1}, "key 'process', got keys 'beta_min'"),
        ([1, 2], "got list"),
        ({"process": "VP", "beta": 1.0}, "arguments of VP.*beta"),
        ({"process": "VP", "beta_min": "0.1"}, "beta_min"),
        ({"process": "VP", "beta_min": -1.0}, "`beta_min` must be finite and above 0"),
        ({"process": "Shifted", "base": {"process": "Power"}, "shift": 2.0}, "process='Power'"),
        ({"process": "Discrete"}, "arguments of Discrete.*betas"),
    ],
)
def test_a_wrong_table_is_refused_by_name(table: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ss.SDE.from_dict(table)  # type: ignore[arg-type]
