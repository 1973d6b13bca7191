"""Hangs: where each rank is, and, when nothing moves for long, its stacks in the run folder.

A collective that some rank never enters keeps all others waiting until the timeout of the process group ends them with
an error of the transport. What is needed then is known only while they hang: which rank is where.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import re
import socket
import threading
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import torch.distributed as dist

from scale_digrap.errors import RunStopped
from scale_digrap.training.engine import TrainingError, short

log = logging.getLogger(__name__)

FOLDER = "watchdog"
_LONGEST_NAP_S = 60.0
_TRANSPORT = re.compile(r"gloo/transport|Timed out waiting|closed by peer|reset by peer|pair closure|Socket Timeout")


class LostRankError(TrainingError):
    """A collective failed: another rank has died, hangs, or cannot be reached."""

    exit_status = 5


class Watchdog:
    """Writes ``watchdog/rank-N.txt``: this rank's last step and, after a stall, the stacks of all its threads.

    A JSON object says where the rank is (``step``, ``doing``); the stacks of a stall follow it. They are written by a
    thread; if that cannot run either, because the interpreter is blocked, by faulthandler's own, after twice the time.
    The file goes when the run ends well and nothing stalled.

    Args:
        run_dir: holds the folder ``watchdog``.
        rank: of this process.
        stall_s: seconds without a :meth:`beat` that count as a stall; 0 watches nothing.
    """

    def __init__(self, run_dir: Path, rank: int, stall_s: float) -> None:
        self._rank, self._stall_s = rank, stall_s
        self._path = run_dir / FOLDER / f"rank-{rank}.txt"
        self._step, self._doing, self._beat = 0, "starting", time.monotonic()
        self._dumped: float | None = None
        self._kept = 0  # bytes of the file that are stacks, with the places they belong to
        self._end = threading.Event()
        self._file: int | None = None
        self._thread: threading.Thread | None = None

    def beat(self, step: int, doing: str) -> None:
        """Something moves: costs nothing, call it often."""
        self._step, self._doing, self._beat = step, doing, time.monotonic()

    def place(self) -> str:
        """Where this rank is, for a message."""
        return f"in step {self._step}, {self._doing}" if self._step else self._doing

    def __enter__(self) -> Watchdog:
        if self._stall_s:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
            except OSError as error:  # on this rank alone, perhaps: no reason to leave the others waiting
                log.warning("rank %d: cannot write %s: %s; hangs are not watched", self._rank, self._path, short(error))
                return self
            self._write_place(None)
            self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._thread is None or self._file is None:
            return
        self._end.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        ended_well = error is None or isinstance(error, (RunStopped, KeyboardInterrupt))
        if ended_well and self._dumped is None:
            with suppress(OSError):  # other ranks' files are in the folder
                self._path.unlink(missing_ok=True)
                self._path.parent.rmdir()
        else:
            self._write_place(None if error is None else short(error))
        os.close(self._file)
        self._file = None

    def _watch(self) -> None:
        nap = min(self._stall_s / 4, _LONGEST_NAP_S)
        seen = -1.0
        while not self._end.wait(nap):
            if self._beat != seen:
                seen = self._beat
                self._write_place(None)
            if self._dumped != seen:
                assert self._file is not None
                faulthandler.dump_traceback_later(2 * self._stall_s, file=self._file)
                if time.monotonic() - seen >= self._stall_s:
                    self._dump(seen)

    def _dump(self, beat: float) -> None:
        assert self._file is not None
        self._dumped = beat  # once a stall
        faulthandler.cancel_dump_traceback_later()
        self._write_place(None)
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        self._kept = os.fstat(self._file).st_size
        log.warning(
            "rank %d: nothing has moved for %.0f s in step %d (%s); its stacks are in %s",
            self._rank, time.monotonic() - beat, self._step, self._doing, self._path,
        )  # fmt: skip

    def _write_place(self, ended: str | None) -> None:
        """The last line anew, below the stacks that are in the file."""
        assert self._file is not None
        place = {
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": self._step,
            "doing": self._doing,
            "for_s": round(time.monotonic() - self._beat, 1),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **({} if ended is None else {"ended": ended}),
        }
        try:
            os.ftruncate(self._file, self._kept)
            os.write(self._file, (json.dumps(place) + "\n").encode())
        except OSError as error:
            log.warning("rank %d: cannot write %s: %s", self._rank, self._path, error)


def lost_rank(error: BaseException, rank: int, place: str) -> LostRankError | None:
    """A failed collective as an error that says what it means; None for any other error."""
    if not isinstance(error, RuntimeError):
        return None
    if not isinstance(error, dist.DistError) and not _TRANSPORT.search(str(error)):
        return None
    return LostRankError(
        f"rank {rank} lost contact with another rank ({place}): one has died, hangs, or was out of reach for longer "
        f"than training.timeout_s ({short(error)}). Each rank's last step, and its stacks after a stall, are in "
        f"{FOLDER}/ of run_dir; the same command goes on from the last checkpoint"
    )
