"""Opening an object at an offset, over http(s), fsspec or a command, so that no read blocks without end."""

from __future__ import annotations

import contextlib
import http.client
import os
import queue
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit, urlunsplit

import fsspec

from scale_digrap.data.errors import ReadError
from scale_digrap.data.urls import scheme, scrub, show

_CHUNK = 1 << 20
_PERMANENT = frozenset({400, 401, 403, 404, 405, 410, 451})


class FetchError(ReadError):
    """A remote object that could not be had; `missing` if the place answered that it is not there."""

    def __init__(self, message: str, *, missing: bool = False, denied: bool = False) -> None:
        super().__init__(message)
        self.missing, self.denied = missing, denied


class TryAgainError(Exception):
    """This attempt failed in a way that the next one may not; `after` is the pause the server asked for, in s."""

    def __init__(self, reason: str, *, after: float | None = None, fresh: bool = False) -> None:
        super().__init__(reason)
        self.after, self.fresh = after, fresh


@dataclass(frozen=True)
class FetchOptions:
    """How to fetch.

    Attributes:
        timeout_s: limit for connecting, for any wait for data, and the window over which less than 1 KiB/s is a stall.
        retries: attempts after the first that may fail in a row; one that brings 1 MiB or more starts the count anew.
        backoff_s: pause before the first retry; it doubles each time, up to 60 s.
        headers: sent to http(s) hosts named in URLs, not to where they redirect.
        storage_options: given to fsspec's file systems.
    """

    timeout_s: float = 60.0
    retries: int = 5
    backoff_s: float = 1.0
    headers: Mapping[str, str] = field(default_factory=dict)
    storage_options: Mapping[str, Any] = field(default_factory=dict)


class Stream(Protocol):
    """An open object: `start` is the offset its first byte has, `size` that of the whole object, None if unknown;
    `version` identifies its content (ETag, modification time), None if the place gives none."""

    start: int
    size: int | None
    version: str | None

    def read(self) -> bytes:
        """Some more bytes; empty at the end. Returns within the time limit."""

    def close(self) -> None:
        """Give the connection back."""


def open_stream(url: str, offset: int, version: str | None, options: FetchOptions) -> Stream:
    kind = scheme(url)
    if kind in ("http", "https"):
        return _HttpStream(url, offset, version, options)
    if kind == "pipe":
        return _ThreadStream(_Command(url), url, options.timeout_s)
    return _ThreadStream(_FsspecObject(url, offset, version, options), url, options.timeout_s)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http(s) only, and tells other hosts no secrets."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        if scheme(newurl) not in ("http", "https") or (req.type == "https" and scheme(newurl) != "https"):
            raise FetchError(f"{show(req.full_url)} redirects to {show(newurl)}: refused")
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and (new.host, new.type) != (req.host, req.type):
            for name in list(new.headers):
                if name.lower() not in ("accept-encoding", "range", "if-range", "user-agent"):
                    new.remove_header(name)
        return new


class _HttpStream:
    def __init__(self, url: str, offset: int, version: str | None, options: FetchOptions) -> None:
        parts = urlsplit(url)
        user, at, host = parts.netloc.rpartition("@")
        plain = urlunsplit((parts.scheme, host, parts.path, parts.query, ""))
        headers = {"Accept-Encoding": "identity", "User-Agent": "scale-digrap", **options.headers}
        if at:
            headers["Authorization"] = "Basic " + b64encode(unquote(user).encode()).decode()
        if offset and version:
            headers.update({"Range": f"bytes={offset}-", "If-Range": version})
        self._where = show(url)
        try:
            opener = urllib.request.build_opener(_Redirects())
            self._response = opener.open(urllib.request.Request(plain, headers=headers), timeout=options.timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error, offset) from None
        except (http.client.InvalidURL, ValueError) as error:
            raise FetchError(f"{self._where}: not a URL that can be asked for: {scrub(str(error), url)}") from None
        except (OSError, http.client.HTTPException) as error:
            raise TryAgainError(_reason(error, options.timeout_s)) from None
        try:
            self._read_head(offset)
        except BaseException:
            self._response.close()
            raise

    def _read_head(self, offset: int) -> None:
        response = self._response
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.lower() not in ("identity", ""):
            raise FetchError(
                f"{self._where}: the server sends it with Content-Encoding {encoding}: sizes would be wrong"
            )
        etag, modified = response.headers.get("ETag"), response.headers.get("Last-Modified")
        # Only a strong validator promises equal bytes.
        self.version = etag if etag and not etag.startswith("W/") else modified
        length = response.length
        if response.status == 206:
            unit, _, span = (response.headers.get("Content-Range") or "").partition(" ")
            place, _, total = span.partition("/")
            if unit != "bytes" or place.partition("-")[0] != str(offset):
                raise TryAgainError(f"asked for bytes from {offset} on, got {unit} {span!r}", fresh=True)
            self.start = offset
            self.size = int(total) if total.isdigit() else (None if length is None else offset + length)
        else:
            self.start, self.size = 0, length
        self._chunked = bool(getattr(response, "chunked", False))

    def _refused(self, error: urllib.error.HTTPError, offset: int) -> Exception:
        # Not the error's own words: they may quote the address of a redirect, with its signature.
        text = f"the server answers {error.code} {http.client.responses.get(error.code, '')}"
        if error.code == 416:
            return TryAgainError(f"the server has no bytes from {offset} on", fresh=True)
        if error.code < 400:
            return FetchError(f"{self._where}: redirects without end, or to something that is not on the web: refused")
        if error.code in _PERMANENT:
            return FetchError(
                f"{self._where}: {text}", missing=error.code in (404, 410), denied=error.code in (401, 403)
            )
        after = error.headers.get("Retry-After", "")
        return TryAgainError(text, after=_seconds(after))

    def read(self) -> bytes:
        try:
            return self._response.read1(_CHUNK)  # type: ignore[no-any-return]
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise TryAgainError(_reason(error, None)) from None

    def close(self) -> None:
        self._response.close()


