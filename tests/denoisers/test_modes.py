"""Networks in training mode, and outputs that are no predictions: noticed on every path."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scoresde as ss

VP = ss.VP()
X = ss.Noise(0).normal((6, 2), 0)


class Net(nn.Module):
    """A network with one more module of a kind."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.first, self.part = nn.Linear(2, 2), part

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        h = self.first(x)
        out = self.part(h)
        return out[0] if isinstance(out, tuple) else out


def model(part: nn.Module) -> ss.Denoiser:
    torch.manual_seed(0)
    return ss.Denoiser(Net(part), VP, predicts="x0")


class StochasticDepth(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return x


ACTIVE: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Dropout(0.5),
    "alpha dropout": lambda: nn.AlphaDropout(0.1),
    "batch norm": lambda: nn.BatchNorm1d(2),
    "rnn": lambda: nn.GRU(2, 2, num_layers=2, dropout=0.3),
    "rrelu": lambda: nn.RReLU(),
    "stochastic depth": lambda: StochasticDepth(0.2),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)),
}
QUIET: dict[str, Callable[[], nn.Module]] = {
    "no dropout": lambda: nn.Dropout(0.0),
    "layer norm": lambda: nn.LayerNorm(2),
    "batch norm without statistics": lambda: nn.BatchNorm1d(2, track_running_stats=False),
    "no stochastic depth": lambda: StochasticDepth(0.0),
    "linear": lambda: nn.Linear(2, 2),
}
PATHS: dict[str, Callable[[Any], Any]] = {
    "sample": lambda m: ss.sample(m, X, steps=3),
    "solve": lambda m: ss.solve(m, X, ss.UniPC(2), nfe=4),
    "guided": lambda m: ss.sample(
        ss.ClassifierFree(m, 2.0, null={"label": 0.0}).given(label=torch.ones(6)), X, steps=3
    ),
    "adaptive": lambda m: ss.sample(m, X, ss.Adaptive(), seed=0),
    "encode": lambda m: ss.encode(m, X, steps=3),
    "log_prob": lambda m: ss.log_prob(m, X),
    "elbo": lambda m: ss.elbo(m, X, seed=0),
    "fit": lambda m: ss.fit(ss.DDIM().plan(VP, ss.grids.karras(VP, 3)), m, (9, 2), steps=1, what=("weights",)),
    "gits": lambda m: ss.fitting.gits(m, (9, 2), 3, fine=6),
    "align_your_steps": lambda m: ss.fitting.align_your_steps(m, X, 3, fine=6),
    "path_kl": lambda m: ss.likelihood.path_kl(m, model(nn.Identity()), X, seed=0),
    "langevin": lambda m: ss.sampling.langevin(m, X, 0.5, 0.1, seed=0),
}


@pytest.mark.parametrize("path", PATHS)
def test_training_mode_warns_once_and_names_the_module(path: str) -> None:
    trained = model(nn.Dropout(1e-9))  # so small that error control does not notice
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PATHS[path](trained)
    texts = [str(w.message) for w in caught if "training mode" in str(w.message)]
    assert len(texts) == 1 and "net.part` is Dropout(p=1e-09" in texts[0] and "eval()" in texts[0]
    trained.net.eval()
    PATHS[path](trained)  # no warning, which would be an error here


@pytest.mark.parametrize("name", ACTIVE)
def test_modules_that_act_in_training_are_noticed(name: str) -> None:
    with pytest.warns(UserWarning, match="training mode, which changes its predictions: `net.part"):
        ss.sample(model(ACTIVE[name]()), X, steps=2)
    ss.sample(model(ACTIVE[name]().eval()), X, steps=2)


@pytest.mark.parametrize("name", QUIET)
def test_other_modules_may_be_in_training_mode(name: str) -> None:
    trained = model(QUIET[name]())
    in_training = ss.sample(trained, X, steps=3)
    trained.net.eval()
    assert torch.equal(ss.sample(trained, X, steps=3), in_training), "the mode does not matter"


OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "int64": lambda x: x.round().long(),
    "bool": lambda x: x > 0,
    "complex64": lambda x: x.to(torch.complex64),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_that_are_no_predictions_are_refused_on_every_path(kind: str) -> None:
    wrong = ss.Denoiser(lambda x, time, label=None: OUTPUTS[kind](x), VP, predicts="eps")
    for path, use in PATHS.items():
        with pytest.raises(
            TypeError, match=f"`net` must return floating-point numbers, got {kind}: .*return the values"
        ):
            use(wrong)
        assert path
    with pytest.raises(TypeError, match=f"got {kind}"):
        ss.DSM(wrong)(X)


def test_a_class_conditional_network_without_a_label_warns() -> None:
    labelled = ss.Denoiser(ss.nn.MLP(2, hidden=8, depth=1, classes=3, seed=0), VP, predicts="x0")
    for use in (
        lambda: ss.sample(labelled, X, steps=2),
        lambda: ss.elbo(labelled, X, seed=0),
        lambda: ss.sample(ss.guidance.Clamp(labelled), X, steps=2),
    ):
        with pytest.warns(
            UserWarning, match=r"takes class labels and none is given.*condition dropout.*given\(label=y\)"
        ):
            use()
    for label in (torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor(3)):
        ss.sample(labelled.given(label=label), X, steps=2)  # no warning
    guided = ss.ClassifierFree(labelled, 2.0, null={"label": 3})
    ss.sample(guided.given(label=torch.zeros(6, dtype=torch.long)), X, steps=2)
    ss.sample(ss.Denoiser(ss.nn.MLP(2, hidden=8, depth=1, seed=0), VP, predicts="x0"), X, steps=2)
