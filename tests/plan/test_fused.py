"""Rows as kernels of Triton: the states of the eager run, on CUDA and in Triton's interpreter."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import scoresde as ss
from scoresde.noise.keyed import Laid, Noise
from scoresde.plan import fused, run

VP, EDM = ss.VP(), ss.EDM()
PLANS = {
    "DDIM": ss.DDIM().plan(VP, ss.grids.karras(VP, 4)),
    "DPM-Solver++ 2M": ss.DPMSolverPP(2).plan(VP, ss.grids.karras(VP, 4)),
    "UniPC-3": ss.UniPC(3).plan(VP, ss.grids.karras(VP, 5)),
    "Heun": ss.EDMHeun().plan(EDM, ss.grids.karras(EDM, 3)),
    "DPM-Solver-3": ss.solvers.DPMSolver(3).plan(VP, ss.grids.karras(VP, 3)),
    "SDE-DPM-Solver++ 2M": ss.SDEDPMSolverPP(2).plan(VP, ss.grids.karras(VP, 4)),
    "Euler–Maruyama": ss.EulerMaruyama().plan(VP, ss.grids.karras(VP, 4)),
}
HAS_TRITON = importlib.util.find_spec("triton") is not None


def denoise(x: Tensor, t: Any) -> Tensor:
    return torch.tanh(x) * (1 - 0.5 * float(t))


class Passes(TorchDispatchMode):
    """Names of the operations on tensors that run besides the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def check(device: str) -> None:
    """Raise an error unless all rows of all plans, and the normals, are those of the eager run."""
    kernel = importlib.import_module("scoresde.plan.kernel")
    launches: list[int] = []
    add = kernel.add

    def counted(*args: Any) -> Tensor:
        launches.append(1)
        out: Tensor = add(*args)
        return out

    kernel.add = counted
    layouts = (torch.contiguous_format, torch.channels_last)
    cases = [((3, 5), layouts[0]), ((2, 3, 5, 6), layouts[0]), ((2, 3, 5, 6), layouts[1]), ((2, 1100), layouts[0])]
    for shape, layout in cases:
        x = Noise(1).normal(shape, 0).to(device=device, memory_format=layout)
        for source in (Noise(5, offset=2**33 + 1), Noise([2**63 + k for k in range(len(x))])):
            for name, plan in PLANS.items():
                noise = source if plan.stochastic else None
                launches.clear()
                states: dict[bool, list[Tensor]] = {True: [], False: []}
                for way, seen in states.items():
                    seen.append(run(plan, denoise, x, noise, callback=lambda s, k=seen: k.append(s.x), fused=way))  # type: ignore[misc]
                assert len(launches) == len(plan.rows) - 1, (name, "one pass for each row")
                for a, b in zip(states[True], states[False], strict=True):
                    # Sums of up to seven numbers below 50, rounded in another order.
                    torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-5)
                    assert a.stride() == b.stride()
            laid = Laid(source, len(x), x.device)
            key_low, key_high, low, high = laid.words
            for draw in (0, 7, 2**32 - 1):
                z = kernel.add(torch.empty_like(x), [], 0.0, [(draw, 1.0)], (low, high, key_low, key_high))
                torch.testing.assert_close(z.cpu(), source.normal(shape, draw), rtol=2e-6, atol=2e-6)

    # Many terms and draws need several launches; memory may be reused.
    x = Noise(1).normal((3, 5), 0).to(device)
    many = [ss.plan.Row(1.0)] + [ss.plan.Row(1.0 - k / 20, x=((k - 1, 0.5),), z=((k, 0.1),)) for k in range(1, 9)]
    last = ss.plan.Row(0.1, x=tuple((k, 0.1 + k) for k in range(9)), z=((20, 1.0), (21, -1.0), (22, 0.5)), one=0.25)
    table = ss.Plan((*many, last, ss.plan.Row(0.0, x=((9, 2.0),), one=1.0)))
    for overwrite in (False, True):
        for source in (Noise(3), Fixed()):
            a, b = (run(table, denoise, x, source, overwrite=overwrite, fused=way) for way in (True, False))
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-5)

    # What the kernel cannot do is added term by term.
    launches.clear()
    plan = PLANS["SDE-DPM-Solver++ 2M"]
    for state in (x.double(), torch.zeros(5, 3, device=device).T):
        torch.testing.assert_close(run(plan, denoise, state, Noise(0), fused=True), run(plan, denoise, state, Noise(0)))
    leaf = x.clone().requires_grad_()
    run(plan, denoise, leaf, Noise(0), fused=True).sum().backward()
    assert leaf.grad is not None and bool((leaf.grad != 0).any())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        slope = torch.autograd.forward_ad.unpack_dual(run(plan, denoise, dual, Noise(0), fused=True)).tangent
    torch.testing.assert_close(slope, leaf.grad)
    assert not launches

    model = ss.Denoiser(ss.nn.MLP(5, hidden=8, depth=1, seed=0).eval().to(device), VP, predicts="eps")
    sampler = ss.sampling.capture(model, (3, 5), ss.DDPM(), steps=3, fused=True)
    assert not sampler.unfused
    for seed in (0, 9):
        want = ss.sample(model, (3, 5), ss.DDPM(), steps=3, seed=seed)
        torch.testing.assert_close(sampler(seed), want, rtol=1e-4, atol=1e-4)
    assert launches, "a captured run has its kernels"
    kernel.add = add


