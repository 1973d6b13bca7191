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


@pytest.fixture(scope="session")
def dist_pool() -> Iterator[Callable[[int], DistPool]]:
    """``dist_pool(world_size).run(function, *args)``: gloo processes shared by the whole test session."""
    pools: dict[int, DistPool] = {}

    def get(world_size: int) -> DistPool:
        return pools.setdefault(world_size, DistPool(world_size))

    yield get
    for pool in pools.values():
        pool.close()
