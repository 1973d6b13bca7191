"""A pool of gloo processes that stay alive between tests: a spawn costs seconds, a call into the pool milliseconds."""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil

# Engines make process groups by the dozen, and gloo keeps its threads until the process ends: with a thousand of them
# every later test is slower. A young rank has four.
_MOST_THREADS = 100

# Imported once in the fork server, so that every rank starts with them in memory.
PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.checkpoint",
    "deepspeed",
    "scale_digrap.training.loop",
    "scale_digrap.training.fsdp",
    "scale_digrap.training.zero",
]


class RankError(AssertionError):
    """An exception on one rank, with that rank's traceback as its message."""


class DistPool:
    """``world_size`` processes with ``torch.distributed`` (gloo, loopback) initialised in each.

    >>> DistPool(2).run(function, 1, key=2)  # [function(1, key=2) on rank 0, ... on rank 1]
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        rendezvous = tempfile.mkdtemp(prefix="dist-pool-")
        for rank in range(self.world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, rendezvous, there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 240.0, **kwargs: Any) -> list[Any]:
        """Call a module-level ``function`` on every rank; return the results in rank order.

        The first exception of any rank is raised here; the pool is then started anew by the next call, because the
        other ranks may be waiting in a collective for the one that failed.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(results) < self.world_size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = sorted(set(range(self.world_size)) - set(results))
                self.close()
                raise TimeoutError(f"{function.__qualname__}: no answer from ranks {missing} after {timeout:.0f} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    ok, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    ok, value = False, "the process died without an exception"
                if not ok:
                    self.close()
                    raise RankError(f"rank {rank} of {self.world_size} in {function.__qualname__}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(self.world_size)]

    def retire(self) -> None:
        """End processes that have gathered threads; the next call starts new ones."""
        if any(
            process.is_alive() and psutil.Process(process.pid).num_threads() > _MOST_THREADS
            for process in self._processes
        ):
            self.close()

    def close(self) -> None:
        """End the pool's own processes, by handle."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def _serve(rank: int, world_size: int, rendezvous: str, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo"
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}/store", rank=rank, world_size=world_size)
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(*args, **kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
