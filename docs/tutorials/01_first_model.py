"""
A model of points in the plane
==============================

Train a network on two moons, draw samples, and look at them. This is all that a diffusion model needs: a process
that adds noise, a network that removes it, a loss, and a solver.
"""

# %%
# The data
# --------
# 4,000 points near two half circles, scaled to a standard deviation of about 1. The data is a tensor (N, 2); images
# would be (N, channels, height, width).
import matplotlib.pyplot as plt
import torch

import scoresde as ss

torch.manual_seed(0)
angle = torch.rand(4000) * torch.pi
upper = torch.rand(4000) < 0.5
x = torch.where(upper, angle.cos(), 1 - angle.cos())
y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
data = torch.stack([x - 0.5, y - 0.25], 1) / 0.75 + 0.06 * torch.randn(4000, 2)

ss.plots.samples(data)
plt.title("data")
plt.show()

# %%
# The process
# -----------
# The variance-preserving process mixes data and noise, :math:`x_t = \alpha_t x_0 + \sigma_t z`. At t = 0 is data, at
# t = T is noise. ``ss.Flow()``, ``ss.EDM()`` or two functions of your own would do as well.
sde = ss.VP()
ss.plots.schedule(sde)
plt.show()

# %%
# The network and the loss
# ------------------------
# The denoiser contains the network, the process, and the name of what the network predicts. This network predicts
# :math:`v = \alpha_t z - \sigma_t x_0` ("v-prediction"). ``ss.DSM`` is the loss of denoising score matching,
# :math:`E_{t, x_0, z} |\text{net}(x_t, t) - \text{target}|^2`.
model = ss.Denoiser(ss.nn.MLP(2, seed=0), sde, predicts="v")
loss = ss.DSM(model)
optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 1000)
ema = ss.EMA(model, decay=0.99)

for _ in range(1000):
    batch = data[torch.randint(len(data), (256,))]
    optimiser.zero_grad()
    value = loss(batch)
    value.backward()
    optimiser.step()
    schedule.step()
    ema.update()
print(f"loss of the last batch: {value.item():.3f}")

# %%
# Samples
# -------
# Ten evaluations of the network. The averaged weights give better samples than those of the last step.
with ema.swapped():
    run = ss.solve(model, (1000, 2), nfe=10, seed=0, watch=ss.Watch(save_at="all"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
    ss.plots.trajectory(run, count=6, ax=left)
    left.set_title("96 samples on their way")
    ss.plots.samples(run.x, ax=right)
    right.set_title(f"samples, {run.nfe} evaluations")
    plt.show()

# %%
# How good are they?
# ------------------
# The sliced Wasserstein distance between the samples and fresh data, beside its noise floor: the median distance after
# the labels "sample" and "data" are shuffled. The p-value says how often shuffled labels give such a large distance.
print(ss.metrics.compare(ss.metrics.sliced_w2, run.x, data[:1000], n_permutations=50))

# %%
# What the network has learned
# ----------------------------
# The score at two noise levels: arrows that point to where data is more likely.
figure, axes = plt.subplots(1, 2, figsize=(9, 4.5))
with ema.swapped():
    for ax, t in zip(axes, (0.15, 0.5), strict=True):
        ss.plots.field(model, t, limits=(-2.5, 2.5), ax=ax)
plt.show()

# %%
# Next: :ref:`sphx_glr_gallery_02_sampler_as_table.py` shows what ``ss.solve`` has run.