def _seconds(after: str) -> float | None:
    """The pause of a Retry-After header: seconds, or a date."""
    if after.isdigit():
        return float(after)
    try:
        return max(parsedate_to_datetime(after).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return None


def _reason(error: Exception, timeout_s: float | None) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return "stalled: no answer within the time limit" + (f" of {timeout_s:g} s" if timeout_s else "")
    return f"{type(cause).__name__}: {cause}"


class _Blocking(Protocol):
    """What `_ThreadStream` runs in its thread; none of these have time limits of their own."""

    def open(self) -> tuple[int, int | None, str | None]: ...

    def read(self) -> bytes: ...

    def close(self) -> None: ...


class _FsspecObject:
    def __init__(self, url: str, offset: int, version: str | None, options: FetchOptions) -> None:
        self.url, self.offset, self.version, self.options = url, offset, version, options
        self._file: Any = None

    def open(self) -> tuple[int, int | None, str | None]:
        system, path = filesystem(self.url, self.options)
        info = system.info(path)
        known = next(
            (info[name] for name in ("ETag", "etag", "md5", "LastModified", "mtime", "created") if info.get(name)), None
        )
        version = None if known is None else f"{known}-{info.get('size')}"
        start = self.offset if version is not None and version == self.version else 0
        self._file = system.open(path, "rb")
        self._file.seek(start)
        return start, info.get("size"), version

    def read(self) -> bytes:
        return self._file.read(_CHUNK)  # type: ignore[no-any-return]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def filesystem(url: str, options: FetchOptions) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it.

    Raises:
        FetchError: a protocol that fsspec does not know or whose package is missing.
    """
    try:
        return fsspec.core.url_to_fs(url, **options.storage_options)  # type: ignore[no-any-return]
    except (ImportError, ValueError) as error:
        raise FetchError(f"{show(url)}: {scheme(url)}:// cannot be read here: {scrub(str(error), url)}") from None


class _Command:
    """A shell command whose output is the object. No resuming: two runs need not give the same bytes."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._process: subprocess.Popen[bytes] | None = None

    def open(self) -> tuple[int, int | None, str | None]:
        command = self.url[len("pipe:") :]
        self._process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True)
        return 0, None, None

    def read(self) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        data = self._process.stdout.read(_CHUNK)
        if not data and (status := self._process.wait()) != 0:
            raise OSError(f"the command ended with exit status {status}")
        return data

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # the shell's children too
            self._process.wait()
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()


class _ThreadStream:
    """Reads something that may block for ever in a thread of its own, which is left behind if it does."""

    def __init__(self, source: _Blocking, url: str, timeout_s: float) -> None:
        self._source, self._url, self._timeout_s = source, url, timeout_s
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=4)
        self._stop = threading.Event()
        threading.Thread(target=self._run, daemon=True, name="shard-fetch").start()
        self.start, self.size, self.version = self._next()

    def _run(self) -> None:
        try:
            self._put(self._source.open())
            while not self._stop.is_set():
                data = self._source.read()
                self._put(data)
                if not data:
                    break
        except Exception as error:  # every protocol has its own kinds; the reader sorts them
            self._put(error)
        finally:
            with contextlib.suppress(Exception):
                self._source.close()

    def _put(self, item: Any) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.2)
                return

    def _next(self) -> Any:
        try:
            item = self._queue.get(timeout=self._timeout_s)
        except queue.Empty:
            self.close()
            raise TryAgainError(f"stalled: no data for {self._timeout_s:g} s") from None
        if isinstance(item, FetchError):
            raise item
        if isinstance(item, FileNotFoundError):
            raise FetchError(f"{show(self._url)}: no such object", missing=True) from None
        if isinstance(item, PermissionError):
            raise FetchError(f"{show(self._url)}: access denied", denied=True) from None
        if isinstance(item, Exception):
            raise TryAgainError(scrub(f"{type(item).__name__}: {item}", self._url)) from None
        return item

    def read(self) -> bytes:
        return self._next()  # type: ignore[no-any-return]

    def close(self) -> None:
        self._stop.set()
        if isinstance(self._source, _Command):
            self._source.close()  # ends the thread's read
