"""Where shards come from: local paths as they are; http(s), object stores and others as whole files in a cache."""

from __future__ import annotations

import glob
import logging
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from scale_digrap.data.cache import CacheError, Note, ShardCache
from scale_digrap.data.errors import DataError
from scale_digrap.data.fetch import fetch, look
from scale_digrap.data.listing import as_path, braces, files, plain, say_left_out, shards_in
from scale_digrap.data.places import hash_file
from scale_digrap.data.places import identity as file_identity
from scale_digrap.data.streams import FetchError, FetchOptions, filesystem, listing_problem
from scale_digrap.data.urls import (
    basename,
    beside,
    cache_name,
    has_password,
    identity,
    is_local,
    local_path,
    scheme,
    show,
)
from scale_digrap.runtime.text import MAX_TEXT_BYTES, home

if TYPE_CHECKING:
    from scale_digrap.data.index import Manifest, ShardEntry

log = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
_ROOM_POLL_S = 2.0

_checked: dict[tuple[Path, str], tuple[Any, ...]] = {}
"""(cache folder, name) → what this process, or the one that started it, has found right there: once a run is enough."""


class ShardStore:
    """Local paths of shards, wherever they lie.

    Remote shards are fetched whole into `cache_dir`: one download per node, resumed where one broke off, checked by
    size and checksum. Shards in use are pinned; others make room, the least recently used first. Any processes
    and threads may share a cache; a store may be forked or pickled.

    A file in the cache is used if it is the one whose checksum was computed when it was fetched; a file that was put
    there, written to or copied since is read and compared first. Without a checksum in a manifest, size and version
    are compared with the source's once per run.

    Args:
        cache_dir: folder on a disk of this node, private to this user; None: only local shards can be had.
        max_bytes: bound of the cache; None: none.
        timeout_s: for connecting and for any wait for data; also the window in which less than 1 KiB/s is a stall.
        retries: attempts after the first that may fail in a row, with pauses that double.
        allow_pipe: run ``pipe:COMMAND`` URLs in a shell. Whoever writes the list of shards can then run anything here.
        headers: for http(s) (``{"Authorization": "Bearer …"}``); not sent on to other hosts by redirects.
        storage_options: for fsspec (``{"anon": True}``, ``{"profile": "lab"}``); what stands under the name of a
            protocol (``{"s3": {…}, "gs": {…}}``), for that one alone.
        backoff_s: pause before the first retry.
        cache_shared: other users may write to the cache folder, and are trusted.
        redirect_hosts: hosts that a web server may redirect to, besides itself.
    """

    def __init__(
        self,
        *,
        cache_dir: Path | None = None,
        max_bytes: int | None = None,
        timeout_s: float = 60.0,
        retries: int = 5,
        allow_pipe: bool = False,
        headers: Mapping[str, str] | None = None,
        storage_options: Mapping[str, Any] | None = None,
        backoff_s: float = 1.0,
        cache_shared: bool = False,
        redirect_hosts: Sequence[str] = (),
    ) -> None:
        if timeout_s <= 0 or retries < 0:
            raise DataError(f"a store needs timeout_s > 0 and retries ≥ 0, got {timeout_s} and {retries}")
        self.allow_pipe = allow_pipe
        self.options = FetchOptions(
            timeout_s, retries, backoff_s, dict(headers or {}), dict(storage_options or {}), tuple(redirect_hosts)
        )
        self.cache = (
            None if cache_dir is None else ShardCache(Path(home(str(cache_dir))), max_bytes, timeout_s, cache_shared)
        )
        self._start_afresh()

    def _start_afresh(self) -> None:
        """State that belongs to one process alone."""
        self._process = os.getpid()
        self._mutex = threading.Lock()
        self._wake = threading.Condition(self._mutex)
        self._window: set[str] = set()  # names that pin() asked for
        self._ahead: set[str] = set()  # names that prefetch has pinned
        self._latest: dict[int, str] = {}  # thread → the name that path() gave it last
        self._queue: deque[tuple[str, ShardEntry | None]] = deque()
        self._thread: threading.Thread | None = None
        self._closed = False

    def __getstate__(self) -> dict[str, Any]:
        c = self.cache
        cache = None if c is None else (c.folder, c.max_bytes, c.timeout_s, c.shared)
        checked = {} if c is None else {key: state for key, state in _checked.items() if key[0] == c.folder}
        return {"allow_pipe": self.allow_pipe, "options": self.options, "cache": cache, "checked": checked}

    def __setstate__(self, state: dict[str, Any]) -> None:
        cache = state.pop("cache")
        _checked.update(state.pop("checked"))
        self.__dict__.update(state)
        self.cache = None if cache is None else ShardCache(*cache)
        self._start_afresh()

    # What there is

    def expand(self, urls: str | Path | Sequence[str | Path]) -> list[str]:
        """The shards that names and patterns mean, in order.

        Braces (``{000000..000041}``) are expanded everywhere, ``*``, ``?`` and ``[…]`` for local paths and for fsspec's
        protocols, not for http(s). A local folder means the shards of its ``manifest.json``, or else its ``*.tar``; a
        ``manifest.json``, local or remote, means its shards. ``file://`` URLs become paths.

        Raises:
            DataError: nothing given or found, a local shard that does not exist, a shard listed twice, a ``pipe:``
                that is not allowed, a remote shard without a cache.
        """
        names: list[str] = []
        for url in [urls] if isinstance(urls, (str, Path)) else urls:
            for pattern in braces(str(url)):
                if scheme(pattern) == "pipe":
                    self._check_remote(pattern)
                    names.append(pattern)
                elif is_local(pattern):
                    names += self._expand_local(local_path(pattern))
                else:
                    names += self._expand_remote(pattern)
        if not names:
            raise DataError("no shards given")
        missing = [name for name in names if is_local(name) and not Path(name).is_file()]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise DataError(f"no such shard: {', '.join(missing[:3])}{more}")
        seen: set[str] = set()
        for name in names:
            if identity(name) in seen:
                raise DataError(f"shard {show(name)!r} is listed twice: its samples would count twice")
            seen.add(identity(name))
        return names

    def _expand_local(self, pattern: str) -> list[str]:
        path = Path(pattern)
        if path.is_dir():
            manifest = path / MANIFEST_NAME
            found = [str(manifest)] if manifest.is_file() else [str(file) for file in shards_in(path)]
            if not found:
                raise DataError(f"folder {pattern!r} holds neither {MANIFEST_NAME} nor a *.tar")
        elif glob.has_magic(pattern) and not path.exists():
            found = [str(file) for file in files(map(Path, glob.glob(pattern)), pattern)]
            if not found:
                raise DataError(f"no file matches {pattern!r}")
        else:
            found = [pattern]
        if len(found) == 1 and Path(found[0]).name == MANIFEST_NAME and Path(found[0]).is_file():
            folder = Path(found[0]).parent
            found = [str(folder / plain(entry.name, found[0])) for entry in self._load(Path(found[0])).shards]
        return [as_path(name) for name in found]

    def _expand_remote(self, pattern: str) -> list[str]:
        self._check_remote(pattern)
        web = scheme(pattern) in ("http", "https")
        if basename(pattern) == MANIFEST_NAME:
            manifest = self.manifest(pattern)
            if manifest is None:
                raise DataError(f"no such manifest: {show(pattern)}")
            names = [plain(entry.name, show(pattern)) for entry in manifest.shards]
            return [beside(pattern, quote(name) if web else name) for name in names]
        if web:
            if "*" in pattern.partition("?")[0]:
                raise DataError(
                    f"{show(pattern)}: a web server cannot be asked for all names that match '*'; use braces"
                )
            return [pattern]
        if not glob.has_magic(pattern):
            return [pattern]
        system, path = filesystem(pattern, self.options)
        try:
            everything = sorted(system.glob(path))
        except Exception as error:  # every protocol has its own kinds
            raise listing_problem(error, pattern) from None
        found = [str(name) for name in everything if not basename(str(name)).startswith(".")]
        say_left_out(show(pattern), [str(name) for name in everything if str(name) not in found])
        if not found:
            raise DataError(f"no object matches {show(pattern)!r}")
        return [str(system.unstrip_protocol(name)) for name in found]

    def _check_remote(self, url: str) -> None:
        if scheme(url) == "pipe" and not self.allow_pipe:
            raise DataError(
                f"{show(url)}: runs a shell command and is refused; allow_pipe=True if you trust whoever wrote the list"
            )
        if scheme(url) not in ("http", "https", "pipe") and has_password(url):
            raise DataError(
                f"{show(url)}: credentials in a URL are refused, for they would show in every log: name them in "
                "data.storage_options (key: ${oc.env:…}), in the environment or in a profile"
            )
        if self.cache is None:
            raise DataError(f"{show(url)}: a remote shard needs a cache folder: set cache_dir")

    def manifest(self, url: str) -> Manifest | None:
        """The ``manifest.json`` in the folder of a shard (or `url` itself, if that is its name); None if there is none.

        Raises:
            DataError: it cannot be read.
        """
        if scheme(url) == "pipe":
            return None
        where = url if basename(url) == MANIFEST_NAME else beside(url, MANIFEST_NAME)
        if is_local(where):
            path = Path(local_path(where))
            return self._load(path) if path.is_file() else None
        with tempfile.TemporaryDirectory(prefix="scale-digrap-") as folder:
            path = Path(folder) / MANIFEST_NAME
            try:
                fetch(where, path, self.options, reserve=_not_too_large(show(where)))
            except FetchError as error:
                if error.denied:
                    # Object stores that may not list their content answer so for what does not exist.
                    log.warning("%s; going on without a manifest: checksums are not checked", error)
                if error.missing or error.denied:
                    return None
                raise
            return self._load(path)

    @staticmethod
    def _load(path: Path) -> Manifest:
        from scale_digrap.data.index import Manifest

        return Manifest.load(path)

    # Having it

    def path(self, url: str, entry: ShardEntry | None = None) -> Path:
        """The local path of a whole shard; fetches it if need be, and blocks meanwhile.

        The shard stays pinned in the cache until the calling thread asks for another one, and longer if it is in the
        window of `pin`. A file that is open stays readable in any case.

        Args:
            url: as `expand` gives it.
            entry: its line of the manifest: size and checksum are compared.

        Raises:
            FetchError: it cannot be had, after the retries.
            CacheError: it does not fit in the cache.
            DataError: a local shard that is missing or has another size than the manifest says.
        """
        if is_local(url):
            return _local(Path(local_path(url)), entry)
        self._check_remote(url)
        assert self.cache is not None
        self._own()
        name, thread = cache_name(url), threading.get_ident()
        with self._mutex:
            previous = self._latest.get(thread)
            self._latest[thread] = name
        self.cache.pin(name, must=True)
        self._release([previous] if previous else [])
        return self._fetched(url, name, entry)

    def prefetch(self, urls: Sequence[str], entries: Sequence[ShardEntry | None] | None = None) -> None:
        """Fetch shards in the background, in this order, as far as the cache has room; replaces an earlier call's list.

        What has arrived stays until the next call, unless another shard that is needed now has no room otherwise.
        Failures are logged; `path` tries again and raises.

        Args:
            urls: what will be needed next, the present window first.
            entries: their lines of the manifest, if there is one.
        """
        if self.cache is None:
            return
        self._own()
        lines: Sequence[ShardEntry | None] = entries if entries is not None else [None] * len(urls)
        jobs = [(url, line) for url, line in zip(urls, lines, strict=True) if not is_local(url)]
        with self._mutex:
            if self._closed:
                return
            keep = {cache_name(url) for url, _ in jobs}
            outdated, self._ahead = self._ahead - keep, self._ahead & keep
            self.cache.unpin(outdated, ahead=True)
            self._queue = deque(jobs)
            if jobs and (self._thread is None or not self._thread.is_alive()):
                self._thread = threading.Thread(target=self._work, daemon=True, name="shard-prefetch")
                self._thread.start()
            self._wake.notify_all()

    def pin(self, urls: Sequence[str]) -> None:
        """Make these the active window: they stay in the cache; those of the window before may go.

        They need not be there yet. Their pins hold against every process that shares the cache.
        """
        if self.cache is None:
            return
        self._own()
        window = {cache_name(url) for url in urls if not is_local(url)}
        with self._mutex:
            outdated, self._window = self._window - window, window
            self._wake.notify_all()
        for name in sorted(window):
            self.cache.pin(name)
        self._release(sorted(outdated))

    def close(self) -> None:
        """Stop prefetching and let all pins go. The cache keeps its files."""
        if self._process != os.getpid() or self.cache is None:
            return
        with self._mutex:
            self._closed = True
            self._queue.clear()
            self._window, self._ahead, self._latest = set(), set(), {}
            self._wake.notify_all()
        self.cache.unpin_all()

    def _own(self) -> None:
        if self._process != os.getpid():
            # Forked: threads, locks and pins stayed with the parent.
            if self.cache is not None:
                self.cache.after_fork()
            self._start_afresh()

    def _release(self, names: Sequence[str]) -> None:
        """Unpin those of `names` that nothing in this process needs any more."""
        assert self.cache is not None
        with self._mutex:
            needed = self._window | set(self._latest.values())
            self.cache.unpin(name for name in names if name not in needed)

    def _fetched(self, url: str, name: str, entry: ShardEntry | None, ahead: bool = False) -> Path:
        """The shard in the cache, fetched by whoever is first."""
        cache = self.cache
        assert cache is not None
        path = cache.file(name)
        if self._is_right(url, name, entry):
            cache.touch(name)
            return path
        asked = time.time()
        with cache.exclusive(name):
            # Another process may have fetched it, or failed to, while this one waited for the lock.
            if self._is_right(url, name, entry) or self._proves_right(url, name, entry, asked):
                cache.touch(name)
                return path
            failure = cache.failure(name, asked)
            if failure is not None:
                raise FetchError(failure)
            reserved = False
            try:
                if os.path.lexists(path):
                    log.warning("%s: the cached copy is incomplete or outdated; fetching it again", show(url))
                    cache.remove(name)

                def reserve(size: int) -> None:
                    nonlocal reserved
                    if not cache.make_room(name, size, ahead=ahead):
                        raise _NoRoomYetError(name)
                    reserved = True

                size, sha256, version = fetch(
                    url,
                    path,
                    self.options,
                    size=None if entry is None else entry.bytes,
                    sha256=None if entry is None else entry.sha256 or None,
                    reserve=reserve,
                )
                if not reserved:
                    reserve(size)
                cache.keep(name, size, sha256, version)
                self._found_right(name, entry)
            except FetchError as error:
                cache.fail(name, str(error))
                raise
            except OSError as error:
                raise CacheError(f"cannot keep {show(url)} in the cache {cache.folder}: {error.strerror}") from None
            finally:
                cache.release_claim(name)
        return path

    def _is_right(self, url: str, name: str, entry: ShardEntry | None) -> bool:
        """Whether the cached shard can be used as it is, by what is on record; nothing is read or asked."""
        cache = self.cache
        assert cache is not None
        note = cache.note(name)
        if note is None or not _as_listed(note, entry):
            return False
        if _checked.get((cache.folder, name)) == _state(cache, name, entry):
            return True
        # In a private folder only this user's own processes write notes.
        anchored = (entry is not None and entry.sha256 != "") or scheme(url) == "pipe"
        return anchored and not cache.shared and cache.is_as_kept(name, note)

    def _proves_right(self, url: str, name: str, entry: ShardEntry | None, asked: float) -> bool:
        """Whether the cached shard is what it should be, after reading it and asking its source; holds its lock."""
        cache = self.cache
        assert cache is not None
        note = cache.note(name)
        if note is None or not _as_listed(note, entry):
            return False
        if (cache.shared or not cache.is_as_kept(name, note)) and hash_file(cache.file(name)) != note.sha256:
            log.warning("%s: the cached copy is not what was fetched", show(url))
            return False
        just_fetched = note.file is not None and note.file[-1] >= asked * 1e9 and cache.is_as_kept(name, note)
        if (entry is None or not entry.sha256) and scheme(url) != "pipe" and not just_fetched:
            try:
                size, version = look(url, self.options)
            except FetchError as error:
                log.warning("%s; the cached copy is used without a comparison with its source", error)
                size, version = note.size, note.version
            if (size is not None and size != note.size) or (version and note.version and version != note.version):
                log.warning("%s: was rewritten since it was cached", show(url))
                return False
        if not cache.is_as_kept(name, note):
            cache.keep(name, note.size, note.sha256, note.version)
        self._found_right(name, entry)
        return True

    def _found_right(self, name: str, entry: ShardEntry | None) -> None:
        assert self.cache is not None
        _checked[self.cache.folder, name] = _state(self.cache, name, entry)

    def _work(self) -> None:
        """The prefetch thread: ends when there is nothing left to do."""
        cache = self.cache
        assert cache is not None
        while True:
            with self._mutex:
                if not self._queue:
                    self._thread = None
                    return
                url, entry = self._queue.popleft()
                name = cache_name(url)
                self._ahead.add(name)
                cache.pin(name, ahead=True)
            try:
                self._fetched(url, name, entry, ahead=True)
            except _NoRoomYetError:
                with self._mutex:
                    if name in self._ahead:  # nobody has called prefetch anew meanwhile
                        self._queue.appendleft((url, entry))
                        self._wake.wait(timeout=_ROOM_POLL_S)
            except Exception as error:  # told when the shard is needed
                log.warning("fetching ahead: %s", error)


class _NoRoomYetError(CacheError):
    """Everything in the cache is pinned; the prefetch thread waits."""


def _state(cache: ShardCache, name: str, entry: ShardEntry | None) -> tuple[Any, ...]:
    return (file_identity(cache.file(name)), None if entry is None else entry.sha256)


def _not_too_large(name: str) -> Callable[[int], None]:
    def check(size: int) -> None:
        if size > MAX_TEXT_BYTES:
            raise DataError(f"{name} has {size} bytes, which is no manifest: more than {MAX_TEXT_BYTES:,}")

    return check


def _local(path: Path, entry: ShardEntry | None) -> Path:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"no such shard: {path} ({error.strerror})") from None
    if entry is not None and size != entry.bytes:
        raise DataError(
            f"shard {path} has {size} bytes, the manifest says {entry.bytes}: it was cut off or rewritten. "
            "If it is as it should be, index the folder again (scale-digrap shards index)"
        )
    return path


def _as_listed(note: Note, entry: ShardEntry | None) -> bool:
    if entry is None:
        return True
    return note.size == entry.bytes and entry.sha256 in ("", note.sha256)