class Fixed:
    """A source of a user."""

    def like(self, x: Tensor, draw: int) -> Tensor:
        return torch.full_like(x, float(draw % 5))


@pytest.mark.skipif(not (HAS_TRITON and torch.cuda.is_available()), reason="needs triton and CUDA")
def test_fused_rows_on_cuda() -> None:
    check("cuda")


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_fused_rows_in_the_interpreter() -> None:
    # A process of its own, because triton reads this variable when it is imported.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", "import test_fused; test_fused.check('cpu')"]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_the_kernel_compiles_for_a_gpu_and_reads_four_numbers_at_once() -> None:
    kernel = importlib.import_module("scoresde.plan.kernel")
    if kernel.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set")
    compiler, backends = (importlib.import_module(f"triton.{name}") for name in ("compiler", "backends.compiler"))
    even = [["tt.divisibility", 16]]
    for terms, draws in ((3, 0), (2, 1), (0, 1)):
        types = {"out": "*fp32", "terms": ("*fp32",) * terms, "weights": ("fp32",) * terms, "one": "fp32"}
        types |= {"draws": ("i32",) * draws, "stds": ("fp32",) * draws, "keys": ("*i64",) * 4 * bool(draws)}
        types |= {"sizes": ("i32",) * 4, "LAST": "constexpr", "ROWS": "constexpr", "WIDTH": "constexpr"}
        fixed = {(8,): False, (9,): 1, (10,): 256}
        aligned = {(0,): even, (7, 1): even, **{(1, k): even for k in range(terms)}}
        source = compiler.ASTSource(kernel._row, types, fixed, aligned)
        code = compiler.compile(source, target=backends.GPUTarget("cuda", 90, 32)).asm["ptx"]
        assert "st.global.v4" in code and ("ld.global.v4" in code) == (terms > 0)
        assert "st.shared" not in code, "normals stay in the registers of their thread"


def test_without_the_kernel_the_run_is_eager() -> None:
    x = Noise(1).normal((3, 5), 0)
    assert fused.refusal(x)
    for plan in PLANS.values():
        noise = Noise(0) if plan.stochastic else None
        assert torch.equal(run(plan, denoise, x, noise, fused=True), run(plan, denoise, x, noise))
    model = ss.Denoiser(ss.nn.MLP(5, hidden=8, depth=1, seed=0).eval(), VP, predicts="eps")
    sampler = ss.sampling.capture(model, (3, 5), steps=2, fused=True)
    assert "CUDA" in sampler.unfused or 'pip install "scoresde[triton]"' in sampler.unfused
    assert "float64" in fused.refusal(x.double())
    assert torch.equal(sampler(0), ss.sample(model, (3, 5), steps=2, seed=0))
    with pytest.raises(ValueError, match="exclude each other"):
        ss.sampling.capture(model, (3, 5), steps=2, fused=True, compile="eager")
