"""
A process of your own
=====================

A process is two functions of time, the scale of the data :math:`\\alpha_t` and the standard deviation of the noise
:math:`\\sigma_t`. Everything else follows: drift, diffusion, transitions, λ and its inverse, the prior.
"""

# %%
# Two functions
# -------------
# They are written with torch, elementwise. This process keeps most of its time at medium noise.
import matplotlib.pyplot as plt
import torch

import scoresde as ss


def alpha(t: torch.Tensor) -> torch.Tensor:
    return torch.cos(torch.pi / 2 * t**1.5)


def sigma(t: torch.Tensor) -> torch.Tensor:
    return torch.sin(torch.pi / 2 * t**1.5)


mine = ss.SDE.from_functions(alpha, sigma)
print(f"f(0.5) = {mine.f(0.5):.3f}, g(0.5) = {mine.g(0.5):.3f}, λ(0.5) = {mine.lam(0.5):.3f}")
ss.plots.schedule([mine, ss.VP(), ss.Flow()])
plt.show()

# %%
# Every solver runs on it
# -----------------------
model = ss.GaussianMixture(mine, torch.tensor([[-1.0], [0.3], [1.2]]), std=0.1)
run = ss.solve(model, (200, 1), nfe=12, seed=0, watch=ss.Watch(save_at="all"))
ss.plots.trajectory(run)
plt.show()

# %%
# A wrong process raises an error
# -------------------------------
# In this process, time runs from noise to data. The error says what to do.
try:
    ss.SDE.from_functions(sigma, alpha)
except ValueError as error:
    print(error)

# %%
# From a drift and a diffusion
# ----------------------------
# If a paper gives :math:`dx = f(t)\,x\,dt + g(t)\,dw`, α and σ are computed by quadrature:
ou = ss.SDE.from_drift(lambda t: -torch.ones_like(t), lambda t: torch.full_like(t, 2**0.5), T=4.0)
print(f"α(1) = {ou.alpha(1.0):.6f}, exact {torch.exp(torch.tensor(-1.0)):.6f}")

# %%
# Which process does a network want?
# ----------------------------------
# A trained network can be run on another process, because x/α at a given σ/α means the same everywhere.
print(ss.sample(model.under(ss.EDM()), (4, 1), nfe=12, seed=0).flatten())
