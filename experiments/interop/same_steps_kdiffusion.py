"""Every sampler of k-diffusion beside our solver in its calling form: the largest difference of the results.

    pip install --no-deps k-diffusion                            # whose other requirements its samplers do not need
    python experiments/interop/same_steps_kdiffusion.py          # seconds; prints the table, writes it into the page
    python experiments/interop/same_steps_kdiffusion.py --quick  # prints only

Both start at the same states, take the same 12 steps, and get the same normals in the same order. The network is exact
for a Gaussian mixture, in float64. Without k-diffusion the script says so and compares nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import scoresde as ss

PAGE = Path(__file__).parents[2] / "docs" / "schedulers.md"
BEGIN, END = "<!-- the table of experiments/interop/same_steps_kdiffusion.py -->", "<!-- end of this table -->"
STEPS = 12
EQUAL = 1e-9  # both work in float64; their sums have another order

# Name there, solver, η there, remark.
ROWS: list[tuple[str, ss.solvers.Solver, float | None, str]] = [
    ("euler", ss.DDIM(), None, ""),
    ("heun", ss.EDMHeun(), None, ""),
    ("dpm_2", ss.solvers.DPM2(), None, ""),
    ("lms", ss.solvers.LMS(4), None, ""),
    ("dpmpp_2m", ss.DPMSolverPP(2), None, ""),
    ("euler_ancestral", ss.solvers.EulerAncestral(), 1.0, ""),
    ("euler_ancestral", ss.solvers.EulerAncestral(0.5), 0.5, ""),
    ("dpm_2_ancestral", ss.solvers.DPM2Ancestral(), 1.0, ""),
    ("dpmpp_2s_ancestral", ss.solvers.DPMPP2SAncestral(), 1.0, ""),
    ("dpmpp_sde", ss.solvers.DPMPPSDE(one_path=False), 1.0, "with independent normals"),
    ("dpmpp_2m_sde", ss.SDEDPMSolverPP(2), 1.0, "with independent normals"),
    ("dpmpp_2m_sde", ss.SDEDPMSolverPP(2, eta=0.25**0.5), 0.25, "our η is the root of theirs"),
    ("dpmpp_3m_sde", ss.SDEDPMSolverPP(3, form="published"), 1.0, "with independent normals"),
]


def samplers() -> types.ModuleType | None:
    """The samplers of k-diffusion without the package, which imports torchvision; None if it is not installed."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    package, utils = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
    package.__path__ = [str(folder)]
    utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]  # the one function that the samplers use
    package.utils = utils
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": utils}
    own = importlib.util.spec_from_file_location("k_diffusion.sampling", folder / "sampling.py")
    module = importlib.util.module_from_spec(own)
    sys.modules["k_diffusion.sampling"] = module
    own.loader.exec_module(module)
    return module


def same_normals(shape: tuple[int, ...]) -> Callable[[Tensor, Tensor], Tensor]:
    """A `noise_sampler` that returns the same sequence of normals each time it is made."""
    generator = torch.Generator().manual_seed(1)
    return lambda *_: torch.randn(shape, generator=generator, dtype=torch.float64)


def compare(module: types.ModuleType) -> list[str]:
    """Rows of the table; an error if a difference is larger than rounding."""
    sde = ss.EDM()
    exact = ss.GaussianMixture(sde, [[-1.0, 0.5], [1.0, 0.0]], std=[0.2, 0.4])
    model = lambda x, sigma: exact.x0(x, sigma)  # noqa: E731
    sigmas = sde.sigma(ss.grids.karras(sde, STEPS))
    x = sde.prior().sample((64, 2), ss.Noise(0), dtype=torch.float64)
    rows = []
    for name, solver, eta, remark in ROWS:
        options = {} if eta is None else {"eta": eta}
        if eta is not None:
            options["noise_sampler"] = same_normals(x.shape)
        theirs = getattr(module, f"sample_{name}")(model, x, sigmas, disable=True, **options)
        if eta is not None:
            options = {"noise_sampler": same_normals(x.shape)}  # our η belongs to the solver
        ours = ss.interop.kdiffusion_sampler(solver)(model, x, sigmas, disable=True, **options)
        gap = float((ours - theirs).abs().max() / theirs.square().mean().sqrt())
        there = f"`sample_{name}`" + ("" if eta is None else f", eta = {eta:g}")
        rows.append(f"| {there} | `{solver!r}` | {gap:.0e} | {remark} |")
        assert gap < EQUAL, f"{name} and {solver!r} differ by {gap:.1e}"
    return rows


def main(quick: bool) -> str:
    module = samplers()
    if module is None:
        text = "k-diffusion is not installed (pip install --no-deps k-diffusion), so nothing was compared"
        print(text)
        return text
    text = "\n".join(["| k-diffusion | our solver | difference | |", "|---|---|---|---|", *compare(module)])
    print(text)
    if not quick:
        page = PAGE.read_text()
        before, _, rest = page.partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="print only")
    main(parser.parse_args().quick)
