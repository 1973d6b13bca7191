"""What ranks tell each other while they generate, through the store of ``torch.distributed`` and without a collective.

A rank that fails leaves a message; the others look for one after each of their batches. Where the model is sharded all
ranks must stop after the same batch: the message names it, and is in the store before any rank can finish that batch,
because nobody finishes one that the sender has not entered. A rank that waits inside the model for one that is not
coming cannot look: its watcher, a thread, ends the process with the message.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from scale_digrap.errors import ScaleDigrapError

log = logging.getLogger(__name__)

_POLL_S = 0.5
_GRACE_S = 5.0
_PATIENCE_S = 10.0
_evaluations = itertools.count()


class EvaluationError(ScaleDigrapError):
    """An evaluation that could not be finished; raised on every rank alike."""


class RankFailedError(EvaluationError):
    """A rank failed for a reason that is not in the data or the configuration, or was lost."""

    exit_status = 5


class StopAsked(Exception):  # noqa: N818 (what was asked for is no error)
    """Some rank was asked to stop."""


@dataclass(frozen=True)
class Message:
    """Why the ranks end early."""

    kind: str
    """``error`` (the user's to put right), ``failure`` (5 is the exit status) or ``stop``."""
    text: str
    batch: int
    """Sharded ranks stop after this batch, counted from the start."""

    def exception(self) -> Exception:
        """What every rank raises."""
        kinds: dict[str, type[Exception]] = {"error": EvaluationError, "failure": RankFailedError, "stop": StopAsked}
        return kinds[self.kind](self.text)


class Signals:
    """One evaluation's messages and its count of answered questions; a context manager.

    Every rank makes one at the same point of the program.

    Args:
        rank, world_size: this process among those that evaluate together.
        lockstep: the model is sharded.
        timeout_s: a rank that waits for the others gives up when none of them has answered anything for so long.
        progress: called on rank 0 now and then with the number of questions that all ranks have answered.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        lockstep: bool = False,
        timeout_s: float = 1800.0,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._rank, self._world_size, self._lockstep, self._timeout_s = rank, world_size, lockstep, timeout_s
        self._progress = progress if rank == 0 else None
        self._message: Message | None = None
        self._count = 0
        self._store: Any = None
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        if world_size > 1:
            self._prefix = f"evaluation/{next(_evaluations)}"
            self._store = dist.PrefixStore(self._prefix, c10d._get_default_store())
            for name in ("answered", "finished", "seen", "left"):
                self._store.add(name, 0)

    def __enter__(self) -> Signals:
        if self._store is not None:
            self._thread = threading.Thread(target=self._watch, daemon=True, name="evaluation-signals")
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._store is not None:
            with suppress(RuntimeError):  # the store has ended
                self._say_goodbye(kind)
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _say_goodbye(self, kind: type[BaseException]) -> None:
        """The store may end with this process: the others must have read it, and may still be in a long batch."""
        self._store.add("left", 1)
        if self._message is None:
            return
        stopping = kind is StopAsked
        name, patience = ("left", self._timeout_s) if stopping and self._rank == 0 else ("seen", _PATIENCE_S)
        deadline = time.monotonic() + patience
        while int(self._store.get(name)) < self._world_size and time.monotonic() < deadline:
            time.sleep(_POLL_S / 5)

    def post(self, message: Message) -> Message:
        """Leave a message for all ranks; returns the one that counts, which is the first."""
        if self._message is None:
            self._message = message
            if self._store is not None:
                self._store.compare_set("message", "", json.dumps(asdict(message)))
                self._message = self._read(self._store)
        assert self._message is not None
        return self._message

    def answered(self, count: int) -> None:
        """This rank has answered more questions."""
        self._count += count
        if self._store is not None:
            self._store.add("answered", count)
        elif self._progress is not None:
            self._progress(self._count)

    def check(self, batch: int) -> None:
        """After a batch: raise what some rank has told.

        Raises:
            EvaluationError, RankFailedError, StopAsked: the same on every rank.
        """
        if self._message is None and self._store is not None:
            self._message = self._read(self._store)
        if self._message is not None and (not self._lockstep or self._message.batch <= batch):
            raise self._message.exception()

    def finish(self) -> None:
        """Wait until every rank has answered its questions.

        Raises:
            EvaluationError, RankFailedError, StopAsked: one of them has not.
        """
        if self._store is None:
            return
        self._store.add("finished", 1)
        pause, seen, since = 0.01, -1, time.monotonic()
        while int(self._store.get("finished")) < self._world_size:
            self.check(sys.maxsize)
            answered = int(self._store.get("answered"))
            if answered != seen:
                seen, since = answered, time.monotonic()
            if time.monotonic() - since > self._timeout_s:
                raise RankFailedError(
                    f"rank {self._rank} has waited {self._timeout_s:g} s in which no other rank has answered anything: "
                    "one has died or hangs. The same command goes on from what is answered"
                )
            time.sleep(pause)
            pause = min(2 * pause, _POLL_S)

    def _read(self, store: Any) -> Message | None:
        return Message(**json.loads(store.get("message"))) if store.check(["message"]) else None

    def _watch(self) -> None:
        # A connection of its own: another thread that waits in the store would keep this one out.
        store = self._store.clone() if hasattr(self._store, "clone") else self._store
        deadline: float | None = None
        message: Message | None = None
        while not self._end.wait(_POLL_S):
            try:
                if message is None and (message := self._read(store)) is not None:
                    store.add("seen", 1)
                if self._progress is not None:
                    self._progress(int(store.get("answered")))
            except RuntimeError as error:
                text = " ".join(str(error).split())[:200]
                message = Message("failure", f"lost contact with the other ranks ({text})", 0)
            if message is None or message.kind == "stop":
                continue
            if deadline is None:
                deadline = time.monotonic() + _GRACE_S
            elif time.monotonic() >= deadline:
                self._abandon(message)

    def _abandon(self, message: Message) -> None:
        """The main thread is inside the model and does not come back: what it waits for will never happen."""
        where = f" (rank {self._rank} ends)" if self._rank else ""
        print(f"scale-digrap: error: {message.text}{where}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2 if message.kind == "error" else RankFailedError.exit_status)
