"""Ending a run early, and how it ended: signals, a stop file, a time limit; the ``STOPPED`` and ``DONE`` markers.

A launcher's exit status does not tell: torchrun makes 1 of every failure, ``deepspeed`` may return 0 when it was killed
itself. What the ranks wrote does: ``DONE`` when all is done, ``STOPPED`` when the same command is to be run again, and
neither after a failure.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

from scale_digrap.config import Config
from scale_digrap.duration import seconds
from scale_digrap.errors import RunStopped
from scale_digrap.runtime.logs import reason as why
from scale_digrap.runtime.text import finite, write_json
from scale_digrap.training.manifest import sync_folder, write_durably

log = logging.getLogger(__name__)

STOP_FILE = "STOP"
STOPPED = "STOPPED"
DONE = "DONE"
_LOOK_EVERY_S = 1.0  # for the stop file: a shared file system is not asked in every step


class StopRequests:
    """What asks this process to end its run early, as votes that the ranks add up once a step.

    Signal handlers only set a flag: a launcher and a scheduler both send the signal, at any point of a step and to some
    ranks before others. Within the ``with`` block; outside the main thread no handlers are installed. A signal that
    came too late to be acted upon is sent again at the end of the block, to whoever handled it before.

    Args:
        config: ``training.stop_signals``, ``training.max_time``, ``run_dir``. The time counts from here.
    """

    def __init__(self, config: Config) -> None:
        self._run_dir = Path(config.run_dir)
        self._signals = {name: signal.Signals[name] for name in config.training.stop_signals}
        self._began = time.monotonic()
        self._max_time = config.training.max_time
        self._looked = -_LOOK_EVERY_S
        self._file_seen = False
        self._received: list[str] = []
        self._acted = False
        self._process = os.getpid()
        self._previous: dict[str, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._previous = {name: signal.signal(number, self._receive) for name, number in self._signals.items()}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for name, handler in self._previous.items():
            signal.signal(self._signals[name], handler)
        if kind is None and not self._acted:
            for name in self._received[:1]:
                os.kill(os.getpid(), self._signals[name])

    def _receive(self, number: int, _: FrameType | None) -> None:
        # A loader process inherits the handler: a signal to all processes of a job must not take the data away while
        # the ranks finish their step.
        if os.getpid() == self._process and (name := signal.Signals(number).name) not in self._received:
            self._received.append(name)

    @property
    def reasons(self) -> list[str]:
        """What each of the :meth:`votes` stands for."""
        return [*self._signals, f"the file {STOP_FILE}", f"training.max_time={self._max_time}"]

    def votes(self, rank: int) -> list[float]:
        """One number per reason, above zero to stop. The clock and the stop file are rank 0's to look at."""
        file = time_up = False
        if rank == 0:
            file = self._stop_file()
            time_up = self._max_time is not None and time.monotonic() - self._began >= seconds(self._max_time)
        return [*(float(name in self._received) for name in self._signals), float(file), float(time_up)]

    def _stop_file(self) -> bool:
        if not self._file_seen and time.monotonic() - self._looked >= _LOOK_EVERY_S:
            self._looked = time.monotonic()
            with suppress(OSError):  # storage that is away for a while
                self._file_seen = (self._run_dir / STOP_FILE).exists()
        return self._file_seen

    def reason(self, votes: Sequence[float]) -> str | None:
        """Why to stop now, from the sum of every rank's votes: the same on all ranks."""
        asked = [reason for reason, count in zip(self.reasons, votes, strict=True) if count]
        self._acted = self._acted or bool(asked)
        return asked[0] if asked else None

    def stopped(self, rank: int, *, step: int, reason: str, checkpoint: Path | None) -> RunStopped:
        """What to raise, when the checkpoint is durable. Rank 0 leaves the marker and takes the stop file away."""
        if rank == 0:
            entry = {"step": step, "reason": reason, "checkpoint": None if checkpoint is None else checkpoint.name}
            try:
                (self._run_dir / STOP_FILE).unlink(missing_ok=True)
                write_marker(self._run_dir, STOPPED, entry)
            except OSError as error:  # the checkpoint is there, and the exit status tells the same
                log.warning("cannot write %s: %s", self._run_dir / STOPPED, why(error))
        return run_stopped(
            f"stopped after step {step} ({reason}), checkpoint {checkpoint}: the same command goes on from there"
        )


def run_stopped(message: str) -> RunStopped:
    """What to raise when a run has ended early as asked, with everything that the next one needs on disk."""
    error = RunStopped(message)
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        error.exit_status = 0  # for any other, this launcher would start the ranks again at once
    return error


def write_marker(run_dir: Path, name: str, entry: dict[str, Any]) -> None:
    """Write ``STOPPED`` or ``DONE``, durably: a JSON object with the entry, the time, and the job that it came from."""
    job = {key.lower(): os.environ[key] for key in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT") if key in os.environ}
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    partial = run_dir / f"{name}.tmp"
    write_durably(partial, write_json(finite({**entry, "time": now, "host": socket.gethostname(), **job})) + "\n")
    partial.replace(run_dir / name)
    sync_folder(run_dir)


def clear_markers(run_dir: Path) -> None:
    """A run that goes on has neither been stopped nor finished."""
    for name in (STOPPED, DONE):
        (run_dir / name).unlink(missing_ok=True)
