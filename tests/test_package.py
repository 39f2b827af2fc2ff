"""The package as a whole: what it loads, who imports whom, what it ships, and what it never asks of a device."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from instances import SDES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import scoresde as ss

PACKAGE = Path(ss.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# What `import scoresde` loads.

PROBE = """
import json, sys
FIRST
before = set(sys.modules)

def guard(event, args):
    if event.split(".")[0] in ("socket", "subprocess", "urllib") or event in ("os.system", "os.exec", "os.posix_spawn"):
        raise RuntimeError(f"importing scoresde raised {event}")

sys.addaudithook(guard)
import scoresde
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def probe(first: str, then: str = "import scoresde") -> subprocess.CompletedProcess[str]:
    code = PROBE.replace("FIRST", first).replace("import scoresde", then)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_import_costs_little_over_torch() -> None:
    done = probe("import torch")
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert "scoresde.processes.sde" in loaded, "the probe sees what is loaded"
    packages = {name.split(".")[0] for name in loaded} - sys.stdlib_module_names
    heavy = {"torchsde", "torchdiffeq", "matplotlib", "sklearn", "diffusers", "scipy", "tqdm", "einops", "mpmath"}
    assert not packages & heavy
    assert packages <= {"scoresde", "numpy"}, "nor anything else that `import torch` has not already loaded"
    compilers = {"torch.utils.cpp_extension", "torch._inductor", "torch._dynamo", "torch.jit._script"}
    assert not compilers & set(loaded)


def test_the_probe_would_notice_a_download_and_a_stranger() -> None:
    done = probe("", "import socket; socket.getaddrinfo('localhost', 80)")
    assert done.returncode != 0 and "socket.getaddrinfo" in done.stderr
    assert "mpmath" in json.loads(probe("", "import mpmath").stdout)


# Who may import whom.

ORDER = (
    "_checks _names _doors _build _files _numerics _printing _progress noise data metrics nn processes plan grids "
    "denoisers solvers guidance training analysis integrators sampling policies likelihood fitting steering inverse "
    "interop plots"
).split()
OF_THEIR_OWN = {  # know nothing of diffusion
    "data": {"_checks", "_doors", "_printing", "noise"},
    "metrics": {"_checks", "_doors", "_numerics", "_printing", "noise", "metrics"},
    "nn": {"_build", "_checks", "_doors", "_printing", "noise", "nn"},
}


def imported(source: str) -> Iterator[str]:
    """First names below scoresde of everything that a module imports from it, at any depth of the code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "scoresde":
            below = (node.module or "").split(".")[1:]
            yield from [below[0]] if below else [alias.name for alias in node.names]
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "scoresde":
                    yield [*alias.name.split("."), "scoresde"][1]


def trespasses(layer: str, source: str) -> list[str]:
    """Imports that a module of this layer must not have; a package's own parts are its own affair."""
    above = set(ORDER[: ORDER.index(layer)]) | {layer}
    allowed = OF_THEIR_OWN.get(layer, above)
    return [name for name in imported(source) if name not in allowed]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_only_from_above(path: Path) -> None:
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if layer == "__init__":
        return
    assert layer in ORDER, f"{layer} is new: give it its place in ORDER"
    assert trespasses(layer, path.read_text()) == []


