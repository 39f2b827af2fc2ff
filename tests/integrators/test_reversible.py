"""Reversible solvers: inverse exact up to rounding, the order of their method, and exact gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.integrators.reversible import Reversible
from scoresde.solvers.runge_kutta import EULER, KUTTA3, MIDPOINT, RK4, Tableau

PROCESSES = {"VP": ss.VP(), "VE": ss.VE(), "EDM": ss.EDM(), "Flow": ss.Flow(), "Cosine": ss.Cosine()}


class MLP(torch.nn.Module):
    """A small network in float64, smooth, with a condition."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = torch.nn.Parameter(0.5 * torch.randn(3, 8, generator=generator, dtype=torch.float64))
        self.b = torch.nn.Parameter(0.3 * torch.randn(8, 2, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        out = torch.tanh(torch.cat([x, t[:, None].to(x)], 1) @ self.a) @ self.b
        return out if shift is None else out + shift


def mlp(sde: ss.SDE) -> ss.Denoiser:
    net = MLP()
    model = ss.Denoiser(lambda x, t, **cond: net(x.double(), t, **cond), sde, predicts="v")
    model.add_module("parameters_of", net)
    return model


def noise(sde: ss.SDE, n: int = 4) -> Tensor:
    return sde.prior().sample((n, 2), ss.Noise(3), dtype=torch.float64)


@pytest.mark.parametrize("name", PROCESSES)
def test_inversion_recovers_the_start_to_rounding(name: str) -> None:
    sde = PROCESSES[name]
    x = noise(sde)
    for solver in (Reversible(), Reversible(RK4, coupling=0.999), Reversible(EULER, coupling=1.0)):
        for times in (ss.grids.karras(sde, 7, t_end=sde.t_min), ss.grids.uniform_t(sde, 15, t_end=0.2 * sde.T)):
            solution = ss.solve(mlp(sde), x, solver, grid=times)
            back = solver.invert(mlp(sde), solution, times)
            assert back.companion is not None and back.times == solution.times[::-1]
            assert float((back.x - x).abs().max() / x.abs().max()) < 1e-10, solver
            assert float((back.companion - x).abs().max() / x.abs().max()) < 1e-10, solver
            assert float((solution.x - x).abs().max()) > 1e-2
            evaluations = 2 * len(solver.tableau.c) * (len(times) - 1)
            assert solution.nfe == solution.calls == back.nfe == back.calls == evaluations


def test_data_is_encoded_and_decoded_exactly_in_few_steps() -> None:
    sde = ss.VP()
    mix = ss.GaussianMixture(sde, torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), std=0.2)
    x = mix.sample(8, seed=0)
    rising = ss.grids.karras(sde, 6, t_end=sde.t_min).flip(0)
    code = ss.solve(mix, x, Reversible(), grid=rising)
    assert float((Reversible().invert(mix, code).x - x).abs().max()) < 1e-12
    assert float((code.x - x).abs().max()) > 0.5
    ordinary = ss.decode(mix, ss.encode(mix, x, steps=6), steps=6)
    assert float((ordinary - x).abs().max()) > 1e-4, "which no ordinary solver does"


@pytest.mark.parametrize(("tableau", "order"), [(EULER, 1), (MIDPOINT, 2), (KUTTA3, 3), (RK4, 4)])
def test_the_order_is_that_of_the_method(tableau: Tableau, order: int) -> None:
    sde = ss.Flow()
    mix = ss.GaussianMixture(sde, torch.tensor([[0.5, -1.0]]), std=torch.tensor([[0.6, 0.3]]))
    x = noise(sde, 8)
    errors = []
    for steps in (16, 32):
        times = ss.grids.uniform_t(sde, steps, t_end=0.1)
        end = ss.sample(mix, x, Reversible(tableau), grid=times)
        errors.append(float((end - mix.flow(x, 1.0, 0.1)).norm(dim=1).median()))
    assert order - 0.4 < math.log2(errors[0] / errors[1]) < order + 1.4, errors


def gradients(model: ss.Denoiser, solver: Reversible, grad: str) -> tuple[Tensor, ...]:
    x = noise(model.sde).requires_grad_()
    shift = torch.full((4, 2), 0.1, dtype=torch.float64, requires_grad=True)
    times = ss.grids.karras(model.sde, 12, t_end=model.sde.t_min)
    solution = ss.solve(model.given(shift=shift), x, solver, grid=times, grad=grad)
    assert solution.companion is not None
    loss = (solution.x.sin() + 0.1 * solution.companion**2).sum()
    return torch.autograd.grad(loss, (x, shift, *model.parameters()))


@pytest.mark.parametrize("tableau", [MIDPOINT, RK4])
def test_gradients_by_the_inverse_are_those_of_autograd(tableau: Tableau) -> None:
    model, solver = mlp(ss.VP()), Reversible(tableau)
    for a, b in zip(gradients(model, solver, "full"), gradients(model, solver, "reversible"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradients_by_the_inverse_store_no_states() -> None:
    """What autograd saves grows with the steps; what the reversible mode saves does not."""
    model, x = mlp(ss.VP()), noise(ss.VP()).requires_grad_()
    stored = {}
    for grad in ("full", "reversible"):
        for steps in (4, 16):
            sizes: list[int] = []

            def keep(v: Tensor, sizes: list[int] = sizes) -> Tensor:
                sizes.append(v.numel())
                return v

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
                ss.solve(model, x, Reversible(), grid=ss.grids.karras(model.sde, steps, t_end=0.01), grad=grad)
            stored[grad, steps] = sum(sizes)
    assert stored["full", 16] > 3 * stored["full", 4]
    assert stored["reversible", 16] == stored["reversible", 4]


def test_the_companion_can_be_given_and_arguments_are_checked() -> None:
    sde, solver = ss.VP(), Reversible()
    x = noise(sde)
    times = ss.grids.karras(sde, 8, t_end=sde.t_min)
    whole = ss.solve(mlp(sde), x, solver, grid=times)
    # x/(α + σ) and its companion are the whole state, so two halves make the whole
    first = ss.solve(mlp(sde), x, solver, grid=times[:5])
    halves = ss.solve(mlp(sde), first.x, Reversible(companion=first.companion), grid=times[4:])
    assert float((halves.x - whole.x).abs().max()) < 1e-12
    assert whole.companion is not None and whole.x.dtype == torch.float64
    plain = ss.Denoiser(lambda x, t: 0.5 * x, sde, predicts="x0")
    assert ss.solve(plain, x.float(), solver, grid=times).x.dtype == torch.float32
    assert ss.solve(plain, (3, 2), solver, steps=5, seed=0).times[-1] == sde.t_min, "the default grid ends at σ > 0"
    with pytest.raises(ValueError, match="`times` must have σ > 0"):
        ss.solve(mlp(sde), x, solver, grid=ss.grids.karras(sde, 8))
    with pytest.raises(ValueError, match="coupling"):
        Reversible(coupling=0.0)
    with pytest.raises(ValueError, match="grad"):
        ss.solve(mlp(sde), x, solver, grid=times, grad="adjoint")
    with pytest.raises(ValueError, match="`companion` must have the shape of `x`"):
        ss.solve(mlp(sde), x, Reversible(companion=x[:2]), grid=times)
    with pytest.raises(ValueError, match="`solution` has no `companion`"):
        solver.invert(mlp(sde), ss.solve(mlp(sde), x, ss.DDIM(), steps=5))
