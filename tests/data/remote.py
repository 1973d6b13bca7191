"""What the tests of stores share."""

from __future__ import annotations

import hashlib
import multiprocessing
import time

import numpy as np

from scale_digrap.data.index import ShardEntry
from scale_digrap.data.store import ShardStore

MIB = 1 << 20
SPAWN = multiprocessing.get_context("spawn")


def content(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def entry(name: str, data: bytes) -> ShardEntry:
    return ShardEntry(name=name, bytes=len(data), samples=1, sha256=hashlib.sha256(data).hexdigest())


def store(folder, **options) -> ShardStore:
    return ShardStore(**{"cache_dir": folder, "timeout_s": 0.5, "retries": 2, "backoff_s": 0.01, **options})


def shards_in(folder) -> set[str]:
    """The complete shards of a cache."""
    return {path.name.split("-", 1)[1] for path in folder.iterdir() if path.suffix == ".tar"}


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
