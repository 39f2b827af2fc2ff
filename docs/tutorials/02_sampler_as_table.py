"""
A sampler is a table of numbers
===============================

Every solver with fixed steps computes weighted sums of states and of network outputs. The weights depend on the
process, the solver and the times, and not on the network. So they can be computed once, printed, drawn, checked and
changed.
"""

# %%
# From a solver to a table
# ------------------------
# A solver and a grid of times give a plan. Each row is a state: a sum of earlier states x and of earlier denoised
# states d.
import matplotlib.pyplot as plt
import torch

import scoresde as ss

sde = ss.VP()
grid = ss.grids.karras(sde, 5)
plan = ss.DPMSolverPP(order=2).plan(sde, grid)
print(plan)

# %%
# The table as a picture. A line is a row of the table.
ss.plots.plan(plan)
plt.show()

# %%
# UniPC has two rows for each step: it predicts, evaluates the network, and corrects.
ss.plots.plan(ss.UniPC(order=3).plan(sde, grid))
plt.show()

# %%
# Run it
# ------
# A plan takes the place of a solver. It runs on every model of its process: a network, a guided network, an exact
# model. This is a mixture of Gaussians, whose denoiser, score, density and samples have closed forms.
means = torch.tensor([[-1.0, -0.5], [0.0, 1.0], [1.0, -0.5]])
model = ss.GaussianMixture(sde, means, std=0.15)
twenty = ss.DPMSolverPP(order=2).plan(sde, ss.grids.karras(sde, 20))
ss.plots.samples(ss.sample(model, (500, 2), twenty, seed=0))
plt.show()

# %%
# Check it against exact answers
# ------------------------------
# On Gaussian data, the mean and the variance of a plan's samples are computed without drawing any. The gain is the
# standard deviation of the samples, divided by that of the data. Five steps on this grid are few: DDIM loses half of
# the standard deviation, and UniPC of order 3 overshoots.
solvers = {"DDIM": ss.DDIM(), "DPM-Solver++(2M)": ss.DPMSolverPP(2), "UniPC-3": ss.UniPC(3)}
plans = [solver.plan(sde, grid) for solver in solvers.values()]
ss.plots.response(plans, sde)
plt.show()

# %%
# A network is never exact. How much does an error of one evaluation move the samples?
ss.plots.stability(plans, sde)
plt.show()

# %%
# The order of convergence, measured against the exact flow of the mixture:
ss.plots.orders({name: ss.analysis.convergence_order(solver, model, n=8) for name, solver in solvers.items()})
plt.show()

# %%
# Error against the number of evaluations, on two grids:
table = ss.analysis.work_precision(
    [ss.DDIM(), ss.DPMSolverPP(2), ss.UniPC(3)],
    model,
    [ss.grids.karras, ss.grids.uniform_lam],
    nfes=(5, 8, 12, 20),
    n=64,
)
ss.plots.work_precision(table)
plt.show()

# %%
# Change it
# ---------
# A plan is frozen, and its rows are tuples of numbers. ``ss.fit`` changes the numbers for a model, see
# :ref:`sphx_glr_gallery_05_five_steps.py`. Tables can be saved, and are the same on every machine:
plan.save("/tmp/plan.json")
assert ss.Plan.load("/tmp/plan.json") == plan
