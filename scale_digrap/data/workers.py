"""Loader processes: they turn lists of places into batches, keep no state, and report instead of hanging.

torch's ``DataLoader`` runs them. Errors of the package come back as values, so that they arrive as they were raised;
a process that dies or stalls is an error of the main process within the timeout.
"""

from __future__ import annotations

import os
import pickle
import queue
import re
import signal
import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch

from scale_digrap.data.errors import DataError
from scale_digrap.data.faults import BadSample
from scale_digrap.errors import ScaleDigrapError

Item = TypeVar("Item")

_DEAD = re.compile(r"DataLoader worker \(pid")
_STALLED = re.compile(r"DataLoader timed out")


@dataclass
class Fetched:
    """What comes back for one list of places: a batch or the error that there is none, the bad samples met, and
    (shard, key) of every sample of the batch."""

    batch: Any = None
    bad: list[BadSample] = field(default_factory=list)
    samples: list[tuple[str, str]] = field(default_factory=list)
    error: ScaleDigrapError | None = None

    def pin_memory(self) -> Fetched:
        """Called by torch where batches go to a GPU."""
        from torch.utils.data._utils.pin_memory import pin_memory

        self.batch = pin_memory(self.batch)
        return self


class Source(Protocol[Item]):  # type: ignore[misc]
    """Makes batches; the same in every process. Must be picklable where processes are not forked."""

    def fetch(self, items: list[Item]) -> Fetched:
        """One batch. May raise; errors of the package need not be caught."""
        ...


class Feeder(Generic[Item]):
    """Runs a source over lists of items, in order, in loader processes or in a thread of this one.

    Args:
        source: makes batches.
        workers: processes; 0 loads in this process, one batch at a time.
        timeout_s: longest wait for a batch; 0 waits for ever.
    """

    def __init__(self, source: Source[Item], *, workers: int, timeout_s: float) -> None:
        if workers < 0 or timeout_s < 0:
            raise DataError(f"workers and timeout_s must be at least 0, got {workers} and {timeout_s}")
        self._source, self._workers, self._timeout = source, workers, timeout_s
        self._sampler = _Lists()
        self._process = os.getpid()
        self._loader: torch.utils.data.DataLoader[Any] | None = None

    def run(self, lists: Iterator[list[Item]]) -> Iterator[Fetched]:
        """Batches of the lists; ends when they do. One run at a time: a new one ends the one before.

        Raises:
            DataError: a loader process died or stalled; the next run starts new ones.
        """
        if self._workers == 0:
            return self._here(lists)
        return self._there(lists)

    def close(self) -> None:
        """End the loader processes; the next run starts new ones."""
        loader, self._loader = self._loader, None
        self._sampler.lists = ()
        if loader is not None:
            self._end()

    def __del__(self) -> None:
        if getattr(self, "_loader", None) is not None and self._process == os.getpid():
            self.close()

    def _there(self, lists: Iterator[list[Item]]) -> Iterator[Fetched]:
        if self._loader is None:
            self._loader = torch.utils.data.DataLoader(
                _AsDataset(self._source),
                batch_sampler=self._sampler,
                collate_fn=_as_it_is,
                num_workers=self._workers,
                persistent_workers=True,
                pin_memory=torch.cuda.is_available(),
                timeout=self._timeout,
                generator=torch.Generator().manual_seed(0),  # or it would draw from the global one
                worker_init_fn=_outlive_sigterm,
            )
            # multiprocessing ends what is left at exit by SIGTERM, and waits for it.
            self._end = weakref.finalize(self, _end_processes, self._loader, self._process)
        self._sampler.lists = lists
        try:
            yield from self._loader
        except RuntimeError as error:
            self.close()
            if _DEAD.search(str(error)):
                raise DataError(
                    f"a loader process died: {_first_line(error)}. Out of memory, most often: use fewer data.workers, "
                    "or see the kernel's log"
                ) from None
            if _STALLED.search(str(error)):
                raise DataError(self._stalled()) from None
            raise

    def _here(self, lists: Iterator[list[Item]]) -> Iterator[Fetched]:
        if self._timeout == 0:
            for items in lists:
                yield guarded(self._source, items)
            return
        # In a thread, because nothing else can be waited for with a time limit: a read may stall for ever.
        asked: queue.SimpleQueue[list[Item] | None] = queue.SimpleQueue()
        answers: queue.SimpleQueue[Fetched | BaseException] = queue.SimpleQueue()
        thread = threading.Thread(target=_serve, args=(self._source, asked, answers), daemon=True, name="loader")
        thread.start()
        try:
            for items in lists:
                asked.put(items)
                try:
                    answer = answers.get(timeout=self._timeout)
                except queue.Empty:
                    raise DataError(self._stalled()) from None
                if isinstance(answer, BaseException):
                    raise answer
                yield answer
        finally:
            asked.put(None)

    def _stalled(self) -> str:
        return (
            f"no batch came within data.timeout_s={self._timeout:g} s: a read stalls, or loading is far too slow. "
            "Check the storage; raise the limit if shards take longer to fetch"
        )


def guarded(source: Source[Item], items: list[Item]) -> Fetched:
    """A batch, with errors of the package as values."""
    try:
        return source.fetch(items)
    except ScaleDigrapError as error:
        return Fetched(error=error)


def _outlive_sigterm(_: int) -> None:
    """A launcher's SIGTERM goes to all processes of a rank, which finishes its step and then ends these itself; torch's
    own handler in loader processes would end them at once, and the rank with an error."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_processes(loader: Any, owner: int) -> None:
    """Now: torch does it when the last reference goes, which a traceback may hold for long."""
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None and os.getpid() == owner:  # a fork has a copy of everything
        iterator._shutdown_workers()
        for process in iterator._workers:
            if process.is_alive():
                process.kill()


class _AsDataset(torch.utils.data.Dataset[Any], Generic[Item]):
    """A source in the shape that torch's DataLoader calls: whole lists at once."""

    def __init__(self, source: Source[Item]) -> None:
        self._source = source

    def __getitems__(self, items: list[Item]) -> Fetched:
        fetched = guarded(self._source, items)
        if fetched.error is not None:
            fetched.error = _portable(fetched.error)
        return fetched


class _Lists:
    """A batch sampler whose content is set before every run."""

    lists: Iterable[list[Any]] = ()

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.lists)


def _as_it_is(fetched: Any) -> Any:
    return fetched


def _serve(source: Source[Item], asked: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
    while (items := asked.get()) is not None:
        try:
            answers.put(guarded(source, items))
        except BaseException as error:
            answers.put(error)


def _portable(error: ScaleDigrapError) -> ScaleDigrapError:
    """The error if it survives pickling; the queue between processes would lose the batch otherwise."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return DataError(str(error))
    return error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
