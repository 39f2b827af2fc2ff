from __future__ import annotations

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("quiet", deadline=None, derandomize=True)
hypothesis.settings.load_profile("quiet")
