"""What the pictures show is what the numbers say."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import scoresde as ss
from scoresde import plots
from scoresde.training.losses import LossByNoise

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

SDE = ss.VP()
MIX = ss.GaussianMixture(SDE, torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), std=0.2)


@pytest.fixture(autouse=True)
def close() -> Iterator[None]:
    yield
    import matplotlib.pyplot as pyplot

    pyplot.close("all")


def run(shape: tuple[int, ...] = (40, 2), model: Any = MIX) -> ss.Solution:
    return ss.solve(model, shape, nfe=6, seed=0, watch=ss.Watch(save_at="all"))


def test_schedule_shows_each_process() -> None:
    figure = plots.schedule([SDE, ss.Flow(), ss.EDM()])
    levels, ratio, terms = figure.axes
    assert [len(ax.lines) for ax in figure.axes] == [6, 3, 6]
    u, alpha = levels.lines[0].get_data()
    assert torch.allclose(torch.tensor(alpha), SDE.alpha(torch.tensor(u, dtype=torch.float64) * SDE.T))
    assert "VP" in ratio.lines[0].get_label()
    again = plots.schedule(SDE, figure=figure)
    assert again is figure and len(figure.axes) == 3 and len(figure.axes[0].lines) == 2


def test_grid_marks_each_time_with_a_finite_level() -> None:
    grid = ss.grids.karras(SDE, 10)
    ax = plots.grid({"a": grid, "b": [1.0, 0.5, 0.0]}, SDE)
    marks = [line for line in ax.lines if line.get_marker() == "|"]
    assert [len(line.get_xdata()) for line in marks] == [10, 2], "λ is infinite at 0"
    assert marks[0].get_xdata()[0] == pytest.approx(SDE.lam(1.0))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert plots.grid(grid, ax=ax) is ax


def test_plan_shows_every_weight() -> None:
    table = ss.SDEDPMSolverPP(2).plan(SDE, ss.grids.karras(SDE, 6))
    figure = plots.plan(table)
    assert len(figure.axes) == 3, "states, evaluations and noise"
    drawn = torch.tensor(figure.axes[1].images[0].get_array().filled(0.0)).nan_to_num()
    wanted = sum(float(w) for row in table.rows for _, w in row.d)
    assert float(drawn.sum()) == pytest.approx(wanted)
    assert len(plots.plan(ss.DDIM().plan(SDE, ss.grids.karras(SDE, 50))).axes) == 2


def test_plan_with_weights_for_each_sample_shows_their_mean() -> None:
    times = torch.stack([ss.grids.karras(SDE, 4), ss.grids.uniform_t(SDE, 4)], 1)
    table = ss.DDIM().plan(SDE, times)
    assert any(isinstance(w, torch.Tensor) for row in table.rows for _, w in row.d)
    assert len(plots.plan(table).axes) == 2


def test_trajectory_of_points_starts_at_noise_and_ends_at_the_samples() -> None:
    solution = run()
    ax = plots.trajectory(solution)
    start, end = ax.lines[-2], ax.lines[-1]
    assert torch.allclose(torch.tensor(end.get_xydata()).float(), solution.x)
    assert start.get_label() == "t = 1" and end.get_label() == "t = 0"


def test_trajectory_of_numbers_and_of_dense_output() -> None:
    line = ss.GaussianMixture(SDE, torch.tensor([[-1.0], [1.0]]), std=0.2)
    assert len(plots.trajectory(run((5, 1), line)).lines) == 5
    dense = ss.solve(line, (3, 1), ss.Adaptive(rtol=1e-2, dense=True), seed=0)
    curve = plots.trajectory(dense).lines[0]
    assert len(curve.get_xdata()) == 41 and curve.get_ydata()[-1] == pytest.approx(float(dense.x[0, 0]))


def test_trajectory_of_images_is_a_strip() -> None:
    model = ss.GaussianMixture(SDE, torch.zeros(1, 3, 5, 4), std=0.2)
    ax = plots.trajectory(run((7, 3, 5, 4), model), count=2, columns=4)
    assert ax.images[0].get_array().shape == (2 * 6 - 1, 4 * 5 - 1, 3)
    assert next(label.get_text() for label in ax.get_xticklabels()) == "1"


def test_a_run_without_states_says_how_to_keep_them() -> None:
    with pytest.raises(ValueError, match=r"save_at='all'"):
        plots.trajectory(ss.solve(MIX, (4, 2), nfe=4, seed=0))


def test_field_draws_the_score() -> None:
    ax = plots.field(MIX, 0.3, arrows=5)
    arrows = ax.collections[0]
    at = torch.tensor([[-3.0, -3.0]])
    assert torch.allclose(torch.tensor([arrows.U[0], arrows.V[0]]).float(), MIX.score(at, 0.3)[0])
    assert len(ax.images) == 1, "the density of an exact model"
    net = ss.Denoiser(ss.nn.MLP(2, seed=0), SDE, predicts="eps")
    assert len(plots.field(net, 0.3, arrows=5, predicts="velocity").images) == 0


@pytest.mark.parametrize(
    ("shape", "what"),
    [
        ((9, 6, 5), "images"),
        ((9, 1, 6, 5), "images"),
        ((9, 3, 6, 5), "images"),
        ((60, 2), "lines"),
        ((9,), "patches"),
        ((9, 1), "patches"),
        ((9, 12), "lines"),
        ((9, 1, 12), "lines"),
    ],
)
def test_samples_are_drawn_as_what_they_are(shape: tuple[int, ...], what: str) -> None:
    ax = plots.samples(ss.Noise(0).normal(shape, draw=0) if len(shape) > 1 else torch.randn(shape))
    assert len(getattr(ax, what)) > 0


def test_images_keep_their_places_and_their_greys() -> None:
    x = torch.linspace(-1, 1, 4)[:, None, None].expand(4, 2, 3).clone()
    x[3, 0, 0] = 7.0  # beyond white
    picture = plots.samples(x, columns=2).images[0].get_array()
    assert picture.shape == (5, 7)
    assert picture[0, 0] == 0 and picture[0, 4] == pytest.approx(1 / 3) and picture[3, 0] == pytest.approx(2 / 3)
    assert picture[3, 4] == 1 and picture[2, 0] == 1, "cut values, and a white line between"


def test_events_that_no_picture_shows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x\[:, :3\]"):
        plots.samples(torch.zeros(2, 4, 8, 8))


def test_work_precision_draws_a_curve_for_each_pair() -> None:
    grids = (ss.grids.karras, ss.grids.uniform_lam)
    table = ss.analysis.work_precision([ss.DDIM(), ss.UniPC(2)], MIX, grids, nfes=(5, 8), n=8)
    ax = plots.work_precision(table, of="rmse")
    assert len(ax.lines) == 4
    assert list(ax.lines[0].get_ydata()) == [row.rmse for row in table[:2]]


def test_orders_and_losses() -> None:
    measured = ss.analysis.convergence_order(ss.DDIM(), MIX, n=4)
    assert list(plots.orders(measured).lines[0].get_ydata()) == list(measured.errors)
    loss = LossByNoise(SDE)
    loss.add(torch.linspace(0.1, 1.0, 20, dtype=torch.float64), torch.arange(20.0))
    rows = loss.read()
    assert list(plots.loss_by_noise(rows).lines[0].get_ydata()) == [row["error"] for row in rows]
    with pytest.raises(ValueError, match="no finite errors"):
        plots.loss_by_noise(loss)


def test_calibration_shows_the_share_of_ranks() -> None:
    ranks = torch.tensor([0.1, 0.2, 0.3, 0.9])
    ax = plots.calibration(ranks)
    step = ax.lines[1]
    assert list(step.get_xdata()) == pytest.approx([0, 0.1, 0.2, 0.3, 0.9, 1])
    assert list(step.get_ydata()) == [0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize("shape", [(30, 2), (4, 1, 4, 4)])
def test_animation_has_a_frame_for_each_state(tmp_path: Path, shape: tuple[int, ...]) -> None:
    image = pytest.importorskip("PIL.Image")
    model = MIX if len(shape) == 2 else ss.GaussianMixture(SDE, torch.zeros(1, *shape[1:]), std=0.2)
    solution = run(shape, model)
    path = plots.animate(solution, tmp_path / "run.gif", seconds=1.0, dpi=30)
    with image.open(path) as gif:
        assert gif.n_frames >= len(solution.trajectory)
    with pytest.raises(ValueError, match=r"must end in \.gif"):
        plots.animate(solution, tmp_path / "run.mp4")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"scoresde\[plot\]"):
        plots.field(MIX, 0.5)
