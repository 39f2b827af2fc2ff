"""Parts of the experiments, on tiny sizes; CI also runs every script with --quick."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import scoresde as ss

FOLDER = Path(__file__).parents[1] / "experiments"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])


def test_every_experiment_is_on_the_page_of_all() -> None:
    page = (FOLDER.parent / "docs" / "benchmarks.md").read_text()
    scripts = [path.name for path in FOLDER.rglob("*.py") if path.name[0] != "_" and "out" not in path.parts]
    assert len(scripts) > 40 and [name for name in scripts if name not in page] == []


# DDPM.


def test_ddpm_is_short_and_needs_public_names_only() -> None:
    source = (FOLDER / "ddpm.py").read_text()
    assert len(source.splitlines()) < 80
    tree = ast.parse(source)
    modules = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert not [m for m in modules if m and m.startswith("scoresde")]
    attributes = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert not {a for a in attributes if a.startswith("_")}
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "ss"}
    assert used <= set(ss.__all__)


def test_ddpm_written_out_takes_the_steps_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import ddpm

    sde = ss.Discrete(ss.processes.betas("linear", 30, beta_end=0.2))
    exact = ss.GaussianMixture(sde, [[-1.0, 0.5], [1.0, 0.0]], std=[0.2, 0.4])
    normals = torch.randn(30, 100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    class Recorded:
        """The same normals for both samplers."""

        path = False

        def __init__(self) -> None:
            self.next = iter(normals)

        def like(self, x: Tensor, draw: int) -> Tensor:
            return next(self.next)

    drawn = iter(normals)
    monkeypatch.setattr(ddpm.torch, "randn", lambda shape: next(drawn))
    mine = ddpm.sample(exact, (100, 2))
    noise: Any = Recorded()
    plan = ss.DDPM().plan(sde, ss.grids.index_grid(sde, sde.N))
    theirs = ss.plan.run(plan, exact.x0, noise.like(mine, 0), noise)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


# Evaluation of digits.


def test_the_judge_is_sure_of_digits_and_not_of_garbage() -> None:
    pytest.importorskip("sklearn")
    import _digits

    digits = _digits.load()
    judge = _digits.Judge(digits)
    assert judge.accuracy > 0.98
    real = digits.held_out
    blends = (real[:250] + real[250:]) / 2
    noise = torch.rand(250, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sure, unsure, lost = (float(judge.classes(x)[1].mean()) for x in (real, blends, noise))
    assert sure > 0.9 > 0.65 > unsure > lost and lost < 0.11


# Restored images.


def test_the_table_of_restored_images_measures_known_results() -> None:
    import _restoring

    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def classes(images: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the nearest image, with certainty."""
        return torch.cdist(images.flatten(1), x.flatten(1)).argmin(1), torch.ones(len(images))

    shift = torch.zeros(6, 1, 8, 8)
    shift[3:] = 0.5
    methods: Any = {
        "truth": lambda prior, seen, shape, setting: x,
        "shifted": lambda prior, seen, shape, setting: x + shift,
        "others": lambda prior, seen, shape, setting: x.roll(1, 0),
    }
    truth = _restoring.Truth(x, torch.arange(6), x, classes)
    half = {"half": ss.inverse.Downsample(2, (1, 8, 8))}
    table, pictures = _restoring.restored(None, truth, half, _restoring.Setting(4, 0.5, noise=0.1), methods)
    cells = {row.split(" | ")[1]: row.strip("| ").split(" | ")[2:] for row in table.splitlines()[2:]}
    assert cells["truth"] == cells["the truth"] == cells["nearest training digit"]
    assert cells["truth"][0] == "0.000"
    assert 0.78 < float(cells["truth"][1]) < 1.22  # root mean square of 96 normals: 1 ± 0.07
    assert float(cells["A⁺y"][1]) == 0
    assert float(cells["shifted"][0]) == pytest.approx(0.5 / 2**0.5, abs=6e-4)  # half a unit of the last digit
    assert cells["truth"][2] == "1.00"
    assert cells["others"][2] == "0.00"
    assert pictures["half"].shape == (6 * (2 + len(methods)), 1, 8, 8)


