"""Open shards keep to the process's limit of open files, whatever the number of data sets, workers and caches."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from scale_digrap.data.descriptors import OpenShards, most_open
from scale_digrap.data.errors import DataError
from scale_digrap.data.index import index_shards
from tests.data import made

CODE = """
import os, resource, sys
from scale_digrap.data.descriptors import OPEN_SHARDS, most_open
from scale_digrap.data.loader import TrainLoader
from scale_digrap.data.dataset import ShardDataset
from scale_digrap.data.mixture import Mixture
from tests.data.made import numbers
limit, workers, folders = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
sources = {str(i): ShardDataset(folder) for i, folder in enumerate(folders)}
loader = TrainLoader(
    Mixture(sources, {name: 1.0 for name in sources}), batch_size=30, collate=numbers, workers=workers, timeout_s=120
)
seen = []
for batch in loader:
    seen += batch
    if loader.consumed >= 1500:
        break
descriptors = len(os.listdir("/proc/self/fd"))
loader.close()
print(len(seen), len(set(seen)), descriptors <= limit, len(OPEN_SHARDS), most_open())
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two data sets of 300 shards, which hold the numbers 0 to 599 each."""
    made_here = []
    for _ in range(2):
        folder = tmp_path_factory.mktemp("shards")
        made.write(folder, 600, per_shard=2)
        index_shards(sorted(folder.glob("*.tar"))).save(folder / "manifest.json")
        made_here.append(str(folder))
    return made_here


@pytest.mark.parametrize(("limit", "workers"), [(1024, 0), (256, 0), (256, 2)])
def test_two_data_sets_of_300_shards_are_read_under_the_usual_limit_of_open_files(folders, limit, workers):
    command = [sys.executable, "-c", CODE, str(limit), str(workers), *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    samples, different, within, still_open, most = done.stdout.split()
    assert (samples, within) == ("1500", "True")
    assert int(different) == 600, "both data sets hold the numbers 0 to 599, and an epoch has 1,200"
    assert int(still_open) == 0, "closed with the loader"
    assert int(most) == limit // 4


def test_the_limit_is_looked_at_when_shards_are_opened():
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert most_open() == (4096 if soft == resource.RLIM_INFINITY else max(4, min(4096, soft // 4)))


class _Value:
    closed: list[str]

    def __init__(self, name: str, closed: list[str]) -> None:
        self.name, self._closed = name, closed

    def __del__(self) -> None:
        self._closed.append(self.name)


def test_what_is_let_go_is_closed_by_its_last_user_and_the_least_recently_used_goes_first():
    closed: list[str] = []
    shards = OpenShards(lambda: 2)
    first = shards.put("one", 0, lambda: _Value("one 0", closed))
    shards.put("two", 0, lambda: _Value("two 0", closed))
    assert shards.get("one", 0) is first
    shards.put("one", 1, lambda: _Value("one 1", closed))
    assert (closed, len(shards), shards.get("two", 0)) == (["two 0"], 2, None)
    shards.put("two", 1, lambda: _Value("two 1", closed))
    shards.put("two", 2, lambda: _Value("two 2", closed))
    assert closed == ["two 0", "one 1"], "'one 0' has a user"
    del first
    assert closed == ["two 0", "one 1", "one 0"]
    shards.drop("two")
    assert (sorted(closed[3:]), len(shards)) == (["two 1", "two 2"], 0)


def test_where_no_descriptor_is_left_everything_is_let_go_and_opening_is_tried_again():
    closed: list[str] = []
    shards = OpenShards(lambda: 9)
    shards.put("one", 0, lambda: _Value("one", closed))
    calls = []

    def fails_once():
        calls.append(1)
        if len(calls) == 1:
            raise OSError(24, "Too many open files")
        return "opened"

    assert shards.put("one", 1, fails_once) == "opened"
    assert (len(calls), closed) == (2, ["one"])
    with pytest.raises(DataError, match=r"Too many open files, and this process may have \d+.*ulimit -n"):
        shards.put("one", 2, lambda: (_ for _ in ()).throw(OSError(24, "Too many open files")))


def test_a_child_that_is_forked_meanwhile_is_not_stuck():
    shards = OpenShards(lambda: 9)
    shards.put("one", 0, object)
    shards._mutex.acquire()  # as another thread would hold it
    child = os.fork()
    if child == 0:
        done = threading.Thread(target=shards.put, args=("one", 1, object), daemon=True)
        done.start()
        done.join(20)
        os._exit(0 if not done.is_alive() and len(shards) == 1 else 1)
    shards._mutex.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
