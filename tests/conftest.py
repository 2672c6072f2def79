"""What every test gets: no network, one seed, one thread per worker, and GPU tests only where there is a GPU."""

import gc
import os
import random

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings

from paged_cache.kernels import dispatch

SEED = 0

# Two workers on two busy cores: a deadline per example would report the machine, not the code.
settings.register_profile("paged_cache", deadline=None, print_blob=True)
settings.load_profile("paged_cache")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="module")
def settled_heap() -> None:
    """Spare collections the half second that all they find of torch, transformers and earlier tests would take."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Give every test the same random numbers, whatever ran before it."""
    random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def kernel_choice() -> None:
    """Let every test choose its kernels by the environment anew."""
    dispatch.forget()
