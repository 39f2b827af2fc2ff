r"""
A solver of your own
====================

A solver writes rows into a table. Its step is a method of a few lines; the coefficients, the cost, the checks and
the loop come from the library.
"""

# %%
# Write one step
# --------------
# This solver evaluates the network at the middle of each step in λ and uses that evaluation alone, the midpoint rule:
# ``tape.move`` computes the exponential integrator's weights.
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch

import scoresde as ss
from scoresde.solvers import Leg, Solver, Tape


@dataclass(frozen=True)
class Middle(Solver):
    """The exponential midpoint rule."""

    order = 2  # of convergence
    stages = 2  # evaluations in a step
    fraction: float = 0.5

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        nodes, s = leg.history[:1], tape.time(leg.row)
        if tape.finite(s, leg.t):  # a step to σ = 0 has no middle in λ
            nodes = [tape.move(leg.row, tape.between(s, leg.t, self.fraction), nodes)]
        new = tape.move(leg.row, leg.t, nodes, evaluates=leg.evaluates, node=leg.node)
        return new, [new]  # row of the new state, and the history for the next step


# %%
# Does it have its order?
# -----------------------
# The order is the slope of the error against the number of steps, on a mixture with a known flow. A wrong weight
# changes this slope.
model = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0, 0.2], [0.8, -0.6]]), std=0.4)
measured = {
    "middle": ss.analysis.convergence_order(Middle(), model, n=8),
    "a third": ss.analysis.convergence_order(Middle(fraction=1 / 3), model, n=8),
}
ss.plots.orders(measured)
plt.show()

# %%
# The slope of the second solver is 1, because only the evaluation in the middle cancels the first error term.
#
# See its table, and run it
# -------------------------
ss.plots.plan(Middle().plan(ss.VP(), ss.grids.karras(ss.VP(), 4)))
plt.show()
x = ss.sample(model, (1000, 2), Middle(), nfe=21, seed=0)
print(ss.metrics.compare(ss.metrics.energy_distance, x, model.sample(1000, seed=1), n_permutations=50))

# %%
# With noise
# ----------
# Wrappers add noise to the table of any deterministic solver. This one adds fresh noise before each step:
noisy = ss.solvers.Churn(Middle(), s_churn=4.0)
y = ss.sample(model, (1000, 2), noisy, nfe=40, seed=0)
print(ss.metrics.compare(ss.metrics.energy_distance, y, model.sample(1000, seed=1), n_permutations=50))
