"""DPM-Solver-v3's statistics: exact cases, convergence with estimated tables, and tables for each entry."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.plan import run

F64: dict[str, Any] = {"dtype": torch.float64}


def ring(sde: ss.SDE) -> ss.GaussianMixture:
    angle = torch.arange(8) * (math.pi / 4)
    return ss.GaussianMixture(sde, torch.stack([angle.cos(), angle.sin()], dim=1), std=0.1)


def flowed(model: ss.GaussianMixture, n: int) -> tuple[Tensor, Tensor]:
    """Starts, and the ends of the exact flow to t = 0."""
    sde = model.sde
    x = sde.prior(std=0.7).sample((n, *model.event), ss.Noise(0), **F64)
    near = sde.t_of_lam(sde.lam(sde.t_min) + 3.0)
    return x, model.x0(ss.analysis.exact_flow(model)(x, sde.T, near), near)


@pytest.mark.parametrize("sde", [ss.VP(), ss.EDM(), ss.Flow()], ids=lambda sde: type(sde).__name__)
def test_two_steps_are_exact_on_one_gaussian(sde: ss.SDE) -> None:
    """f = −l m and s = d log l/dλ there, so that g is constant: any number of steps is exact, to the splines' error."""
    mean = torch.tensor([1.5, -0.5, 0.3], **F64)
    model = ss.GaussianMixture(sde, mean[None], std=0.7)
    statistics = ss.fitting.estimate_statistics(model, model.sample(8, seed=0), n=128)
    x = ss.Noise(0).normal((4, 3), 0, **F64) * sde.sigma(sde.T)
    gaussian = model.component()
    first = sde.T if sde.alpha(sde.T) > 0 else 0.99
    for corrector in (False, True):
        plan = ss.solvers.DPMSolverV3(statistics, 2, corrector).plan(sde, [first, sde.t_of_lam(0.0), 0.0])
        gap = run(plan, model.x0, x) - gaussian.flow(x, first, 0.0)
        assert float(gap.abs().max()) < 2e-4, (sde, corrector)


@pytest.mark.parametrize("sde", [ss.VP(), ss.EDM()], ids=lambda sde: type(sde).__name__)
def test_estimated_tables_do_not_limit_the_order(sde: ss.SDE) -> None:
    """With a large ridge, fresh noise at each λ or kinks at the knots, the error stops falling near twenty steps."""
    model = ring(sde)
    statistics = ss.fitting.estimate_statistics(model, model.sample(128, seed=1), n=96)
    x, truth = flowed(model, 48)
    errors = []
    for n in (20, 40, 80):
        plan = ss.solvers.DPMSolverV3(statistics).plan(sde, ss.grids.quadratic_vp(sde, n))
        errors.append(float((run(plan, model.x0, x) - truth).norm(dim=1).median()))
    assert errors[0] > 6 * errors[1] > 36 * errors[2], errors  # order above 2.5, of a rule of order 4


def test_l_and_s_are_those_of_the_data() -> None:
    """Of N(m, c I): l = 1/(1 + c e^{2λ}), s = d log l/dλ = −2 (1 − l), b = 0; at the ends of the table too."""
    sde, c = ss.VP(), 0.49
    model = ss.GaussianMixture(sde, torch.linspace(-2, 2, 6, **F64)[None], std=math.sqrt(c))
    for estimate in (ss.fitting.estimate_statistics, ss.fitting.estimate_entry_statistics):
        found = estimate(model, model.sample(16, seed=0), n=64)
        lam, l, s, b = (torch.as_tensor(v, **F64) for v in (found.lam, found.l, found.s, found.b))  # noqa: E741
        exact = 1 / (1 + c * (2 * lam).exp())
        if l.ndim > 1:  # of one entry f = −l m is the same in all samples, so that s and b are not determined
            assert torch.allclose(l, exact[:, None].expand_as(l), rtol=1e-9)
            continue
        assert torch.allclose(l, exact, rtol=1e-9)
        # at its end the spline through l, which falls by a quarter from knot to knot, is 1 % off in its derivative
        assert torch.allclose(s, -2 * (1 - exact), atol=3e-2)
        assert torch.allclose(s[:-3], -2 * (1 - exact)[:-3], atol=2e-3)
        assert float(b.abs().max()) < 1e-2


