"""
Our solvers in a pipeline of diffusers
======================================

A network of diffusers becomes a denoiser with one call, and a solver becomes a scheduler with another. The networks
here are tiny and untrained, so that the page runs everywhere; a pretrained pipeline takes the same lines.
"""

# %%
# From diffusers
# --------------
# The scheduler says how the network was trained: its betas, its prediction, its labels.
import matplotlib.pyplot as plt
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

import scoresde as ss

torch.manual_seed(0)
unet = UNet2DModel(
    sample_size=16,
    in_channels=3,
    out_channels=3,
    layers_per_block=1,
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=8,
    attention_head_dim=8,
)
scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
model = ss.interop.from_diffusers(unet, scheduler)
print(model)

# %%
# Every solver, log-density and guidance rule of the library now takes this model.
x = ss.sample(model, (4, 3, 16, 16), nfe=8, seed=0)
print(x.shape)

# %%
# The grid of a scheduler, for the same steps that diffusers takes:
times = ss.grids.from_scheduler(model, 10, scheduler)
ss.plots.grid({"diffusers, leading": times, "karras": ss.grids.karras(model.sde, 10)}, model.sde)
plt.show()

# %%
# Into diffusers
# --------------
# Any solver or plan becomes a scheduler. The pipeline needs no other change.
pipe = DDPMPipeline(unet, ss.interop.to_diffusers(ss.UniPC(3), scheduler, clip=1.0))
pipe.set_progress_bar_config(disable=True)
images = pipe(batch_size=4, num_inference_steps=8, generator=torch.manual_seed(0), output_type="np").images

# %%
# An untrained network turns noise into something smooth, not into pictures.
ss.plots.samples(torch.tensor(images).permute(0, 3, 1, 2), value_range=(0.0, 1.0))
plt.show()
