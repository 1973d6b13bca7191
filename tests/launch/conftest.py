"""Clusters for launch tests, shared by the tests of a module.

A machine that cannot make hosts skips these tests with the reason. One that could, but lacks programs, skips them too,
unless SCALE_DIGRAP_REQUIRE_CLUSTER=1 (.ci/run) makes a failure of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.cluster import Cluster, missing_tools, unavailable
from tests.launch.workload import Workload


@pytest.fixture(scope="module")
def make_cluster() -> Iterator[Callable[..., Cluster]]:
    """``make_cluster(2, ssh=True)``: the same hosts for the same arguments, all on, plugged in and idle."""
    made: dict[str, Cluster] = {}

    def get(hosts: Any, **arguments: Any) -> Cluster:
        if reason := unavailable():
            pytest.skip(reason)
        tools = {name: value for name, value in arguments.items() if name in ("ssh", "slurm")}
        if missing := missing_tools(**tools):
            text = f"missing: {', '.join(missing)} (make cluster-tools)"
            if os.environ.get("SCALE_DIGRAP_REQUIRE_CLUSTER") == "1":
                pytest.fail(text)
            pytest.skip(text)
        key = repr((hosts, sorted(arguments.items())))
        if key in made:
            made[key].reset()
        else:
            made[key] = Cluster(hosts, **arguments)
        return made[key]

    yield get
    for cluster in made.values():
        cluster.close()


@pytest.fixture(scope="session")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    """The quick-start's tiny model on a few of its samples."""
    pytest.importorskip("easy_vqa")
    return Workload(tmp_path_factory.mktemp("workload"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Where a test's run goes."""
    return tmp_path / "run"
