r"""
Simulation-based inference
==========================

A simulator turns parameters θ into an observation x. Its likelihood p(x | θ) has no formula, but it can be run. A score
network that is trained on pairs (θ, x) samples the posterior p(θ | x) of any observation. The simulator here is simple
enough that the exact posterior is known, so that every answer is checked.
"""

# %%
# The simulator
# -------------
# Two parameters, uniform on [-1, 1]², move a thin crescent. An observation is one point of it. Only :math:`|\theta_1 +
# \theta_2|` enters, so that a posterior has two crescents. This is a task of the benchmark sbibm.
import math

import matplotlib.pyplot as plt
import torch

import scoresde as ss

CENTRE = torch.tensor([0.25, 0.0])


def crescent(n: int) -> torch.Tensor:
    angle = (torch.rand(n) - 0.5) * math.pi
    radius = 0.1 + 0.01 * torch.randn(n)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1) + CENTRE


def move(theta: torch.Tensor) -> torch.Tensor:
    return torch.stack([-(theta[:, 0] + theta[:, 1]).abs(), theta[:, 1] - theta[:, 0]], 1) / math.sqrt(2)


torch.manual_seed(0)
theta = 2 * torch.rand(10_000, 2) - 1
x = crescent(len(theta)) + move(theta)

# %%
# The network
# -----------
# The network denoises θ, given x. A network of your own needs a ``forward`` with the state, the time and the conditions
# by name. This one has the observation in two places: as an input beside θ, and as ``context``, which modulates every
# block.


class Conditional(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = ss.nn.MLP(4, hidden=64, depth=2, context=2, out_features=2, seed=0)

    def forward(self, theta: torch.Tensor, time: torch.Tensor, *, x_o: torch.Tensor) -> torch.Tensor:
        x_o = x_o.expand(len(theta), -1)
        return self.mlp(torch.cat([theta, x_o], 1), time, context=x_o)


# %%
# EDM's preconditioning needs the standard deviation of the data, here that of the prior. The times of the training are
# at low noise more often than EDM's, because the crescents are thin. The trainer passes ``x_o`` on to the network. A
# tenth of the pairs is held out.
standardise = ss.data.Standardize.fit(x, "entry")
x_o = standardise(x)
model = ss.Denoiser(
    Conditional(), ss.EDM(T=40.0, t_min=1e-3), predicts="F", precondition=ss.Preconditioning(float(theta.std()))
)
loss = ss.DSM(model, "edm", ss.training.times.LogNormalSigma(-2.5, 1.5))
steps = 1000
trainer = ss.Trainer(
    loss,
    {"x": theta[1000:], "x_o": x_o[1000:]},
    torch.optim.Adam(loss.parameters(), lr=4e-3),
    batch=256,
    ema=0.99,
    update=ss.training.Update(schedule=lambda step: 1 - step / steps),
    hooks=[
        ss.training.Validation({"x": theta[:1000], "x_o": x_o[:1000]}, every=250),
        ss.training.ProgressBar(show=False),
    ],
)
for row in trainer.fit(steps):
    if "validation" in row:
        print(f"step {row['step']:.0f}: loss on held-out pairs {row['validation']:.3f}")
amortised = trainer.ema_model

# %%
# The posterior of an observation
# -------------------------------
# ``given`` fixes the condition, and ``sample`` does the rest. The network is *amortised*: another observation needs no
# other training.
seen = torch.tensor([[-0.64, 0.16]])
posterior = amortised.given(shared={"x_o": standardise(seen)})
draws = ss.sample(posterior, (1000, 2), nfe=30, seed=0)

# %%
# Is it right?
# ------------
# The simulator can be inverted by hand: x minus a point of the crescent is the shift, which determines θ up to a sign.


def exact_posterior(x_o: torch.Tensor, n: int) -> torch.Tensor:
    p = crescent(20 * n)
    a = (p[:, 0] - x_o[0, 0]) * torch.where(torch.rand(len(p)) < 0.5, 1.0, -1.0)
    b = x_o[0, 1] - p[:, 1]
    theta = torch.stack([a - b, a + b], 1) / math.sqrt(2)
    return theta[(p[:, 0] >= x_o[0, 0]) & (theta.abs() <= 1).all(1)][:n]


def exact_log_density(theta: torch.Tensor, x_o: torch.Tensor) -> torch.Tensor:
    """The density of the crescent in polar coordinates; half of it, because two θ have the same shift."""
    p = x_o - move(theta) - CENTRE
    radius = p.norm(dim=1)
    radial = -0.5 * ((radius - 0.1) / 0.01) ** 2 - math.log(0.01 * math.sqrt(2 * math.pi))
    inside = (p[:, 0] > 0) & (theta.abs() <= 1).all(1)
    return torch.where(inside, radial - (math.pi * radius).log() - math.log(2), -torch.inf)


reference, another = exact_posterior(seen, 1000), exact_posterior(seen, 1000)
figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), sharex=True, sharey=True)
for ax, points, title in zip(axes, (draws, reference), ("samples of the network", "exact posterior"), strict=True):
    ax.scatter(*points.T, s=2)
    ax.set(title=title, xlim=(-1, 1), ylim=(-1, 1), aspect="equal", xlabel="θ₁", ylabel="θ₂")
