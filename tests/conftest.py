from __future__ import annotations

import os
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch

from tests.dist_pool import DistPool

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=12, help="how many randomised kills of tests/training/test_kill.py")


_POOLS: dict[int, DistPool] = {}


@pytest.fixture(scope="session")
def dist_pool() -> Iterator[Callable[[int], DistPool]]:
    """``dist_pool(world_size).run(function, *args)``: gloo processes shared by the whole test session."""

    def get(world_size: int) -> DistPool:
        return _POOLS.setdefault(world_size, DistPool(world_size))

    yield get
    for pool in _POOLS.values():
        pool.close()


@pytest.fixture(autouse=True)
def _young_pools() -> Iterator[None]:
    """Between tests, pools that have become slow end, and start anew when they are next called."""
    yield
    for pool in _POOLS.values():
        pool.retire()