# Bits per dimension.


def test_densities_of_the_recipe_and_entropies_agree_with_closed_forms() -> None:
    import bits

    cov = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
    mix = ss.GaussianMixture(ss.VP(), torch.zeros(1, 2), cov=cov[None])
    exact = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=torch.float64), cov)
    assert bits.entropy(mix, 0.7) == pytest.approx(float(exact.entropy()), abs=1e-9)
    x = mix.sample(4, seed=0)
    run = bits.recipe(mix, x, 0, exact=True)
    torch.testing.assert_close(run.value, exact.log_prob(x), atol=2e-4, rtol=0)  # the prior at T has an error of 1e-4

    # A probe of random signs sees the diagonal of the Jacobian exactly.
    round_ = ss.GaussianMixture(ss.VP(), torch.zeros(1, 2), std=0.5)
    y = round_.sample(4, seed=0)
    torch.testing.assert_close(bits.recipe(round_, y, 0).value, round_.log_prob(y), atol=2e-4, rtol=0)

    # Samples of the checkerboard lie on its dark squares, half of a square of side 4.
    board = bits.shapes()["checkerboard"]
    row = (board.sample(500, 0) + bits.HALF).floor()
    assert bool((row.sum(1) % 2 == 0).all())
    assert len(row.unique(dim=0)) == 8
    assert board.entropy == pytest.approx(-float(board.log_prob(y)[0]))


# Parallel sampling.


@pytest.mark.parametrize("solver", [ss.DPMSolverPP(2), ss.SDEDPMSolverPP(2)], ids=repr)
def test_anderson_acceleration_ends_where_the_sequential_run_does(solver: Any) -> None:
    import parallel

    model = ss.GaussianMixture(ss.VP(), [[-1.0, 0.5], [1.0, 0.0]], std=0.2)
    plan = solver.plan(model.sde, ss.grids.karras(model.sde, 12))
    x, noise = model.sde.prior().sample((4, 2), ss.Noise(0), dtype=torch.float64), ss.Noise(1)
    done = ss.sample(model, x, plan, seed=noise)
    for m in (1, 3):
        result, sweeps = parallel.anderson(model, x, plan, noise, 1e-12, m)
        assert torch.allclose(result, done, atol=1e-9) and sweeps <= 12


# Cost of the loop.


def test_the_loops_that_checkouts_are_compared_by_run() -> None:
    import _against
    import loop_overhead

    race, states = loop_overhead.race, loop_overhead.STATES
    loops = _against.loops_of(loop_overhead, rows=10)
    assert loop_overhead.race is race and states == loop_overhead.STATES
    for who in _against.LOOPS:
        assert sum(name.endswith(f", {who}") for name in loops) >= len(states) * len(loop_overhead.SOLVERS)
    for name, loop in loops.items():
        if str(states[0]) not in name:
            loop()


# Latent diffusion.


def test_latent_bounds_of_images_are_in_one_scale() -> None:
    import latent

    x = (torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1).repeat(150, 1, 1, 1)
    vae = ss.nn.VAE(1, 2, width=8, std=0.25, seed=0)
    exact = ss.GaussianMixture(ss.VP(), torch.zeros(1, 2, 4, 4), std=1.0)  # the VAE's own prior, as a diffusion model
    identity = ss.data.Standardize(torch.zeros(1), torch.ones(1))
    result = latent.bounds(vae, identity, exact, x, latent.Options(draws=32, latents=2))  # type: ignore[arg-type]
    # log p(z) − log q(z | x) of one z instead of −KL(q ‖ p): equal in the mean over z.
    gap = result["VAE + diffusion"] - result["VAE"]
    error = float(gap.std()) / len(gap) ** 0.5
    assert error < 0.6 and abs(float(gap.mean())) < 4 * error
    assert float((result["VAE, 2 latents"] - result["VAE"]).mean()) > 0


# Errors of a trained network.


