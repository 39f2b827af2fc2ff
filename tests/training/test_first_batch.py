"""The trainer warns of data and labels that would train silently wrong, and of a run that has ended."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import scoresde as ss
from scoresde.training.first_batch import check_first_batch


def trainer(sde: ss.processes.SDE, data: Any, classes: int | None = None, **options: Any) -> ss.Trainer:
    net = ss.nn.MLP(2, classes=classes, seed=0)
    model = ss.Denoiser(net, sde, predicts="x0", **options)
    return ss.Trainer(ss.DSM(model), data, batch=32)


UNIT = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
EDM = {"precondition": ss.Preconditioning(0.5)}


@pytest.mark.parametrize(
    ("sde", "data", "options"),
    [
        (ss.VP(), 127.5 + 70 * UNIT, {}),
        (ss.VP(), 0.03 * UNIT, {}),
        (ss.Flow(), 8 * UNIT, {}),
        (ss.VP(), UNIT + 10, {}),
        (ss.EDM(), 70 * UNIT, EDM),
    ],
)
def test_data_on_another_scale_are_named_once(sde: ss.processes.SDE, data: torch.Tensor, options: Any) -> None:
    run = trainer(sde, data, **options)
    with pytest.warns(UserWarning, match=r"standard deviation .*Standardize\.fit\(data") as seen:
        run.fit(3)
    assert len(seen) == 1
    target = options["precondition"].sigma_data if options else 1.0
    trainer(sde, ss.data.Standardize.fit(data, target=target)(data), **options).fit(1)


@pytest.mark.parametrize(
    ("sde", "data", "options"),
    [
        (ss.VP(), (UNIT > 0).float(), {}),
        (ss.EDM(), 0.5 * UNIT, EDM),
        (ss.EDM(), 70 * UNIT, {}),
        (ss.VE(), 70 * UNIT, {}),
    ],
)
def test_usual_data_pass(sde: ss.processes.SDE, data: torch.Tensor, options: Any) -> None:
    trainer(sde, data, **options).fit(1)


SHAPES = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))  # images on 0 … 1


MODEL = ss.Gaussian(ss.VP(), torch.zeros(1, 4, 4), torch.ones(1, 4, 4))


@pytest.mark.parametrize(
    ("images", "fix"), [(SHAPES, r"on 0 … 1: use 2 \* x - 1"), (255 * SHAPES, r"on 0 … 255: use x / 127\.5 - 1")]
)
def test_images_without_negative_values_are_named(images: torch.Tensor, fix: str) -> None:
    with pytest.warns(UserWarning, match=f"the first batch looks like images {fix}") as seen:
        check_first_batch(MODEL, images, {})
    assert len(seen) == 1
    with pytest.warns(UserWarning, match=f"`data` looks like images {fix}"):
        ss.data.check_scale(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # VE has levels for data of any scale
        check_first_batch(ss.Gaussian(ss.VE(), torch.zeros(1, 4, 4), torch.ones(1, 4, 4)), images, {})


def test_images_from_minus_one_to_one_pass_whatever_their_deviation() -> None:
    for power in (1, 8, 0.02):
        images = 2 * SHAPES**power - 1
        images[0, 0, 0, 0] = -1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ss.data.check_scale(images)
            check_first_batch(MODEL, images, {})
    with pytest.warns(UserWarning, match="standard deviation"):
        ss.data.check_scale(0.1 * SHAPES - 0.05)
    with pytest.warns(UserWarning, match="standard deviation"):
        ss.data.check_scale(torch.cat([2 * SHAPES**8 - 1] * 2, 1))  # two channels are no image


def test_forgotten_labels_are_named() -> None:
    run = trainer(ss.VP(), UNIT, classes=3)
    with pytest.warns(UserWarning, match="takes class labels and the data have none") as seen:
        run.fit(3)
    assert len(seen) == 1
    trainer(ss.VP(), {"x": UNIT, "label": torch.zeros(64, dtype=torch.long)}, classes=3).fit(1)


def test_an_own_loop_names_forgotten_labels_once() -> None:
    loss = ss.DSM(ss.Denoiser(ss.nn.MLP(2, classes=3), ss.VP(), predicts="eps"))
    with pytest.warns(UserWarning, match=r"takes class labels and the data have none.*loss\(x, label=y\)") as seen:
        [loss(UNIT) for _ in range(3)]
    assert len(seen) == 1
    fresh = ss.DSM(loss.model)
    fresh(UNIT, label=torch.zeros(64, dtype=torch.long))
    torch.compile(ss.DSM(loss.model), backend="eager", fullgraph=True)(UNIT, ss.Noise(0))


@pytest.mark.parametrize("label", [0, 2, 0.0, 4])
def test_a_class_is_no_null_label(label: float) -> None:
    model = ss.Denoiser(ss.nn.MLP(2, classes=3), ss.VP(), predicts="eps")
    with pytest.raises(ValueError, match=r"the index of no class is 3.*null=\{'label': 3\}"):
        ss.DSM(model, drop=0.1, null={"label": label})
    with pytest.raises(ValueError, match=r"the index of no class is 3.*torch.tensor\("):
        ss.ClassifierFree(model.given(label=torch.tensor([0])), 2.0, null={"label": label})
    ss.DSM(model, drop=0.1, null={"label": 3})
    ss.ClassifierFree(model, 2.0, null={"label": torch.tensor([0])})
    ss.ClassifierFree(ss.Denoiser(lambda x, t, label: x, ss.VP(), predicts="eps"), 2.0, null={"label": 0})


def test_a_run_that_has_ended_says_so() -> None:
    run = trainer(ss.VP(), UNIT)
    run.fit(3)
    with pytest.warns(UserWarning, match=r"does nothing.*call fit\(6\)"):
        run.fit(3)
    assert run.step == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.fit(4)
    assert run.step == 4
