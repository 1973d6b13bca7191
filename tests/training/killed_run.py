"""A run on two ranks that is killed at a chosen point, for real: SIGKILL, no clean-up, no last words."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.dist_pool import PRELOAD
from tests.training import runs

# What every run imports before it reaches a step, which is half of its time; the last two are for DeepSpeed.
_PRELOAD = [
    *PRELOAD,
    "scale_digrap.training.run",
    "tests.training.runs",
    "transformers.generation.utils",
    "transformers.models.llama.modeling_llama",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llava.modeling_llava",
    "functorch.compile",
    "networkx",
]

Hit = Callable[..., None]

# Starting, polling and reaping look after all children of this process, and two threads that read one exit status get
# one wrong answer: nobody does it at the same time.
_CHILDREN = threading.Lock()


@dataclass(frozen=True)
class Kill:
    """Where a run dies.

    Attributes:
        point: a name of :data:`POINTS`, or :data:`MOMENT`.
        call: at which call of that point, counted from 1; for a moment, milliseconds after the ranks have met.
        rank: which rank is killed; None for both.
    """

    point: str
    call: int = 1
    rank: int | None = 0


def _before(owner: Any, name: str, hit: Hit) -> None:
    original = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        hit()
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def _after(owner: Any, name: str, hit: Hit) -> None:
    original = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        hit()
        return result

    setattr(owner, name, patched)


def _in_a_line(owner: Any, name: str, file: str, hit: Hit) -> None:
    """Half of a line reaches the log."""
    original = getattr(owner, name)

    def patched(self: Any, step: int, *args: Any) -> Any:
        def torn() -> None:
            with open(Path(_run_dir) / file, "a", encoding="utf-8") as log:
                log.write(f'{{"step": {step}, "lo')

        hit(torn)
        return original(self, step, *args)

    setattr(owner, name, patched)


_run_dir = ""  # of the run in this process


def _points() -> dict[str, Callable[[Hit], None]]:
    from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

    from scale_digrap.training import checkpoint, loop, manifest, run
    from scale_digrap.training.checkpoint import Checkpointer
    from scale_digrap.training.metrics import Metrics
    from scale_digrap.training.ranks import Ranks

    return {
        "the configuration": lambda hit: _before(loop, "save_config", hit),
        "forward": lambda hit: _before(loop, "answer_loss", hit),
        "after the loss": lambda hit: _after(loop, "answer_loss", hit),
        "a reduction": lambda hit: _before(Ranks, "sum", hit),
        "a log line": lambda hit: _in_a_line(Metrics, "write", "log.jsonl", hit),
        "a line of layers": lambda hit: _in_a_line(Metrics, "write_layers", "layers.jsonl", hit),
        "save begins": lambda hit: _before(Checkpointer, "save", hit),
        "before the tensors": lambda hit: _before(FileSystemWriter, "write_data", hit),
        "after the tensors": lambda hit: _after(FileSystemWriter, "write_data", hit),
        "before .metadata": lambda hit: _before(FileSystemWriter, "finish", hit),
        "while hashing": lambda hit: _before(manifest, "describe", hit),
        "a flush to the disk": lambda hit: _before(os, "fsync", hit),
        "before the manifest": lambda hit: _before(manifest, "write", hit),
        "after the manifest": lambda hit: _after(manifest, "write", hit),
        # Calls of a save: the manifest's folders, then the folder of the checkpoints after each rename.
        "a folder's entries": lambda hit: _before(manifest, "sync_folder", hit),
        "deleting": lambda hit: _before(Checkpointer, "_prune", hit),
        "save ends": lambda hit: _after(Checkpointer, "save", hit),
        "tidying": lambda hit: _before(Checkpointer, "_tidy", hit),
        "checking": lambda hit: _before(Checkpointer, "problems", hit),
        "the small state": lambda hit: _before(checkpoint, "read_meta", hit),
        "reading": lambda hit: _before(FileSystemReader, "read_data", hit),
        "the tensors are loaded": lambda hit: _before(Checkpointer, "_set_schedule", hit),
        "loaded": lambda hit: _after(Checkpointer, "resume", hit),
        "before the summary": lambda hit: _before(run, "summarize", hit),
        "before DONE": lambda hit: _before(run, "write_marker", hit),
        "after DONE": lambda hit: _after(run, "write_marker", hit),
    }


MOMENT = "a moment"
"""Not a point that somebody thought of: the clock says when."""

# Each with its number of calls, in a run of five steps with a checkpoint in each.
IN_STEPS = {
    "the configuration": 1, "forward": 5, "after the loss": 5, "a reduction": 10, "a log line": 5,
    "a line of layers": 5,
}  # fmt: skip
IN_A_SAVE = {
    "save begins": 5, "before the tensors": 5, "after the tensors": 5, "before .metadata": 5, "while hashing": 5,
    "a flush to the disk": 15, "before the manifest": 5, "after the manifest": 5, "a folder's entries": 12,
    "deleting": 5, "save ends": 5,
}  # fmt: skip
AT_RESUME = {
    "tidying": 1, "checking": 1, "the small state": 1, "reading": 1, "the tensors are loaded": 1, "loaded": 1,
}  # fmt: skip
AT_THE_END = {"before the summary": 1, "before DONE": 1, "after DONE": 1}
POINTS = {**IN_STEPS, **IN_A_SAVE, **AT_RESUME, **AT_THE_END}
ON_RANK_0 = {
    "the configuration", "a log line", "a line of layers", "before .metadata", "before the manifest",
    "after the manifest", "a folder's entries", "deleting", "tidying", *AT_THE_END,
}  # fmt: skip


def _arm(kill: Kill, rank: int) -> None:
    if kill.point == MOMENT or kill.rank not in (None, rank):
        return
    calls = 0

    def hit(last: Callable[[], None] | None = None) -> None:
        nonlocal calls
        calls += 1
        if calls == kill.call:
            if last is not None:
                last()
            os.kill(os.getpid(), signal.SIGKILL)

    _points()[kill.point](hit)


def _serve(rank: int, world: int, rendezvous: str, pipe: Any, kill: Kill | None, arguments: tuple) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo"
    )
    import torch
    import torch.distributed as dist

    from scale_digrap.training import run

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}/store", rank=rank, world_size=world)
    run._leave = lambda: None  # type: ignore[assignment] # the parameters are gathered after the end
    run._print = lambda *_: None  # type: ignore[assignment]
    *positional, sections = arguments
    global _run_dir
    _run_dir = str(positional[2])
    if kill is not None:
        _arm(kill, rank)
    keys = _record_keys()
    pipe.send(("began", None))
    try:
        result = runs.outcome(run.run(runs.config(*positional, **sections)))
        # As arrays: tensors travel as handles to memory of a process that is about to end.
        parameters = {name: value.numpy() for name, value in result["parameters"].items()}
        pipe.send(("ended", {"loss": result["loss"], "parameters": parameters, "keys": keys}))
    except BaseException as error:
        pipe.send(("failed", f"{type(error).__name__}: {error}"))


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


class RunError(AssertionError):
    """A run that nobody killed ended with an error."""


def start(world: int, *arguments: Any, kill: Kill | None = None, timeout: float = 240.0) -> list[dict] | None:
    """Run a training on fresh processes; ``None`` where it was killed.

    As a launcher does, it ends the ranks that are left when one is gone.

    Raises:
        RunError: it ended with an error, and nobody had killed it.
        TimeoutError: it hangs.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    folder = tempfile.mkdtemp(prefix="killed-")
    processes, pipes = [], []
    for rank in range(world):
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(rank, world, folder, there, kill, arguments), daemon=True)
        with _CHILDREN:
            process.start()
        there.close()
        processes.append(process)
        pipes.append(here)
    results: dict[int, Any] = {}
    killed = False
    began: set[int] = set()
    moment: float | None = None
    deadline = time.monotonic() + timeout
    try:
        while len(results) < world and not killed:
            now = time.monotonic()
            if moment is not None and now >= moment:
                for rank, process in enumerate(processes):
                    if kill.rank in (None, rank):  # type: ignore[union-attr]
                        os.kill(process.pid, signal.SIGKILL)
                killed = True
                break
            until = deadline if moment is None else min(deadline, moment)
            ready = wait([pipe for r, pipe in enumerate(pipes) if r not in results], timeout=max(0.0, until - now))
            if not ready and time.monotonic() >= deadline:
                raise TimeoutError(f"no answer from ranks {sorted(set(range(world)) - set(results))}")
            for pipe in ready:
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    what, value = pipe.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    killed = True
                    continue
                if what == "began":
                    began.add(rank)
                    if kill is not None and kill.point == MOMENT and len(began) == world:
                        moment = time.monotonic() + kill.call / 1000
                elif what == "failed":
                    # A rank that lost its partner; where nobody was killed it is an error of the run.
                    others = [process.sentinel for other, process in enumerate(processes) if other != rank]
                    wait(others, timeout=10)
                    with _CHILDREN:
                        killed = any(process.exitcode == -signal.SIGKILL for process in processes)
                    if not killed:
                        raise RunError(f"rank {rank}: {value}")
                else:
                    results[rank] = value
    finally:
        for process in processes:
            process.kill()
        wait([process.sentinel for process in processes], timeout=30)
        with _CHILDREN:
            for process in processes:
                process.join()
    return None if killed else [results[rank] for rank in range(world)]


def leftovers(folder: Path) -> list[str]:
    """Names under ``checkpoints`` that are not what a run at rest has."""
    return [path.name for path in folder.iterdir() if path.name.endswith((".tmp", ".old"))] if folder.is_dir() else []
