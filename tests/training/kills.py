"""Training on two ranks that is killed at a chosen point, for real: SIGKILL, no clean-up, no last words."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.dist_pool import PRELOAD
from tests.training import runs


@dataclass(frozen=True)
class Kill:
    """Where a run dies.

    Attributes:
        point: a name of :data:`POINTS`.
        call: at which call of that point, counted from 1.
        rank: which rank is killed; None for both.
    """

    point: str
    call: int = 1
    rank: int | None = 0


def _before(owner: Any, name: str, hit: Callable[[], None]) -> None:
    original = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        hit()
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def _after(owner: Any, name: str, hit: Callable[[], None]) -> None:
    original = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        hit()
        return result

    setattr(owner, name, patched)


def _points() -> dict[str, Callable[[Callable[[], None]], None]]:
    from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

    from scale_digrap.training import loop, manifest
    from scale_digrap.training.checkpoint import Checkpointer
    from scale_digrap.training.ranks import Ranks

    return {
        "forward": lambda hit: _before(loop, "answer_loss", hit),
        "after the loss": lambda hit: _after(loop, "answer_loss", hit),
        "a reduction": lambda hit: _before(Ranks, "sum", hit),
        "save begins": lambda hit: _before(Checkpointer, "save", hit),
        "before the tensors": lambda hit: _before(FileSystemWriter, "write_data", hit),
        "after the tensors": lambda hit: _after(FileSystemWriter, "write_data", hit),
        "before .metadata": lambda hit: _before(FileSystemWriter, "finish", hit),
        "while hashing": lambda hit: _before(manifest, "describe", hit),
        "before the manifest": lambda hit: _before(manifest, "write", hit),
        "after the manifest": lambda hit: _after(manifest, "write", hit),
        # Calls of a save: the manifest's folders, then the folder of the checkpoints after each rename.
        "a folder's entries": lambda hit: _before(manifest, "sync_folder", hit),
        "deleting": lambda hit: _before(Checkpointer, "_prune", hit),
        "save ends": lambda hit: _after(Checkpointer, "save", hit),
        "reading": lambda hit: _before(FileSystemReader, "read_data", hit),
        "checking": lambda hit: _before(Checkpointer, "problems", hit),
        "loaded": lambda hit: _after(Checkpointer, "resume", hit),
    }


POINTS = (
    "forward", "after the loss", "a reduction", "save begins", "before the tensors", "after the tensors",
    "before .metadata", "while hashing", "before the manifest", "after the manifest", "a folder's entries", "deleting",
    "save ends", "reading", "checking", "loaded",
)  # fmt: skip
ON_RANK_0 = ("before .metadata", "before the manifest", "after the manifest", "a folder's entries", "deleting")
AT_RESUME = ("reading", "checking", "loaded")


def _arm(kill: Kill, rank: int) -> None:
    if kill.rank not in (None, rank):
        return
    calls = 0

    def hit() -> None:
        nonlocal calls
        calls += 1
        if calls == kill.call:
            os.kill(os.getpid(), signal.SIGKILL)

    _points()[kill.point](hit)


def _serve(rank: int, world: int, rendezvous: str, pipe: Any, kill: Kill | None, arguments: tuple) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo"
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}/store", rank=rank, world_size=world)
    if kill is not None:
        _arm(kill, rank)
    keys = _record_keys()
    *positional, sections = arguments
    try:
        result = runs.run(*positional, **sections)
        # As arrays: tensors travel as handles to memory of a process that is about to end.
        parameters = {name: value.numpy() for name, value in result["parameters"].items()}
        pipe.send((True, {"loss": result["loss"], "parameters": parameters, "keys": keys}))
    except BaseException as error:
        pipe.send((False, f"{type(error).__name__}: {error}"))


def _record_keys() -> list[list[str]]:
    """The sample keys of every micro-batch that this rank collates, in order."""
    from scale_digrap.models.collate import VqaCollator

    keys: list[list[str]] = []
    original = VqaCollator.train

    def train(self: Any, samples: Any) -> Any:
        keys.append([sample.key for sample in samples])
        return original(self, samples)

    VqaCollator.train = train  # type: ignore[method-assign]
    return keys


def start(world: int, *arguments: Any, kill: Kill | None = None, timeout: float = 120.0) -> list[dict] | None:
    """Run a training on fresh processes; ``None`` where it was killed.

    As a launcher does, it ends the ranks that are left when one is gone.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    folder = tempfile.mkdtemp(prefix="killed-")
    processes, pipes = [], []
    for rank in range(world):
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(rank, world, folder, there, kill, arguments), daemon=True)
        process.start()
        there.close()
        processes.append(process)
        pipes.append(here)
    results: dict[int, Any] = {}
    killed = False
    deadline = time.monotonic() + timeout
    try:
        while len(results) < world and not killed:
            ready = wait(
                [pipe for r, pipe in enumerate(pipes) if r not in results], timeout=deadline - time.monotonic()
            )
            if not ready:
                raise TimeoutError(f"no answer from ranks {sorted(set(range(world)) - set(results))}")
            for pipe in ready:
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    ok, value = pipe.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    killed = True
                    continue
                if not ok:
                    # A rank that lost its partner; where nobody was killed it is an error of the run.
                    processes[1 - rank].join(10) if world == 2 else time.sleep(1)
                    if any(process.exitcode == -signal.SIGKILL for process in processes):
                        killed = True
                        continue
                    raise AssertionError(f"rank {rank}: {value}")
                results[rank] = value
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
    return None if killed else [results[rank] for rank in range(world)]


def leftovers(folder: Path) -> list[str]:
    """Names under ``checkpoints`` that are not what a run at rest has."""
    return [path.name for path in folder.iterdir() if path.name.endswith((".tmp", ".old"))] if folder.is_dir() else []
