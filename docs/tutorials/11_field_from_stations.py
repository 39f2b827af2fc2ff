r"""
A field from sparse stations
============================

A field, such as temperature, is measured at a few stations, each with an accuracy of its own. Which fields fit? For a
Gaussian prior the answer is exact and is called *kriging*. A score model gives samples for any prior; here it has the
exact score of the same Gaussian, so that only the error of the sampler is left.
"""

# %%
# The prior
# ---------
# Fields on 16 × 22 cells. Their covariance decreases with the distance, :math:`(1 + d/\ell)\,e^{-d/\ell}`, a Matérn
# covariance of order 3/2 with ℓ = 3 cells. Standard deviation 1 in every cell.
import matplotlib.pyplot as plt
import torch

import scoresde as ss
from scoresde import inverse

HEIGHT, WIDTH = 16, 22
EVENT = (1, HEIGHT, WIDTH)
cells = torch.cartesian_prod(torch.arange(HEIGHT), torch.arange(WIDTH)).double()
distance = torch.cdist(cells, cells) / 3.0
cov = (1 + distance) * torch.exp(-distance)
gaussian = ss.Gaussian.of(ss.VP(), torch.zeros(EVENT, dtype=torch.float64), cov)

fields = gaussian.sample(4, 0.0, seed=0)
ss.plots.samples(fields, value_range=(-3.0, 3.0))
plt.title("four fields of the prior")
plt.show()

# %%
# The stations
# ------------
# 30 of the 352 cells. Half of the stations are good and half are poor: ``std`` is a tensor with an entry for each.
generator = torch.Generator().manual_seed(1)
where = torch.randperm(HEIGHT * WIDTH, generator=generator)[:30].sort().values
mask = torch.zeros(HEIGHT * WIDTH, dtype=torch.bool)
mask[where] = True
std = torch.where(torch.arange(30) % 2 == 0, 0.1, 0.8).double()

truth = gaussian.sample(1, 0.0, seed=5)
operator = inverse.Mask(mask.reshape(EVENT))
y = inverse.Measurement(operator, torch.zeros(1, 30, dtype=torch.float64), std=std).simulate(truth, seed=6)
seen = inverse.Measurement(operator, y, std=std)
print(seen)

# %%
# Kriging: the exact posterior
# ----------------------------
# A Gaussian is a mixture with one component, and the posterior of a mixture is exact.
prior = ss.GaussianMixture(gaussian.sde, torch.zeros(1, *EVENT, dtype=torch.float64), cov=cov[None])
exact = inverse.posterior(prior, seen)
mean = exact.mean()
deviation = exact.component_covariances()[0].diagonal().sqrt().reshape(EVENT)

# %%
# Samples by a score model
# ------------------------
# ``MMPS`` adds the measurement to the score. It is exact for a Gaussian if the linear system is solved exactly; more
# ``iterations`` solve it better. In place of ``gaussian`` you can use a network that was trained on fields.
samples = {}
for iterations in (2, 5, 15):
    model = inverse.MMPS(gaussian, seen, iterations=iterations)
    samples[iterations] = ss.sample(model, (64, *EVENT), nfe=15, seed=0).double()

panels = {
    "truth": truth[0],
    "kriging: mean": mean,
    "MMPS: mean": samples[15].mean(0),
    "MMPS: a sample": samples[15][0],
    "kriging: deviation": deviation,
    "MMPS: deviation": samples[15].std(0),
}
figure, axes = plt.subplots(2, 3, figsize=(11, 5), layout="constrained")
for ax, (title, field) in zip(axes.flat, panels.items(), strict=True):
    low, high, colours = (0, 1, "viridis") if "deviation" in title else (-3, 3, "RdBu_r")
    figure.colorbar(ax.imshow(field[0], cmap=colours, vmin=low, vmax=high), ax=ax, shrink=0.8)
    ax.set(title=title, xticks=[], yticks=[])
rows, columns = where // WIDTH, where % WIDTH
axes[0, 0].scatter(columns, rows, c="black", s=torch.where(std < 0.5, 24.0, 6.0), label="large: good station")
axes[0, 0].legend(fontsize=7, loc="lower left")
plt.show()

# %%
# How good are they?
# ------------------
# The spread is the root mean square of the standard deviation. The difference of the means from kriging has a floor:
# the mean of 64 exact samples has an error of an eighth of the spread. With few iterations the mean is wrong.


def root_mean_square(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


print(f"kriging:             spread {root_mean_square(deviation):.3f}")
for iterations, x in samples.items():
    spread, difference = root_mean_square(x.std(0)), root_mean_square(x.mean(0) - mean)
    print(f"MMPS, {iterations:2d} iterations: spread {spread:.3f}, difference of means {difference:.3f}")
print(f"64 exact samples:    difference of means {root_mean_square(deviation) / 8:.3f}")

# %%
# Is it calibrated?
# -----------------
# The truth was drawn from the prior, so its ranks among samples are uniform if the posterior is right. One field has
# many cells, but they vary together. So 100 fields are drawn, measured, and ranked in one cell. The second curve is the
# exact one, from kriging; what both curves share is the chance of these fields.
cases = gaussian.sample(100, 0.0, seed=7)
measured = seen.simulate(cases, seed=8)
each = inverse.Measurement(operator, measured.repeat_interleave(9, 0), std=std)
x = ss.sample(inverse.MMPS(gaussian, each, iterations=10), (100 * 9, *EVENT), nfe=10, seed=2)
ranks = ss.metrics.ranks(cases[:, 0, 8, 11], x.reshape(100, 9, *EVENT)[:, :, 0, 8, 11])
single = [inverse.Measurement(operator, row[None], std=std) for row in measured]
means = torch.stack([inverse.posterior(prior, one).mean()[0, 8, 11] for one in single])
uniform = torch.special.ndtr((cases[:, 0, 8, 11] - means) / deviation[0, 8, 11])
ax = ss.plots.calibration(torch.stack([ranks, uniform], 1))
for line, label in zip(ax.lines[1:], ("MMPS", "kriging"), strict=True):
    line.set_label(label)
ax.legend()
plt.show()

# %%
# `A climate field from sparse stations <../climate.html>`_ does this with two runs of a climate model and a trained
# network, where the exact answer is not known.
