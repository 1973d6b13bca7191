"""Ranks that run the command line in fresh processes, as a launcher starts them: for signals, deaths and exit codes."""

from __future__ import annotations

import atexit
import multiprocessing as mp
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scale_digrap.config import save_config
from scale_digrap.training.metrics import read_log
from tests.dist_pool import PRELOAD
from tests.training import runs


class LaunchedCommand:
    """``scale-digrap`` on ``world`` processes.

    Args:
        world: number of ranks.
        command: its arguments.
        folder: for what the ranks print.
        prepare: a module-level function that each process calls first, with its rank.
    """

    def __init__(
        self, world: int, command: list[str], folder: Path, prepare: Callable[[int], None] | None = None
    ) -> None:
        self._logs = [folder / f"rank{rank}.txt" for rank in range(world)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.processes = [
            context.Process(
                target=_serve,
                args=(rank, world, port, str(log), prepare, command),
                daemon=False,  # loader processes are its children
            )
            for rank, log in enumerate(self._logs)
        ]
        for process in self.processes:
            process.start()
        atexit.register(self.wait, 0)  # a rank that hangs, of a test that failed, would keep pytest from its end

    def kill(self, rank: int, number: int) -> None:
        """Send a signal to a rank."""
        os.kill(self.processes[rank].pid or 0, number)

    def kill_children(self, rank: int, number: int) -> None:
        """Send a signal to the loader processes of a rank."""
        pid = self.processes[rank].pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert children
        for child in children:
            os.kill(int(child), number)

    def wait_until(self, condition: Callable[[], bool], timeout: float = 90.0) -> None:
        """Until something holds; fails when the processes end before it does."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self.output()
            assert any(process.is_alive() for process in self.processes), self.output()
            time.sleep(0.02)

    def wait(self, timeout: float = 90.0) -> list[int | None]:
        """The exit codes; ``None`` for a process that had to be killed after the time."""
        deadline = time.monotonic() + timeout
        codes = []
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            codes.append(process.exitcode)
            if process.exitcode is None:
                process.kill()
                process.join()
        return codes

    def output(self) -> str:
        """What all ranks printed."""
        return "".join(log.read_text() for log in self._logs if log.exists())


class Launched(LaunchedCommand):
    """``scale-digrap train`` on ``world`` processes.

    Args:
        world: number of ranks.
        arguments: model, shards and run folder, as for :func:`tests.training.runs.config`.
        prepare: as for :class:`LaunchedCommand`.
        sections: of the configuration.
    """

    def __init__(
        self, world: int, *arguments: Any, prepare: Callable[[int], None] | None = None, **sections: Any
    ) -> None:
        self.run_dir = Path(arguments[-1])
        folder = self.run_dir.parent / f"{self.run_dir.name}-launched-{time.monotonic_ns()}"
        folder.mkdir(parents=True)
        save_config(runs.config(*arguments, **sections), folder / "config.yaml")
        super().__init__(world, ["train", str(folder / "config.yaml")], folder, prepare)

    def wait_for_step(self, step: int, timeout: float = 90.0) -> None:
        """Until the log has a step."""
        log = self.run_dir / "log.jsonl"
        self.wait_until(lambda: log.is_file() and len(read_log(log)) >= step, timeout)


def _serve(
    rank: int, world: int, port: int, log: str, prepare: Callable[[int], None] | None, command: list[str]
) -> None:
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    import torch

    from scale_digrap.cli import main

    torch.set_num_threads(1)
    mp.set_start_method("fork", force=True)  # as in a process of a launcher, and not handed on from the fork server
    if prepare is not None:
        prepare(rank)
    sys.exit(main(command))
