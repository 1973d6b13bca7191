"""What the scripts ask on a node: ``python -m scale_digrap.launch.node config | step | stop | wait | ready``.

Imports no torch: each answer takes a moment. Linux only (``/proc``).
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scale_digrap.errors import ScaleDigrapError
from scale_digrap.launch.workload import COMMANDS, load_workload
from scale_digrap.runtime import console
from scale_digrap.runtime.files import write_whole

TOKEN = "SCALE_DIGRAP_LAUNCH"
"""Variable that every process of one start has in its environment, with a value that no other start has."""

_PROC = Path("/proc")
_KILL_WAIT_S = 10.0


class NodeError(ScaleDigrapError):
    """Something that this node cannot do for a run."""


@dataclass(frozen=True)
class Process:
    """A process of a start, as ``/proc`` shows it."""

    pid: int
    command: bytes
    is_rank: bool

    @property
    def is_agent(self) -> bool:
        """torchrun itself, which hands signals on to its ranks and waits for them."""
        return not self.is_rank and b"torch.distributed.run" in self.command


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 2 with one line on stderr where something is wrong."""
    console.prepare()
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except ScaleDigrapError as error:
        print(f"scale-digrap: error on {socket.gethostname()}: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scale_digrap.launch.node", description=__doc__)
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    config = actions.add_parser("config", help="refuse what the command would refuse; print the folder of the run")
    config.add_argument("command", choices=COMMANDS)
    config.add_argument("config")
    config.add_argument("overrides", nargs="*")
    config.add_argument("--to", type=Path, help="write the resolved configuration here")
    config.set_defaults(run=_config)

    step = actions.add_parser("step", help="print how far a run is on disk: the step of its newest checkpoint, or 0")
    step.add_argument("run_dir", type=Path)
    step.set_defaults(run=_step)

    stop = actions.add_parser("stop", help="end the processes of a start on this host")
    stop.add_argument("token")
    stop.add_argument("--within", type=float, default=60.0, metavar="S", help="kill what is left after this time")
    stop.set_defaults(run=_stop)

    wait = actions.add_parser("wait", help="wait until no process of a start is left on this host")
    wait.add_argument("token")
    wait.set_defaults(run=lambda arguments: _wait(arguments.token, math.inf))

    ready = actions.add_parser("ready", help="can this host take part? prints the number of its GPUs")
    ready.add_argument("--port", type=int, help="must be free here")
    ready.set_defaults(run=_ready)
    return parser


def _config(arguments: argparse.Namespace) -> None:
    workload = load_workload(arguments.command, arguments.config, arguments.overrides)
    if arguments.to is not None:
        write_whole(arguments.to, workload.resolved, 0o600)
    print(workload.run_dir)


def _step(arguments: argparse.Namespace) -> None:
    print(newest_step(arguments.run_dir))


def newest_step(run_dir: str | Path) -> int:
    """How far a run is on disk: the step of its newest committed checkpoint, or, of an evaluation, the bytes of its
    answers; 0 if there is neither."""
    from scale_digrap.training.run_folder import RunFolderError, checkpoints

    try:
        return checkpoints(run_dir)[-1][0]
    except RunFolderError:
        answers = Path(run_dir) / "predictions"
        return sum(path.stat().st_size for path in answers.rglob("*") if path.is_file())


def _stop(arguments: argparse.Namespace) -> None:
    ended, killed = stop(arguments.token, arguments.within)
    if ended or killed:
        print(f"{socket.gethostname()}: {ended} processes ended, {killed} killed")


def processes(token: str) -> list[Process]:
    """The processes of one start on this host, this one and its ancestors left out.

    Looked up by the environment that they were started with, so that a process id that was given to another program
    meanwhile is never taken for one of the run's.
    """
    mark = f"{TOKEN}={token}".encode()
    mine = _ancestors()
    found = []
    for folder in _PROC.glob("[0-9]*"):
        if (pid := int(folder.name)) in mine:
            continue
        # Processes of other users, and those that end meanwhile.
        with contextlib.suppress(OSError):
            variables = (folder / "environ").read_bytes().split(b"\0")
            if mark in variables:
                rank = any(variable.startswith(b"RANK=") for variable in variables)
                found.append(Process(pid, (folder / "cmdline").read_bytes(), rank))
    return found


def stop(token: str, within_s: float) -> tuple[int, int]:
    """End a start's processes on this host: SIGTERM, which makes ranks write a checkpoint, then SIGKILL.

    SIGTERM goes to torchrun where it runs, else to the ranks: the node's part of the deepspeed launcher would kill them
    after 30 s, and it ends by itself when they have.

    Returns:
        Numbers of processes that ended by themselves and of those that were killed.
    """
    found = processes(token)
    count = len(found)
    if within_s > 0:
        agents = [process for process in found if process.is_agent]
        _signal(agents or [process for process in found if process.is_rank] or found, signal.SIGTERM)
        _wait(token, within_s)
    left = processes(token)
    _signal(left, signal.SIGKILL)
    _wait(token, _KILL_WAIT_S)
    return max(0, count - len(left)), len(left)


def _signal(targets: Sequence[Process], number: signal.Signals) -> None:
    for target in targets:
        with contextlib.suppress(ProcessLookupError):
            os.kill(target.pid, number)


def _wait(token: str, limit_s: float) -> None:
    until = time.monotonic() + limit_s
    while processes(token) and time.monotonic() < until:
        time.sleep(0.2)


def _ancestors() -> set[int]:
    pids, pid = set(), os.getpid()
    while pid > 0:
        pids.add(pid)
        try:
            # The name in parentheses may hold spaces; the parent is the second field after it.
            pid = int((_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
    return pids


def _ready(arguments: argparse.Namespace) -> None:
    if arguments.port is not None:
        check_port(arguments.port)
    print(gpu_count())


def check_port(port: int) -> None:
    """Raises:
    NodeError: something listens on the port of this host."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise NodeError(f"port {port} is in use ({error.strerror}): set rendezvous.port to a free one") from None


def gpu_count() -> int:
    """GPUs that ``nvidia-smi`` lists; 0 without it."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False, timeout=60)
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
