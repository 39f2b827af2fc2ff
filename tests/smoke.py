"""What an installed wheel must do without any extra: `make package` runs this in an empty environment."""

import importlib.metadata
import importlib.util
import tempfile
from pathlib import Path

import torch

import scoresde as ss

assert importlib.metadata.version("scoresde") == ss.__version__
assert (Path(ss.__file__).parent / "py.typed").exists()
assert importlib.util.find_spec("pytest") is None, "the environment must be empty"
model = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.1)
x = ss.sample(model, (64, 1), nfe=10, seed=0)
assert bool(((x.abs() - 1).abs() < 0.6).all())
assert bool((ss.log_prob(model, x).value - model.log_prob(x)).abs().max() < 0.1)
net = ss.Denoiser(ss.nn.MLP(1, seed=0), ss.VP(), predicts="eps")
ss.DSM(net)(x).backward()
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "plan.json"
    plan = ss.UniPC(3).plan(ss.VP(), ss.grids.karras(ss.VP(), 5))
    plan.save(path)
    assert ss.Plan.load(path) == plan
assert importlib.util.find_spec("matplotlib") is None, "it belongs to an extra"
print(f"scoresde {ss.__version__} of the wheel samples, trains and saves")
