"""Running a plan on this host or on others: start, follow, stop when asked, tell how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any

from scale_digrap.launch import hosts
from scale_digrap.launch.follow import Failure, Progress, diagnose, last_line, outcome, start_stamp
from scale_digrap.launch.node import check_port, gpu_count
from scale_digrap.launch.plan import NodeContext, Plan, hostfile, node_command
from scale_digrap.launch.spec import LaunchError
from scale_digrap.runtime.files import write_whole
from scale_digrap.runtime.lock import holder

STOPPED_STATUS = 75
FAILED_STATUS = 1
_POLL_S = 0.5
_OTHERS_WAIT_S = 60.0
"""A host that ends with an error leaves the others so long to end by themselves."""


class Requests:
    """Ctrl-C and SIGTERM, counted: the first asks the run to stop with a checkpoint, the second ends it."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def taken(self) -> Iterator[Requests]:
        """Within it, the signals are counted; outside they have their usual effect."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._take) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def start(plan: Plan) -> int:
    """Start a plan for this host or for hosts, follow it to its end.

    Returns:
        0 done, 75 stopped with a checkpoint, 1 failed.

    Raises:
        LaunchError: before anything is started.
    """
    if plan.place == "local" and plan.launcher == "deepspeed":
        check_port(plan.spec.port)
    other = holder(plan.workload.run_dir)
    if other is not None and other.is_here:  # before its scripts are written anew; the run itself looks closer
        raise LaunchError(
            f"another {other.what} is writing to {plan.workload.run_dir} ({other}): wait for it or end it"
        )
    write_files(plan)
    gpus = hosts.ready(plan) if plan.hosts else {"localhost": gpu_count()}
    if plan.launcher == "deepspeed":
        (plan.folder / "hostfile").write_text(hostfile(plan, gpus), encoding="utf-8")
    if plan.spec.preflight and plan.workload.command == "train" and (status := hosts.preflight(plan)):
        return status
    start_id = f"{plan.spec.name}.{time.strftime('%Y%m%d%H%M%S')}.{os.getpid()}"
    stamp = start_stamp(plan.folder)
    plan.logs.mkdir(parents=True, exist_ok=True)
    with Requests().taken() as requests:
        statuses = _follow(plan, start_id, requests)
    return report(plan, stamp, statuses)


def write_files(plan: Plan) -> None:
    """The scripts of this start, in ``run_dir/launch``. All are the user's alone: the environment may hold tokens, and
    overrides URLs with a password.

    Raises:
        LaunchError: the folder cannot be written.
    """
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        for name, text in plan.files.items():
            write_whole(plan.folder / name, text, 0o600)
    except OSError as error:
        raise LaunchError(f"cannot write {plan.folder} ({error.strerror}): set run_dir to a folder that can") from None


def total_steps(plan: Plan) -> int | None:
    """Optimizer steps, where the configuration names their number."""
    return plan.workload.steps


def report(plan: Plan, stamp: Path, statuses: dict[str, int]) -> int:
    """Say how the run ended; the exit status.

    Args:
        statuses: exit status of every host's launcher, which prove nothing by themselves but for the quick-start.
    """
    run_dir = plan.workload.run_dir
    if plan.workload.command == "quickstart":
        worst = max(statuses.values(), default=0)
        print(f"{run_dir}: {'done' if worst == 0 else f'failed with exit status {worst}'}; output in {plan.logs}")
        return worst
    end = outcome(run_dir, stamp)
    if end.kind == "done":
        print(f"{run_dir}: done{_at_step(end.entry)}")
        return 0
    if end.kind == "stopped":
        if any(status not in (0, STOPPED_STATUS) for status in statuses.values()):
            tell(diagnose(plan.logs, stamp), statuses)  # a host failed, and the others were stopped
        reason = f" ({end.entry['reason']})" if "reason" in end.entry else ""
        print(f"{run_dir}: stopped{_at_step(end.entry)}{reason}; the same command goes on from there")
        return STOPPED_STATUS
    tell(diagnose(plan.logs, stamp), statuses)
    return FAILED_STATUS


def tell(failure: Failure, statuses: dict[str, int]) -> None:
    """A failure: the reason, the log of the rank, and its end."""
    for line in failure.lines:
        print(f"  | {line}", file=sys.stderr)
    where = f"; its log: {failure.log}" if failure.log else ""
    ended = ", ".join(f"{host} {status}" for host, status in statuses.items())
    print(f"scale-digrap: failed: {failure.what}{where}{f' (exit status: {ended})' if ended else ''}", file=sys.stderr)


def _at_step(entry: dict[str, Any]) -> str:
    return f" after step {entry['step']}" if "step" in entry else ""


def _follow(plan: Plan, start_id: str, requests: Requests) -> dict[str, int]:
    """Start every host's script, wait for all; exit statuses by host."""
    places: list[str | None] = [None] if plan.place == "local" or plan.pdsh else list(plan.hosts)
    running: dict[str, subprocess.Popen[bytes]] = {}
    consoles: dict[str, Path] = {}
    outputs: list[IO[bytes]] = []
    for rank, place in enumerate(places):
        name = place or "here"
        command = node_command(plan, NodeContext(rank, place, start_id))
        console = plan.logs / f"launch.{name}.log"
        files: list[IO[bytes]] = [console.open("wb")]
        if place is not None:  # what ssh itself says; the host writes the other one
            files.append((plan.logs / f"launch.{name}.ssh.log").open("wb"))
        outputs += files
        # A session of its own: Ctrl-C is for this process, which hands it on in its own way.
        running[name] = subprocess.Popen(
            command.argv,
            env={**os.environ, **command.env},
            stdin=subprocess.DEVNULL,
            stdout=files[-1],
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        consoles[name] = console
    first = next(iter(consoles.values()))
    print(f"{plan.workload.command}: {plan.workload.run_dir}; output of the launcher: {first}", file=sys.stderr)
    progress = Progress(plan.workload.run_dir, total_steps(plan))
    try:
        return _wait(plan, start_id, requests, running, first, progress)
    finally:
        progress.close()
        for output in outputs:
            output.close()


def _wait(
    plan: Plan,
    start_id: str,
    requests: Requests,
    running: dict[str, subprocess.Popen[bytes]],
    console: Path,
    progress: Progress,
) -> dict[str, int]:
    statuses: dict[str, int] = {}
    lost: set[str] = set()
    asked = 0
    failed_at: float | None = None
    remote = bool(plan.hosts) and not plan.pdsh
    least = plan.spec.node_range[0] if remote else 1
    while len(statuses) < len(running):
        for name, process in list(running.items()):
            if name not in statuses and process.poll() is not None:
                if remote and process.returncode == hosts.SSH_FAILED and name not in lost:
                    print(f"\n{name}: the connection is lost; is the run still there?", file=sys.stderr)
                    lost.add(name)
                    command = hosts.wait_command(plan, name, start_id)
                    running[name] = subprocess.Popen(
                        command.argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
                    )
                    continue
                statuses[name] = process.returncode
                if process.returncode not in (0, STOPPED_STATUS):
                    print(f"\n{name}: ended with exit status {process.returncode}", file=sys.stderr)
        progress.update(last_line(console))
        if requests.count > asked:
            asked = requests.count
            _ask(plan, start_id, remote, running, asked)
        # Too few are left to go on, but those that wait for the lost one would wait for minutes.
        bad = sum(status not in (0, STOPPED_STATUS) for status in statuses.values())
        if remote and bad and len(running) - bad < least and len(statuses) < len(running):
            failed_at = failed_at or time.monotonic()
            if time.monotonic() - failed_at > _OTHERS_WAIT_S:
                print("the other hosts are stopped", file=sys.stderr)
                hosts.ask_to_stop(plan, start_id, plan.spec.stop_within_s)
                failed_at = time.monotonic()
        time.sleep(_POLL_S)
    return statuses


def _ask(plan: Plan, start_id: str, remote: bool, running: dict[str, subprocess.Popen[bytes]], asked: int) -> None:
    if asked == 1:
        print("\nstopping: a checkpoint is written first; Ctrl-C once more kills the run", file=sys.stderr)
    if remote:
        within = plan.spec.stop_within_s if asked == 1 else 0
        threading.Thread(target=hosts.ask_to_stop, args=(plan, start_id, within), daemon=True).start()
        return
    for process in running.values():  # the script hands on the first, and kills on the second
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
