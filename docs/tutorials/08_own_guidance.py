r"""
A guidance rule of your own
===========================

Classifier-free guidance combines two predictions, one with a condition and one without. A rule is a function of
both.
"""

# %%
# A conditional model
# -------------------
# A mixture whose components have labels, as an exact conditional network. The label 3 means "any".
import matplotlib.pyplot as plt
import torch

import scoresde as ss

means = torch.tensor([[-1.2, 0.0], [0.6, 1.0], [0.6, -1.0]])
parts = [ss.GaussianMixture(ss.VP(), m[None], std=0.45) for m in means]
whole = ss.GaussianMixture(ss.VP(), means, std=0.45)


def net(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    each = torch.stack([m.x0(x, t) for m in (*parts, whole)])
    return each[label, torch.arange(len(x))]


model = ss.Denoiser(net, ss.VP(), predicts="x0")
labels = torch.arange(3).repeat_interleave(200)

# %%
# Plain guidance
# --------------
# :math:`D = D_\varnothing + w (D_y - D_\varnothing)`. With a larger scale the samples leave the data.


def show(guided: ss.ClassifierFree, title: str, ax: plt.Axes) -> None:
    x = ss.sample(guided.given(label=labels), (600, 2), ss.DPMSolverPP(2), steps=20, seed=0)
    ax.scatter(*x.T, c=labels, s=4, cmap="viridis")
    ax.set(title=title, xlim=(-4, 4), ylim=(-4, 4), aspect="equal")


figure, axes = plt.subplots(1, 3, figsize=(12, 4))
for ax, scale in zip(axes, (1.0, 3.0, 8.0), strict=True):
    show(ss.ClassifierFree(model, scale, null={"label": 3}), f"scale {scale:g}", ax)
plt.show()

# %%
# A rule of your own
# ------------------
# A rule gets the model, the state and its time, both predictions of x₀, and the scale. It returns the guided
# prediction. This one limits the length of the change.


def limited(model, x, t, strong, weak, scale):
    change = (scale - 1) * (strong - weak)
    length = change.norm(dim=1, keepdim=True)
    return strong + change * (0.4 / length.clamp_min(0.4))


figure, axes = plt.subplots(1, 2, figsize=(8, 4))
show(ss.ClassifierFree(model, 8.0, null={"label": 3}), "plain, scale 8", axes[0])
show(ss.ClassifierFree(model, 8.0, null={"label": 3}, rule=limited), "limited, scale 8", axes[1])
plt.show()

# %%
# At some noise levels only
# -------------------------
# Guidance matters most at medium noise levels. With an interval of times, there is no second evaluation outside it.
figure, ax = plt.subplots(figsize=(4, 4))
show(ss.ClassifierFree(model, 8.0, null={"label": 3}, interval=(0.2, 0.6)), "scale 8 for t in (0.2, 0.6)", ax)
plt.show()