def test_the_excess_of_the_loss_is_the_error_to_the_truth() -> None:
    import loss_to_truth

    exact = loss_to_truth.anisotropic(ss.VP())
    model = ss.Denoiser(ss.nn.MLP(32, hidden=16, depth=1, seed=0), ss.VP(), predicts="v")
    for level in loss_to_truth.errors(model, exact, 2000, seed=0):
        assert level.loss - level.minimum == pytest.approx(level.error, abs=0.02 * level.loss)
    for level in loss_to_truth.errors(exact, exact, 100, seed=0):
        assert level.error == 0 and level.loss == level.minimum


# Posteriors.


def test_the_posterior_benchmark_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import posteriors

    monkeypatch.setattr(posteriors.ss.metrics, "c2st", lambda x, y, **_: 0.5)
    monkeypatch.setattr(posteriors, "draw", lambda rows, options: None)
    for name in {*posteriors.METHODS} - {*posteriors.FALLING, posteriors.TWISTED, "RePaint"}:
        monkeypatch.delitem(posteriors.METHODS, name)
    options = posteriors.Options(20, "2", "5,10", "0.3", "10,40", 12, tmp_path)
    rows = posteriors.main(options)
    monkeypatch.setattr(posteriors.Case, "row", None)
    again = posteriors.main(options)
    assert [row[:7] for row in again] == [row[:7] for row in rows]
    assert [row.sw2 for row in again] == pytest.approx([row.sw2 for row in rows], rel=1e-3)
    floor = [row for row in rows if row.method == "floor"]
    assert len(floor) == 2 and posteriors.middle(floor, "sw2") == pytest.approx(sum(row.sw2 for row in floor) / 2)
    methods = {line.split(" | ")[0] for line in (tmp_path / "posteriors.md").read_text().splitlines()}
    assert {f"| {name}" for name in ("floor", *posteriors.METHODS)} <= methods


# Toy data.


def test_points_in_the_plane_have_their_shapes() -> None:
    pytest.importorskip("sklearn")
    import toy2d

    for make in toy2d.DATA.values():
        x = make(200, np.random.RandomState(0))
        assert x.shape == (200, 2) and np.isfinite(x).all()
    board = toy2d.checkerboard(500, np.random.RandomState(0))
    assert ((np.floor(board).sum(1) % 2) == 0).all() and board.min() >= 0 and board.max() <= 4


def test_a_toy_model_learns() -> None:
    import toy2d

    data = torch.tensor([[1.5, -0.5]]).expand(64, 2)
    options = toy2d.Options(steps=60, batch=32, rate=1e-2)
    model = toy2d.train(data, ss.Flow(), "velocity", options)
    x = ss.sample(model, (50, 2), nfe=8, seed=0)
    assert float((x - data[0]).norm(dim=1).mean()) < 0.4


# The general script.


def small(train: Any, **options: Any) -> Any:
    size = {
        "width": 8,
        "multipliers": "1",
        "attention": "",
        "blocks": 1,
        "batch": 4,
        "samples": 4,
        "calls": 2,
        "warmup": 0,
        "ema": 0.9,
    }
    return train.Options(**{**size, "workers": 0, "steps": 2, "preview_every": 2, **options})


