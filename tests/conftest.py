from __future__ import annotations

import gc

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("quiet", deadline=None, derandomize=True)
hypothesis.settings.load_profile("quiet")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test has the same numbers in any order and on any worker."""
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """Thousands of collected tests live to the end, and no collection of garbage needs to look at them."""
    gc.collect()
    gc.freeze()