plt.show()
print(f"accuracy of a classifier, network against exact: {ss.metrics.c2st(draws, reference):.3f}")
print(f"the same, two exact sets:                        {ss.metrics.c2st(another, reference):.3f}")

# %%
# Log-densities
# -------------
# ``log_prob`` integrates the probability flow. On exact samples, the mean difference from the exact log-density is the
# Kullback–Leibler divergence from the exact posterior to the network's: the one number that includes everything.
some = reference[:100]
log_q, log_p = ss.log_prob(posterior, some).value, exact_log_density(some, seen)
gap = log_p - log_q
print(f"KL divergence {gap.mean():.2f} ± {gap.std() / len(gap) ** 0.5:.2f} nats")
print(f"log-densities of the exact posterior: mean {log_p.mean():.2f}, standard deviation {log_p.std():.2f}")

# %%
# Calibration
# -----------
# A posterior must be right for all observations, not for one. Draw many θ from the prior, run the simulator, and rank
# each θ among samples of its own posterior. If the posteriors are right, the ranks are uniform, and 90 % of them are in
# the central 90 %. All observations are solved in one call: ``given`` takes a row for each sample.
truth = 2 * torch.rand(200, 2) - 1
observed = standardise(crescent(len(truth)) + move(truth))
each = amortised.given(x_o=observed.repeat_interleave(19, 0))
many = ss.sample(each, (200 * 19, 2), nfe=20, seed=1).reshape(200, 19, 2)
ranks = ss.metrics.ranks(truth, many)
coverage = ((ranks - 0.5).abs() <= 0.45).double().mean(0)
print("coverage of the central 90 % intervals:", ", ".join(f"{value:.2f}" for value in coverage.tolist()))
ss.plots.calibration(ranks)
plt.show()

# %%
# A network of sbi
# ----------------
# A network that the package `sbi <https://sbi-dev.github.io/sbi/>`_ has trained, ``NPSE`` or ``FMPE``, needs three
# lines; the samples then come from our solvers, in tens of evaluations instead of hundreds:
#
# .. code-block:: python
#
#     estimator = sbi.inference.NPSE(prior).append_simulations(theta, x).train()
#     posterior = ss.interop.sbi_posterior(estimator, prior, nfe=12)
#     samples = posterior.sample((1000,), x=x_o)
#
# ``ss.interop.from_sbi(estimator)`` is the denoiser, for everything else on this page. For several independent
# observations of one θ, ``ss.inverse.TallPosterior`` combines their scores.
