"""Opening an object at an offset, over http(s), fsspec or a command, so that no read blocks without end."""

from __future__ import annotations

import contextlib
import errno
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit, urlunsplit

import fsspec
from fsspec.registry import known_implementations

from scale_digrap.data.denials import FetchError, credentials_problem, final_error, listing_problem
from scale_digrap.data.urls import scheme, scrub, show
from scale_digrap.runtime.secrets import MASK, is_secret_key
from scale_digrap.runtime.text import one_line

__all__ = ["FetchError", "FetchOptions", "Stream", "TryAgainError", "filesystem", "listing_problem", "open_stream"]

_CHUNK = 1 << 20
_BLOCK = 8 << 20
_PERMANENT = frozenset({400, 401, 403, 404, 405, 410, 451})


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
        storage_options: given to fsspec's file systems; what stands under the name of a protocol, to that one alone.
        redirect_hosts: hosts (``cdn.example.org``, ``cdn.example.org:8080``) that a web server may redirect to.
    """

    timeout_s: float = 60.0
    retries: int = 5
    backoff_s: float = 1.0
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    redirect_hosts: tuple[str, ...] = ()


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


def open_stream(url: str, offset: int, version: str | None, options: FetchOptions, *, head: bool = False) -> Stream:
    """Open an object.

    Args:
        url: http(s), ``pipe:`` or any protocol of fsspec.
        offset: where to begin, if the object still has this version.
        version: of what has been read before.
        options: how.
        head: only size and version will be looked at.

    Raises:
        FetchError: what no other attempt mends.
        TryAgainError: anything else.
    """
    kind = scheme(url)
    if kind in ("http", "https"):
        return _HttpStream(url, offset, version, options)
    if kind == "pipe":
        return _ThreadStream(_Command(url), url, options.timeout_s)
    return _ThreadStream(_FsspecObject(url, offset, version, options, head), url, options.timeout_s)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects within a host, and to hosts that the configuration names; those are told no secrets.

    Whoever runs a web server could else have this machine ask for anything that it can reach (other services on it, the
    metadata service of a cloud), and have the answer kept as a shard.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = {host.strip().lower() for host in hosts}

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        front = f"{show(req.full_url)} redirects to"
        if scheme(newurl) not in ("http", "https") or (req.type == "https" and scheme(newurl) != "https"):
            raise FetchError(
                f"{front} {_place(newurl)}: refused, only the web is followed, and never from https to http"
            )
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is None:
            return None
        old_host, new_host = _host(req.full_url), _host(newurl)
        same = old_host == new_host or (
            old_host[0] == new_host[0]
            and (req.type, new.type) == ("http", "https")
            and (old_host[1], new_host[1]) == (80, 443)
        )
        if not same:
            name, port = new_host
            if not {name, f"{name}:{port}"} & self._hosts:
                raise FetchError(
                    f"{front} another host, {name}:{port}: refused. Name the address that it leads to, or add "
                    f"{name if port in (80, 443) else f'{name}:{port}'} to data.redirect_hosts if you trust it"
                )
            for header in list(new.headers):
                if header.lower() not in ("accept-encoding", "range", "if-range", "user-agent"):
                    new.remove_header(header)
        return new


def _host(url: str) -> tuple[str, int]:
    """Host name and port of a web address."""
    parts = urlsplit(url)
    return (parts.hostname or "").lower().rstrip("."), parts.port or (443 if parts.scheme.lower() == "https" else 80)


def _place(url: str) -> str:
    """Where a redirect leads, for messages: it is the server's text, not the user's."""
    return one_line(show(url), 120)


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
            opener = urllib.request.build_opener(_Redirects(options.redirect_hosts))
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
    def __init__(self, url: str, offset: int, version: str | None, options: FetchOptions, head: bool = False) -> None:
        self.url, self.offset, self.version, self.options, self.head = url, offset, version, options, head
        self._file: Any = None
        self._system: Any = None
        self._path = ""

    def open(self) -> tuple[int, int | None, str | None]:
        self._system, self._path = filesystem(self.url, self.options)
        size, version = self._info()
        start = self.offset if version is not None and version == self.version else 0
        if not self.head:
            # Small blocks: a block is lost where a connection breaks, and must come within the time limit.
            self._file = self._system.open(self._path, "rb", block_size=_BLOCK)
            self._file.seek(start)
        self.version = version
        return start, size, version

    def _info(self) -> tuple[int | None, str | None]:
        self._system.invalidate_cache(self._system._parent(self._path))  # listings are remembered for ever
        try:
            info = self._system.info(self._path)
        except FileNotFoundError:
            raise
        except OSError as error:
            if credentials_problem(error) is None and error.errno in (None, errno.EACCES, errno.EPERM, errno.EINVAL):
                # An answer to HEAD has no body, so that S3 cannot say why; an answer to GET has one.
                self._system.cat_file(self._path, start=0, end=1)
            raise
        known = next(
            (info[name] for name in ("ETag", "etag", "md5", "LastModified", "mtime", "created") if info.get(name)), None
        )
        return info.get("size"), None if known is None else f"{known}-{info.get('size')}"

    def read(self) -> bytes:
        if self._file is None:
            return b""
        data: bytes = self._file.read(_CHUNK)
        if not data and self._info()[1] != self.version:
            raise TryAgainError("it was rewritten while it was read", fresh=True)
        return data

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def filesystem(url: str, options: FetchOptions) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it.

    Raises:
        FetchError: a protocol that fsspec does not know or whose package is missing, or options that it does not take.
    """
    try:
        return fsspec.core.url_to_fs(url, **_options_for(url, options.storage_options))  # type: ignore[no-any-return]
    except (ImportError, ValueError, TypeError) as error:
        reason = _without_values(scrub(f"{error}", url), options.storage_options)
        raise FetchError(f"{show(url)}: {scheme(url)}:// cannot be read here: {reason}") from None


def _options_for(url: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those for one URL: what is common, and what stands under the name of its protocol."""
    kinds = {kind.partition("://")[0].lower() for kind in url.split("::")}
    own: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping) and name in known_implementations:
            if name not in kinds:
                continue
            if "::" in url:  # fsspec hands out what belongs to the parts of a chain itself
                own[name] = dict(value)
            else:
                own.update(value)
        else:
            own[name] = value
    return own


def _without_values(text: str, options: Mapping[str, Any]) -> str:
    """An error text without what the options hold under names of secrets."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            text = _without_values(text, value)
        elif isinstance(value, str) and value and is_secret_key(name):
            text = text.replace(value, MASK)
    return text


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
        if isinstance(item, (FetchError, TryAgainError)):
            raise item
        final = final_error(item, self._url) if isinstance(item, Exception) else None
        if final is not None:
            raise final from None
        if isinstance(item, Exception):
            raise TryAgainError(scrub(f"{type(item).__name__}: {item}", self._url)) from None
        return item

    def read(self) -> bytes:
        return self._next()  # type: ignore[no-any-return]

    def close(self) -> None:
        self._stop.set()
        if isinstance(self._source, _Command):
            self._source.close()  # ends the thread's read
