r"""
Log-densities
=============

A diffusion model has a density. Along the probability flow, log p changes by the trace of the Jacobian:

.. math:: \log p_0(x_0) = \log p_T(x_T) + \int_0^T \mathrm{tr}\,\frac{\partial v}{\partial x}(x_t, t)\, dt
"""

# %%
# A model whose density is known
# ------------------------------
# The mixture has its log-density in closed form, so every number on this page can be checked. For your network, write
# ``ss.Denoiser(net, sde, predicts=...)`` instead.
import matplotlib.pyplot as plt
import torch

import scoresde as ss

ring = torch.polar(torch.tensor(1.0), torch.arange(6) * torch.pi / 3)
model = ss.GaussianMixture(ss.VP(), torch.view_as_real(ring), std=0.2)
x = model.sample(64, seed=0)

# %%
# One call
# --------
# The result has one value in nats for each sample. Each sample has its own steps.
density = ss.log_prob(model, x)
exact = model.log_prob(x)
print(f"largest error: {(density.value - exact).abs().max():.1e} nats, evaluations: {density.nfe.float().mean():.0f}")

figure, ax = plt.subplots(figsize=(4.5, 4.5))
ax.plot(exact, density.value, ".")
ax.plot([exact.min(), exact.max()], [exact.min(), exact.max()], color="0.7", lw=0.8, zorder=0)
ax.set(xlabel="exact log p", ylabel="computed log p")
plt.show()

# %%
# In many dimensions
# ------------------
# The exact trace needs D products with the Jacobian. Random probes estimate the trace from a few products; the result
# has a standard error.
wide = ss.GaussianMixture(ss.VP(), ss.Noise(0).normal((4, 32), draw=0), std=0.3)
z = wide.sample(32, seed=0)
guess = ss.log_prob(wide, z, probes=ss.likelihood.Probes("hutchinson", n=8), seed=0)
error = (guess.value - wide.log_prob(z)).abs()
print(f"mean error {error.mean():.2f} nats, mean standard error {guess.standard_error.mean():.2f}")

# %%
# A bound
# -------
# The evidence lower bound of the reverse SDE needs no Jacobian. Its exact value is at most log p, for every model;
# its estimate has a standard error.
bound = ss.elbo(model, x, seed=0)
error = bound.standard_error.square().mean().sqrt() / len(x) ** 0.5
print(f"mean log p {exact.mean():.3f}, mean bound {bound.value.mean():.3f} ± {error:.3f} nats")
