"""
A sampler of five steps, fitted to a model
==========================================

The numbers of a plan need not come from a formula. ``ss.fit`` changes the times and the weights until the results of
five evaluations are close to those of a fine solve.
"""

# %%
# A model and the plan of a published solver
# ------------------------------------------
import matplotlib.pyplot as plt
import torch

import scoresde as ss

centres = ss.Noise(0).normal((12, 16), draw=0)
model = ss.GaussianMixture(ss.VP(), 0.7 * centres, std=0.2)
sde = model.sde
published = ss.DPMSolverPP(order=2).plan(sde, ss.grids.karras(sde, 5))

# %%
# Fit
# ---
# 128 trajectories, of which a third is held out and decides when to stop. For your network this costs some ten
# thousand evaluations of a sample, once.
fitted = ss.fit(ss.VelocityAB(2).plan(sde, ss.grids.karras(sde, 5)), model, (128, 16), steps=60)

ss.plots.plan(published)
ss.plots.plan(fitted)
plt.show()

# %%
# Compare on new initial states
# -----------------------------
start = ss.Noise(5).normal((512, 16), draw=0, dtype=torch.float64)
exact = ss.sample(model, start, ss.UniPC(3), steps=300)


def error(plan: ss.Plan) -> torch.Tensor:
    """Distance of each sample from the fine solve."""
    return (ss.sample(model, start, plan) - exact).norm(dim=1)


figure, ax = plt.subplots(figsize=(6, 3.5))
for name, plan in {"DPM-Solver++(2M)": published, "fitted": fitted}.items():
    e = error(plan)
    ax.hist(e.log10().tolist(), bins=40, alpha=0.6, label=f"{name}: median {e.median():.1e}")
ax.set(xlabel="log₁₀ of the distance from the fine solve", ylabel="samples")
ax.legend()
plt.show()

# %%
# The few samples on the right end in another mode: five evaluations do not resolve where the flow forks.
#
# Keep it
# -------
# A fitted plan is saved as a file of a few kilobytes, which records how the plan was fitted.
fitted.save("/tmp/five.json")
print(fitted.meta["teacher"])
