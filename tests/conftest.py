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


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs on one worker when the suite is spread over several (``make test`` takes two).

    A file stays together, since its tests share what its fixtures make. The tests on hosts stay together too: they
    watch time-outs, and two clusters at a time would disturb each other. They wait more than they work, so they come
    first, while the other worker computes; then what starts ranks, so that no long file is left for the end.
    """

    def group(item: pytest.Item) -> str:
        name = item.nodeid.partition("::")[0]
        return "hosts" if "make_cluster" in getattr(item, "fixturenames", ()) else name

    groups = {item: group(item) for item in items}
    ranks = {groups[item] for item in items if item.get_closest_marker("distributed")}
    for item in items:
        item.add_marker(pytest.mark.xdist_group(groups[item]))
    items.sort(key=lambda item: (groups[item] != "hosts", groups[item] not in ranks))


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