@pytest.mark.parametrize("estimate", [ss.fitting.estimate_statistics, ss.fitting.estimate_entry_statistics])
def test_rates_of_symmetric_data_do_not_come_from_errors_of_l(estimate: Any) -> None:
    """Where the cumulants of order 2 are equal and those of order 3 are 0, f is that of order 4: cubic in ε, s = 3.

    It is then as small as (α/σ)³, and an error of the slope of l as small as 1e-6 gave s = −180 and a run of error 1e1.
    """
    sde = ss.VP()
    model = ring(sde)
    found = estimate(model, model.sample(64, seed=0), n=32)
    lam, s = torch.as_tensor(found.lam, **F64), torch.as_tensor(found.s, **F64)
    assert float((s[lam < -2.0] - 3).abs().max()) < 0.7  # what 64 samples give
    assert float(s.min()) > -2.1, s
    x = sde.prior(std=0.7).sample((32, *model.event), ss.Noise(0), **F64)
    plans = [
        rule.plan(sde, ss.grids.uniform_lam(sde, 4)) for rule in (ss.solvers.DPMSolverV3(found, 2), ss.DPMSolverPP(2))
    ]
    truth = run(ss.solvers.RungeKutta4().plan(sde, ss.grids.uniform_lam(sde, 200)), model.x0, x)
    errors = [float((run(plan, model.x0, x) - truth).norm(dim=1).median()) for plan in plans]
    assert errors[0] < 1.5 * errors[1], errors


def tables(n: int, seed: int) -> list[Tensor]:
    """Tables of a smooth l in (0, 1), and of s and b."""
    lam = torch.linspace(-6, 6, n, **F64)
    shift = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(seed), **F64)
    l = torch.sigmoid(-2 * lam[:, None, None] + shift)  # noqa: E741
    return [lam, l, -2 * (1 - l) + 0.1 * shift * l, 0.2 * shift * l]


@pytest.mark.parametrize("corrector", [False, True])
def test_entries_with_their_own_tables_are_runs_of_their_own(corrector: bool) -> None:
    """A denoiser that treats entries alone turns the rule for each entry into one ordinary rule an entry."""
    lam, l, s, b = tables(33, 0)  # noqa: E741
    for sde in (ss.VP(), ss.EDM()):
        grid = torch.cat([ss.grids.uniform_lam(sde, 6, t_end=sde.t_of_lam(4.0)), torch.zeros(1, **F64)])
        x = ss.Noise(0).normal((4, *l.shape[1:]), 0, **F64) * sde.sigma(sde.T)

        def alone(x: Tensor, t: Any) -> Tensor:
            return torch.tanh(2 * x)

        plan = ss.solvers.DPMSolverV3(ss.solvers.EntryStatistics(lam, l, s, b), 3, corrector).plan(sde, grid[:-1])
        ours = run(plan, alone, x)
        for i in range(2):
            for k in range(3):
                table = ss.solvers.Statistics(*(tuple(v.tolist()) for v in (lam, l[:, i, k], s[:, i, k], b[:, i, k])))
                other = ss.solvers.DPMSolverV3(table, 3, corrector).plan(sde, grid[:-1])
                assert torch.allclose(ours[:, i, k], run(other, alone, x[:, i, k, None])[:, 0], rtol=1e-11), (sde, i, k)
        to_data = ss.solvers.DPMSolverV3(ss.solvers.EntryStatistics(lam, l, s, b)).plan(sde, grid)
        assert bool(run(to_data, alone, x).isfinite().all())


def test_published_files_load(tmp_path: Path) -> None:
    """The public code writes l.npz and sb.npz, at λ that are even between the two times."""
    lam, l, s, b = tables(25, 1)  # noqa: E741
    np.savez_compressed(tmp_path / "l.npz", l=l.float().numpy())
    np.savez_compressed(tmp_path / "sb.npz", s=s.numpy(), b=b.numpy())
    sde = ss.EDM()
    found = ss.solvers.load_statistics(tmp_path, sde, t_start=80.0, t_end=0.002)
    assert torch.allclose(found.lam, -torch.linspace(math.log(80.0), math.log(0.002), 25, **F64))
    assert torch.allclose(found.l, l, atol=1e-6)
    assert torch.equal(found.s, s)
    assert torch.equal(found.b, b)
    mean = found.mean()
    assert torch.allclose(torch.tensor(mean.s, **F64), s.mean((1, 2)))
    model = ss.Denoiser(lambda x, t: torch.zeros_like(x), sde, predicts="x0")
    shape = (2, *found.event)
    for statistics in (found, mean):
        assert bool((ss.sample(model, shape, ss.solvers.DPMSolverV3(statistics), nfe=6, seed=0).isfinite()).all())
    with pytest.raises(FileNotFoundError, match=r"l\.npz and sb\.npz"):
        ss.solvers.load_statistics(tmp_path / "nowhere", sde)
    np.savez_compressed(tmp_path / "sb.npz", s=s.numpy())
    with pytest.raises(ValueError, match="must hold an array 'b'"):
        ss.solvers.load_statistics(tmp_path, sde)