def run(train: Any, options: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    monkeypatch.setenv("TQDM_DISABLE", "1")
    return load_file(train.main(options))


def test_training_on_a_folder_with_classes_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    image = pytest.importorskip("PIL.Image")
    import train

    rng = np.random.default_rng(0)
    for k in range(6):
        place = tmp_path / "images" / ("ants" if k % 2 else "bees") / "more"
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.kron(255 * rng.integers(0, 2, (3, 3, 3)), np.ones((3, 4 + k, 1)))
        image.fromarray(pixels.astype(np.uint8)).save(place / f"{k}.png")
    folder = train.Folder(tmp_path / "images", 8, 3, labels=True)
    assert folder.classes == ["ants", "bees"] and len(folder) == 6
    assert folder[0]["x"].shape == (3, 8, 8) and folder[0]["label"] == 0 and folder[5]["label"] == 1
    assert float(folder[0]["x"].abs().max()) <= 1

    base = {"data": tmp_path / "images", "size": 8, "conditional": True}
    once = run(train, small(train, out=tmp_path / "a", steps=4, **base), monkeypatch)
    run(train, small(train, out=tmp_path / "b", steps=2, **base), monkeypatch)
    twice = run(train, small(train, out=tmp_path / "b", steps=4, **base), monkeypatch)
    assert once.keys() == twice.keys() and all(torch.equal(once[name], twice[name]) for name in once)
    with image.open(tmp_path / "b" / "step-000000004.png") as page:
        assert page.size == (4 * 8, 8)


@pytest.mark.parametrize("recipe", ["vp", "cosine", "ddpm", "edm", "flow"])
def test_every_recipe_trains_on_a_file(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    import train

    x = torch.randint(0, 256, (12, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "x.npy", x.numpy())
    result = run(train, small(train, recipe=recipe, data=tmp_path / "x.npy", out=tmp_path / "run"), monkeypatch)
    assert all(bool(w.isfinite().all()) for w in result.values())
    assert (tmp_path / "run" / "step-000000002.png").is_file()


def test_files_are_read_as_what_they_say(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    import train

    x, label = 3 * torch.rand(5, 3), torch.tensor([0, 2, 1, 2, 0])
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "label.npy", label.numpy())
    torch.save({"x": x, "label": label}, tmp_path / "x.pt")
    save_file({"x": x, "label": label}, tmp_path / "x.safetensors")
    for name in ("x.npy", "x.pt", "x.safetensors"):
        options = small(train, data=tmp_path / name, labels=tmp_path / "label.npy", conditional=True)
        data, event, std, classes = train.load(options)
        assert torch.equal(data["x"], x) and torch.equal(data["label"], label) and event == (3,) and classes == 3
    with pytest.raises(ValueError, match="needs labels"):
        train.load(small(train, data=tmp_path / "x.npy", conditional=True))
    with pytest.raises(ValueError, match="must be a folder"):
        train.read(tmp_path / "x.txt")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        train.load(small(train, data=tmp_path / "none"))


# Work and precision.


def test_errors_of_networks_have_their_size_in_what_the_network_predicts() -> None:
    from _problems import Network, lattice

    sde = ss.VP()
    exact = lattice(sde)
    for predicts, form in (("v", "v"), ("eps", "eps")):
        network = Network(exact, predicts, 0.05)
        assert network.kind.predicts == predicts
        assert not network.kind.exact
        gaps = []
        for i, t in enumerate((0.05, 0.2, 0.4, 0.6, 0.8)):
            x = exact.sample(500, t, seed=i)
            gaps.append(getattr(network, form)(x, t) - getattr(exact, form)(x, t))
        size = float(torch.cat(gaps).square().mean().sqrt())
        assert 0.03 < size < 0.07, predicts  # two waves at five times: a mean of few cosines


def test_the_loop_of_schedulers_takes_the_steps_of_ddim() -> None:
    """Schedulers of diffusers store their table in float32."""
    from _peers import of_diffusers
    from _problems import ring

    model = ring(ss.VP())
    x = ss.Noise(0).normal((4, 2), 0, dtype=torch.float64)
    (sampler,) = (s for name, grid, s in of_diffusers("VP", model.sde) if (name, grid) == ("DDIM", "trailing"))
    found = sampler(model, x, 5)
    assert found is not None and found[1] == 5
    plan = ss.DDIM().plan(model.sde, [1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    assert torch.allclose(found[0], ss.plan.run(plan, model.x0, x), atol=1e-4)


# Climate.


def test_kriging_is_the_formula_of_the_textbook() -> None:
    import climate

    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    mean, cov = torch.randn(1, 2, 3, generator=generator, dtype=torch.float64), root @ root.mT + torch.eye(6)
    where, std, y = torch.tensor([1, 4]), torch.tensor([0.2, 0.7]), torch.tensor([[0.3, -1.0]], dtype=torch.float64)
    mask = torch.zeros(6, dtype=torch.bool)
    mask[where] = True
    seen = ss.inverse.Measurement(ss.inverse.Mask(mask.reshape(1, 2, 3)), y, std=std)
    centre, deviation = climate.kriging(ss.Gaussian.of(ss.VP(), mean, cov), seen)
    gain = torch.linalg.solve(cov[where][:, where] + std.double().square().diag(), cov[where]).mT
    torch.testing.assert_close(centre[0].flatten(), mean.flatten() + gain @ (y[0] - mean.flatten()[where]))
    torch.testing.assert_close(deviation.flatten().square(), cov.diagonal() - (gain * cov[:, where]).sum(1))


def test_scores_of_samples_are_those_of_their_distribution() -> None:
    import climate

    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(1, 1, 60, 50, generator=generator, dtype=torch.float64)
    drawn = torch.randn(1, 16, 1, 60, 50, generator=generator, dtype=torch.float64)
    weight = torch.ones(60, 1, dtype=torch.float64)

    def scores(row: str) -> list[float]:
        return [float(v) for v in row.split("|")[2:7]]

    _, crps, spread, ratio, inside = scores(climate.of_gaussian("", truth, 0 * truth, 1 + 0 * truth, weight))
    _, crps_drawn, _, ratio_drawn, inside_drawn = scores(climate.of_samples("", truth, drawn, weight))
    # 3000 cells: standard errors below 0.01 each.
    assert abs(crps - torch.pi**-0.5) < 0.03 and abs(crps_drawn - crps) < 0.03
    assert spread == 1 and abs(ratio - 1) < 0.05 and abs(ratio_drawn - 1) < 0.05
    assert abs(inside - 0.9) < 0.03 and abs(inside_drawn - 0.9) < 0.03


# Autoguidance.


def test_the_tree_is_standardised_and_its_judge_is_right_about_true_samples() -> None:
    import autoguidance

    truth, both = autoguidance.trees()
    assert truth.means.shape == (127 * autoguidance.BEADS, 2) and len(both.weights) == 2 * len(truth.weights)
    torch.testing.assert_close(both.mean(), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(both.covariance().diagonal(), torch.full((2,), 0.25, dtype=torch.float64))
    judge = autoguidance.Judge.of(truth, 300)
    levels = judge.expected().split([2**k for k in range(7)])
    torch.testing.assert_close(torch.stack([v.sum() for v in levels]), torch.full((7,), 1 / 7, dtype=torch.float64))
    right, shifted = judge.row(truth.sample(300, seed=1)), judge.row(truth.sample(300, seed=1) + 0.1)
    entropy = -float(truth.log_prob(truth.sample(2000, seed=2)).mean())
    assert abs(right["log-likelihood"] + entropy) < 5 * right["error"]
    assert right["outside"] < 0.01 + 5 * (0.01 / 300) ** 0.5 and shifted["outside"] > 0.3
    assert right["imbalance"] < 0.3 < shifted["imbalance"]


# MCGDiff's table.


def test_the_first_row_of_the_table_is_a_floor() -> None:
    import mcgdiff

    options = mcgdiff.Options(samples=300, nfe=20)
    k = mcgdiff.task(8, 2, 0, options)
    A, y, std = k.seen.operator.matrix(), k.seen.y[0], float(k.seen.std)
    means = k.prior.means
    gaps = torch.distributions.MultivariateNormal(means @ A.T, A @ A.T + std**2 * torch.eye(2)).log_prob(y)
    weights = torch.softmax(k.prior.weights.log() + gaps, 0)
    gain = torch.linalg.solve(A @ A.T + std**2 * torch.eye(2).double(), A).T
    mean = weights @ (means + (y - means @ A.T) @ gain.T)  # Bayes' rule for a mixture of unit Gaussians
    x = ss.inverse.posterior(k.prior, k.seen).sample(4000, seed=2)
    assert bool(((x.mean(0) - mean).abs() < 5 * x.std(0) / 4000**0.5).all())
    mean_value, error = mcgdiff.interval([1.0, 2.0, 4.0])
    assert mean_value == pytest.approx(7 / 3) and error == pytest.approx((7 / 9) ** 0.5)