def test_the_layering_test_sees_every_kind_of_import() -> None:
    assert trespasses("grids", "from scoresde.processes.sde import SDE\nfrom scoresde import _checks as check") == []
    assert trespasses("grids", "from scoresde.denoisers.base import Wrapped") == ["denoisers"]
    assert trespasses("grids", "def f():\n    from scoresde.solvers.rule import Solver") == ["solvers"]
    assert trespasses("grids", "import scoresde.solvers.tape as tape") == ["solvers"]
    assert trespasses("grids", "from scoresde import solvers, VP") == ["solvers", "VP"]
    assert trespasses("grids", "import scoresde as ss") == ["scoresde"]
    assert trespasses("metrics", "from scoresde.processes.sde import SDE") == ["processes"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_library_prints_nothing_and_seeds_nothing(path: Path) -> None:
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not {"print", "torch.manual_seed", "np.random.seed", "random.seed"} & set(calls)


# What is shipped.


def test_the_package_is_pure_python_with_types() -> None:
    wheel = importlib.metadata.distribution("scoresde").read_text("WHEEL")
    assert wheel is not None, "installed from a wheel, as `pip install -e` also does"
    assert "Root-Is-Purelib: true" in wheel and re.findall(r"^Tag: (.*)$", wheel, re.M) == ["py3-none-any"]
    assert (PACKAGE / "py.typed").is_file()
    kinds = {path.suffix for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert kinds == {".py", ".typed", ".json"}, "nothing to compile; the tables of universal plans are data"
    assert importlib.metadata.version("scoresde") == ss.__version__


def test_a_built_wheel_holds_the_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = pytest.importorskip("hatchling.build", reason="hatchling, the build backend, is not installed here")
    monkeypatch.chdir(PACKAGE.parent)
    name = backend.build_wheel(str(tmp_path))
    assert name.endswith("-py3-none-any.whl")
    held = set(zipfile.ZipFile(tmp_path / name).namelist())
    assert {str(path.relative_to(PACKAGE.parent)) for path in SOURCES} | {"scoresde/py.typed"} <= held
    tables = {str(path.relative_to(PACKAGE.parent)) for path in PACKAGE.rglob("*.json")}
    assert tables and tables <= held


# A device that has no float64 and that nobody waits for: tensors on "meta" hold no numbers, so reading one back raises.


class NoFloat64(TorchDispatchMode):
    """Refuses float64 on the device, as MPS and DirectML do; it stays welcome on the CPU."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == "meta" and leaf.dtype in (torch.float64, torch.cdouble):
                raise TypeError(f"{func} makes float64 on the device")
        return out


def test_the_device_refuses_float64_and_reading_back() -> None:
    with NoFloat64():
        x = torch.zeros(2, device="meta")
        assert (x * torch.tensor(0.5, dtype=torch.float64)).dtype == torch.float32
        torch.zeros(2, dtype=torch.float64)
        for bad in (
            lambda: x.double(),
            lambda: torch.zeros(2, dtype=torch.float64).to("meta"),
            lambda: x.to(torch.cdouble),
        ):
            with pytest.raises(TypeError, match="float64 on the device"):
                bad()
        for wait in (lambda: x[0].item(), lambda: bool(x.any()), lambda: x.tolist(), lambda: float(x.sum())):
            with pytest.raises((RuntimeError, NotImplementedError)):
                wait()


B, EVENT = 4, (3, 2)


def times(sde: ss.SDE) -> dict[str, Any]:
    device = {"dtype": torch.float32, "device": "meta"}
    return {"number": 0.4 * sde.T, "scalar": torch.empty((), **device), "vector": torch.empty(B, **device)}


def lands(out: Any, shape: tuple[int, ...] = (B, *EVENT)) -> bool:
    return bool(out.device.type == "meta" and out.dtype == torch.float32 and out.shape == shape)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
def test_processes_need_no_float64_on_the_device_and_never_wait(sde: ss.SDE) -> None:
    x = torch.empty(B, *EVENT, device="meta")
    coefficients = "alpha sigma log_alpha log_sigma lam f g g2 alpha_dot sigma_dot t_of_lam t_of_sigma".split()
    with NoFloat64():
        for kind, t in times(sde).items():
            assert lands(sde.perturb(x, t, x)) and lands(sde.perturb(x, t)), kind
            if isinstance(t, Tensor):
                for name in coefficients if kind == "vector" else coefficients[:-2]:
                    assert lands(getattr(sde, name)(t), t.shape), (kind, name)
                for out in (*sde.transition(t, t), *sde.posterior(t, t)):
                    assert lands(out, t.shape), kind
        prior = ss.processes.Prior(0.0, 1.0, 0.0)
        assert lands(prior.sample((B, *EVENT), ss.Noise(0), device="meta")) and lands(prior.log_prob(x), (B,))


NET = torch.nn.Conv1d(3, 3, 1, device="meta")
NETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "module": lambda x, t: NET(x) + t[:, None, None],
    "function": lambda x, t: x * t[:, None, None],
}


def denoisers(sde: ss.SDE) -> dict[str, ss.Denoiser]:
    whole = ("x0", "v", "velocity")
    out = {}
    for predicts in whole if sde.alpha(sde.T) == 0 else ("eps", "score", *whole):
        out[predicts] = ss.Denoiser(NETS["module"], sde, predicts=predicts)
    clock = "t" if sde.alpha(sde.T) == 0 else None
    for predicts in ("F", "x0"):
        out[f"{predicts} preconditioned"] = ss.Denoiser(
            NETS["module"], sde, predicts=predicts, precondition=ss.Preconditioning(0.5), time=clock
        )
    clocks: list[Any] = ["t", "sigma", "log_sigma", lambda t: 999 * t]
    for clock in [*clocks, *(["index", "nearest_index"] if isinstance(sde, ss.Discrete) else [])]:
        out[f"told {clock}"] = ss.Denoiser(NETS["function"], sde, predicts="x0", time=clock)
    wide = lambda x, t: torch.cat([x, x], dim=1)  # noqa: E731
    out["learned variance"] = ss.Denoiser(wide, sde, predicts="x0", learned_variance=True)
    return out


@pytest.mark.parametrize("name", ["VP", "EDM", "Flow", "Discrete", "Discrete zero SNR"])
def test_denoisers_need_no_float64_on_the_device_and_never_wait(name: str) -> None:
    sde = SDES[name]
    x = torch.empty(B, *EVENT, device="meta")
    models: dict[str, ss.denoisers.AbstractDenoiser] = {**denoisers(sde)}
    models["on another process"] = ss.denoisers.Rescheduled(models["x0"], ss.VP())
    models["on another process, F"] = ss.denoisers.Rescheduled(models["F preconditioned"], ss.Flow())
    for kind, model in models.items():
        with NoFloat64():
            for word, t in times(model.sde).items():
                for prediction in ("x0", "eps", "score", "v", "velocity", "forward"):
                    assert lands(getattr(model, prediction)(x, t)), (kind, prediction, word)
                for eta in (0.0, 1.0):
                    assert lands(ss.denoisers.Reverse(model, eta).drift(x, t)), (kind, word)
                if isinstance(model, ss.Denoiser):
                    assert lands(model.target(x, t, x)), (kind, word)
                if kind == "learned variance":
                    assert all(map(lands, model.x0_and_variance(x, t))), word  # type: ignore[attr-defined]


def test_noise_and_scales_need_no_float64_on_the_device_and_never_wait() -> None:
    x = torch.empty(B, *EVENT, device="meta")
    with NoFloat64():
        for noise in (
            ss.Noise(0),
            ss.Noise(2**64 - 1, offset=2**40),
            ss.Noise(range(B)),
            ss.Noise(0, indices=range(B)),
        ):
            assert lands(noise.normal((B, *EVENT), 0, device="meta")) and lands(noise.like(x, 3))
            assert lands(noise.uniform((B, *EVENT), 0, device="meta"))
            assert lands(noise.fork(1).normal((B, 1_000_003), 0, device="meta"), (B, 1_000_003))
        scale = ss.data.Standardize.fit(torch.arange(24.0, dtype=torch.float64).reshape(4, 3, 2), "channel")
        assert lands(scale(x)) and lands(scale.inverse(x))
        assert isinstance(scale.log_det(x), float)


def test_the_version_is_the_same_everywhere() -> None:
    root = PACKAGE.parent
    assert f"version: {ss.__version__}\n" in (root / "CITATION.cff").read_text()
    assert f"version = {{{ss.__version__}}}" in (root / "README.md").read_text()
    released = re.findall(r"^## \[(\d[^]]*)\] – (\d{4}-\d{2}-\d{2})$", (root / "CHANGELOG.md").read_text(), re.M)
    assert released[0][0] == ss.__version__
    assert f"date-released: {released[0][1]}\n" in (root / "CITATION.cff").read_text()
