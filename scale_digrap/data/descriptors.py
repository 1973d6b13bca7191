"""Open files of this process: a share of its limit (``ulimit -n``) for shards, over all data sets and caches.

A data set of thousands of shards would else use up every descriptor, and whatever needs the next one (a socket, a
checkpoint, a loader process) fails, far from the cause.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from scale_digrap.data.errors import DataError

_PER_SHARD = 2  # the shard itself and its mapped index
_MOST = 4096


def limit() -> int:
    """Descriptors that this process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else int(soft)


def most_open() -> int:
    """Shards that may be open at a time: half of the descriptors."""
    return max(4, min(_MOST, limit() // (2 * _PER_SHARD)))


def most_pins() -> int:
    """Shards that a cache may pin at a time: an eighth of the descriptors."""
    return max(4, min(_MOST, limit() // 8))


def is_exhausted(error: OSError) -> bool:
    """Whether an error says that there is no descriptor left, in the process or on the host."""
    return error.errno in (errno.EMFILE, errno.ENFILE)


class OpenShards:
    """What is open, the least recently used ones let go beyond :func:`most_open`; safe with threads and forks.

    A value that is let go is not closed here but when its last user drops it, so that no thread reads from a
    descriptor that has been given to another file meanwhile: values close themselves in ``__del__``.
    """

    def __init__(self, most: Callable[[], int] = most_open) -> None:
        self._most = most
        self._start_afresh()
        os.register_at_fork(after_in_child=self._start_afresh)

    def _start_afresh(self) -> None:
        # Another thread may have held the lock, or been half-way through a change, when this process was forked.
        self._mutex = threading.Lock()
        self._values: OrderedDict[tuple[Hashable, Hashable], Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, owner: Hashable, key: Hashable) -> Any:
        """What is open under that name, or None."""
        with self._mutex:
            value = self._values.get((owner, key))
            if value is not None:
                self._values.move_to_end((owner, key))
            return value

    def put(self, owner: Hashable, key: Hashable, make: Callable[[], Any]) -> Any:
        """Open something and keep it.

        Args:
            owner: of the entry; see :meth:`drop`.
            key: its name among the owner's.
            make: opens it. Called again, after everything else has been let go, where no descriptor is left.
        """
        value = self.retry(make)
        with self._mutex:
            self._values[owner, key] = value
            let_go = [self._values.popitem(last=False)[1] for _ in range(len(self._values) - self._most())]
        del let_go  # outside the lock: closing takes time
        return value

    def retry(self, make: Callable[[], Any]) -> Any:
        """The result of a call that opens files, with those here let go where it finds no descriptor left.

        Raises:
            DataError: there is still none left.
        """
        try:
            return make()
        except OSError as error:
            if not is_exhausted(error):
                raise
        self._let_go()
        try:
            return make()
        except OSError as error:
            if not is_exhausted(error):
                raise
            raise DataError(
                f"no shard can be opened: {error.strerror}, and this process may have {limit()}. Raise the limit "
                "(ulimit -n)"
            ) from None

    def drop(self, owner: Hashable) -> None:
        """Let go of all that is an owner's."""
        with self._mutex:
            own = [key for key in self._values if key[0] == owner]
            let_go = [self._values.pop(key) for key in own]
        del let_go

    def _let_go(self) -> None:
        with self._mutex:
            let_go, self._values = self._values, OrderedDict()
        del let_go


OPEN_SHARDS = OpenShards()
"""Those of all data sets of this process."""
