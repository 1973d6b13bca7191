from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch

from tests.dist_pool import DistPool

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    kills = parser.getgroup("kills", "random kills of tests/training/test_kill.py beside its dozen")
    kills.addoption("--kills", type=int, default=0, help="how many")
    kills.addoption("--kill-seed", type=int, default=12, help="the first seed; the others follow it")
    kills.addoption("--kill-jobs", type=int, help="how many at a time (default: the number of cores)")
    kills.addoption("--kill-budget", type=float, metavar="SECONDS", help="begin no more after this time")
    kills.addoption("--kill-report", type=Path, metavar="FILE", help="append a row each; its seeds are left out")
    fuzz = parser.getgroup("fuzz", "mutations of tests/fuzz")
    fuzz.addoption("--fuzz-seed", type=int, default=0, help="other mutations with another seed")
    fuzz.addoption("--fuzz-n", type=int, default=200, help="mutations per reader (default 200; slow readers get fewer)")


@pytest.hookimpl(optionalhook=True)  # without xdist there is nothing to spread
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """How the suite is spread over several processes (``make test`` takes two).

    A file stays together, since its tests share what its fixtures make. The tests on hosts stay together too: they
    watch time-outs, and two clusters at a time would disturb each other.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "hosts" if _on_hosts(file) else file

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is on hosts waits more than it works, so it comes first, while another process computes; then what starts
    ranks, so that no long file is left for the end."""

    def file(item: pytest.Item) -> str:
        return item.nodeid.partition("::")[0]

    ranks = {file(item) for item in items if item.get_closest_marker("distributed")}
    items.sort(key=lambda item: (not _on_hosts(file(item)), file(item) not in ranks))


def _on_hosts(file: str) -> bool:
    return file.startswith("tests/launch/") and file.endswith("cluster.py")


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
