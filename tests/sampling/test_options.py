"""Every pair of options of `solve`: what observes a run changes no sample, and keeps what a callback sees."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss

VP = ss.VP()
NOISE = ss.Noise(0)
LABEL = torch.tensor([0.2, 1.0, 3.0])
GAUSSIAN = ss.Gaussian(VP, torch.zeros(2), torch.ones(2))
GRID = ss.grids.karras(VP, 5)


def net(x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
    y = x * time[:, None].to(x)
    return (y + (0.0 if label is None else label[:, None].to(x))).tanh()


MODEL = ss.Denoiser(net, VP, predicts="x0")
MODELS = {
    "leaf": MODEL,
    "given": MODEL.given(label=LABEL),
    "guided": ss.ClassifierFree(MODEL.given(label=LABEL), torch.tensor([1.5, 2.0, 0.5]), null={"label": 0.0}),
    "momentum": ss.ClassifierFree(
        MODEL.given(label=LABEL), 2.0, null={"label": 0.0}, rule=ss.guidance.Momentum(ss.guidance.APG())
    ),
}
SOLVERS = {
    "default": None,
    "UniPC": ss.UniPC(3),
    "stochastic": ss.SDEDPMSolverPP(2),
    "ancestral": ss.solvers.Ancestral(ss.DDIM()),
    "Heun": ss.EDMHeun(),
    "Euler": ss.EulerMaruyama(),
}
# What is observed, and whether gradients are recorded: none of these may change a sample.
OBSERVED: dict[str, dict[str, Any]] = {
    "callback": {"callback": lambda step: None},
    "hook": {"hook": lambda node, t, x: x},
    "save all": {"save_at": "all"},
    "save ends": {"save_at": "ends"},
    "save device": {"save_device": "cpu"},
    "progress": {"progress": True},
    "transitions": {"transitions": True},
}
GRADS = {"full": "full", "checkpoint": "checkpoint"}
# What is run: these change the samples, so each run is compared with the plain run of the same ones.
CHANGING: dict[str, dict[str, Any]] = {
    "steps": {"steps": 7},  # with a universal plan, a hook would have another solver
    "nfe": {"nfe": 7},
    "grid": {"grid": GRID},
    "grid list": {"grid": GRID.tolist()},
    "grid maker": {"grid": ss.grids.uniform_lam},
    "t_start": {"t_start": 0.7},
    "t_end": {"t_end": 0.1},
    "seeds": {"seed": [5, 0, 7]},
    "noise": {"seed": ss.Noise(3)},
    "path": {"seed": ss.Noise(3, path=True)},
    "float64": {"start": ss.Start(dtype=torch.float64)},
    "data_std": {"start": ss.Start(data_std=0.5)},
    "gaussian": {"start": GAUSSIAN},
    "x": {"shape_or_x": NOISE.normal((3, 2), 0)},
    **{f"model {name}": {"model": model} for name, model in MODELS.items() if name != "leaf"},
    **{f"solver {name}": {"solver": solver} for name, solver in SOLVERS.items() if solver is not None},
}
OPTIONS = [*OBSERVED, *GRADS, *CHANGING]
GRIDS = ("grid", "grid list")
STATES = ("callback", "hook", "save all", "save ends", "progress", "checkpoint")
REFUSED = {
    **{frozenset(("transitions", name)): "already keeps every state" for name in STATES},
    **{frozenset(pair): "give one of" for pair in itertools.product(("steps", "nfe"), GRIDS)},
    frozenset(("steps", "nfe")): "give one of",
    **{frozenset(pair): "has its own ends" for pair in itertools.product(GRIDS, ("t_start", "t_end"))},
}


def arguments(names: tuple[str, ...]) -> dict[str, Any] | None:
    """Arguments of `solve` for options that change samples; None if two options are the same argument."""
    parts = [CHANGING[name] for name in names if name in CHANGING]
    merged = {k: v for part in parts for k, v in part.items()}
    same = len(merged) < sum(map(len, parts))
    return None if same else {"model": MODEL, "shape_or_x": (3, 2), "seed": 0, **merged}


@functools.cache
def plain(names: tuple[str, ...]) -> tuple[ss.Solution, dict[float, Tensor]]:
    """A run without observation; and the states that a callback sees in another run, which must give the same."""
    given = arguments(names)
    assert given is not None
    seen: dict[float, Tensor] = {}
    want = ss.solve(**given)
    again = ss.solve(**given, watch=lambda step: seen.update({float(step.t): step.x}))
    assert torch.equal(again.x, want.x) and again.times == want.times and again.nfe == want.nfe, names
    assert list(seen) == list(dict.fromkeys(want.times)), names
    return want, seen


def check_pair(pair: tuple[str, ...]) -> None:
    given = arguments(pair)
    if given is None or {"full", "checkpoint"} == set(pair):
        return
    want, seen = plain(tuple(name for name in pair if name in CHANGING))
    watch = {k: v for name in pair for k, v in OBSERVED.get(name, {}).items()}
    if watch.get("save_at") == "ends":
        watch["save_at"] = [want.times[0], want.times[-1]]
    grad = next((GRADS[name] for name in pair if name in GRADS), "off")
    got = ss.solve(**given, watch=ss.Watch(**watch), grad=grad)
    assert torch.equal(got.x, want.x), pair
    assert got.times == want.times and (got.nfe, got.calls) == (want.nfe, want.calls), pair
    save_at = watch.get("save_at", [])
    kept = seen if save_at == "all" else {t: seen[t] for t in save_at}
    assert got.trajectory.keys() == kept.keys(), pair
    assert all(torch.equal(got.trajectory[t], x) for t, x in kept.items()), pair
    if "transitions" in pair:
        assert torch.equal(got.transitions[-1].x, want.x), pair


def test_every_pair_of_options_gives_the_samples_of_the_plain_run() -> None:
    refused = {}
    for pair in itertools.combinations(OPTIONS, 2):
        try:
            check_pair(pair)
        except ValueError as error:
            refused[frozenset(pair)] = str(error)
    assert refused.keys() == REFUSED.keys()
    assert all(REFUSED[pair] in text for pair, text in refused.items())
    assert torch.equal(CHANGING["x"]["shape_or_x"], NOISE.normal((3, 2), 0)), "the given state is left alone"


def test_kept_states_are_neither_the_given_state_nor_the_result() -> None:
    """Both belong to the caller, who may write into them later."""
    x = NOISE.normal((3, 2), 0)
    run = ss.solve(MODEL, x, ss.DDIM(), steps=4, watch=ss.Watch(save_at="all"))
    first, *_, last = run.trajectory.values()
    assert torch.equal(first, x) and torch.equal(last, run.x)
    assert first.data_ptr() != x.data_ptr() and last.data_ptr() != run.x.data_ptr()


@pytest.mark.parametrize("grad", ["full", "checkpoint"])
def test_gradients_are_refused_in_inference_mode_which_would_drop_them(grad: str) -> None:
    x = NOISE.normal((3, 2), 0)
    with torch.inference_mode():
        with pytest.raises(
            RuntimeError, match=f"`grad`='{grad}' records a gradient, which torch.inference_mode.. drops"
        ):
            ss.solve(MODEL, x, steps=3, grad=grad)
        assert bool(ss.solve(MODEL, x, steps=3).x.isfinite().all())
        for use in (lambda: ss.log_prob(MODEL, x, grad="full"), lambda: ss.elbo(MODEL, x, grad="full")):
            with pytest.raises(RuntimeError, match="inference_mode"):
                use()
        with pytest.raises(RuntimeError, match=r"a fit needs gradients, which torch.inference_mode\(\) drops"):
            ss.fit(ss.DDIM().plan(VP, GRID), MODEL, (9, 2))
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        out = ss.solve(MODEL, leaf, steps=3, grad=grad).x
    assert bool(torch.autograd.grad(out.sum(), leaf)[0].any()), "grad wins over no_grad, as documented"
