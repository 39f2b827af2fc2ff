r"""
An inverse problem with an exact answer
=======================================

You measured :math:`y = A x_0 + \text{std} \cdot n`, and you want samples of :math:`x_0` given y. The model of
:math:`x_0` is the prior. If the prior is a mixture of Gaussians, the posterior is a mixture too, so every method can
be compared with the exact answer.
"""

# %%
# The prior and a measurement
# ---------------------------
# Signals of 64 numbers, made of a few templates. A third of the entries is measured, with noise.
import matplotlib.pyplot as plt
import torch

import scoresde as ss
from scoresde import inverse

grid = torch.linspace(0, 1, 64)
templates = torch.stack([torch.sin(2 * torch.pi * (k * grid + 0.13 * k)) for k in (1, 2, 3, 4)])
distance = (grid[:, None] - grid[None]).abs()
smooth = 0.09 * torch.exp(-0.5 * (distance / 0.06) ** 2) + 1e-4 * torch.eye(64)
prior = ss.GaussianMixture(ss.VP(), templates, cov=smooth.expand(4, 64, 64))

truth = prior.sample(1, seed=7)
known = torch.zeros(64, dtype=torch.bool)
known[::3] = True
known[20:44] = False
seen = inverse.Measurement(inverse.Mask(known), truth[:, known] + 0.1 * torch.randn(1, int(known.sum())), std=0.1)

# %%
# The exact posterior
# -------------------
exact = inverse.posterior(prior, seen)


def show(samples: torch.Tensor, title: str, ax: plt.Axes) -> None:
    ax.plot(grid, samples[:30].T, color="C0", lw=0.6, alpha=0.5)
    ax.plot(grid, truth[0], color="black", lw=1.2, label="truth")
    ax.plot(grid[known], seen.y[0], "r.", label="measured")
    ax.set(title=title, ylim=(-2.2, 2.2))


figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
show(prior.sample(30, seed=0), "prior", axes[0])
show(exact.sample(30, seed=0), "exact posterior", axes[1])
axes[1].legend(fontsize=8)
plt.show()

# %%
# Posterior denoisers
# -------------------
# A posterior denoiser wraps the model. It works with every solver.
figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), sharey=True)
reference = exact.sample(400, seed=1)
methods = {
    "MMPS": inverse.MMPS(prior, seen),
    "PiGDM": inverse.PiGDM(prior, seen),
    "DPS": inverse.DPS(prior, seen),
}
for ax, (name, model) in zip(axes, methods.items(), strict=True):
    x = ss.sample(model, (400, 64), ss.DDPM(), steps=60, seed=0)
    show(x, name, ax)
    print(f"{name}: sliced W2 to the exact posterior {ss.metrics.sliced_w2(x, reference):.3f}")
print(f"two sets of exact samples: {ss.metrics.sliced_w2(exact.sample(400, seed=2), reference):.3f}")
plt.show()

# %%
# Is it calibrated?
# -----------------
# Draw many truths and measurements, and rank each truth among the samples of its posterior. If the posterior is exact,
# the ranks are uniform.
truths = prior.sample(200, seed=3)
noise = 0.1 * ss.Noise(4).normal((200, int(known.sum())), draw=0)
many = inverse.Measurement(inverse.Mask(known), truths[:, known] + noise, std=0.1)
entry = 32
repeated = inverse.Measurement(many.operator, many.y.repeat_interleave(19, 0), std=0.1)
draws = ss.sample(inverse.MMPS(prior, repeated), (200 * 19, 64), ss.DDPM(), steps=30, seed=0).reshape(200, 19, 64)
ranks = ss.metrics.ranks(truths[:, entry], draws[:, :, entry])
ss.plots.calibration(ranks)
plt.title("MMPS, the entry in the middle")
plt.show()
