"""A web server on loopback that misbehaves as it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """Files by path, and what goes wrong: a list of faults per path, one for each request that comes for it.

    A fault is ``("stall", n)``: send n bytes, then nothing; ``("close", n)``: send n bytes and close; ``("drip", n)``:
    n bytes, then one every 0.05 s; ``("status", code)``; ``("redirect", url)``; ``("no length",)``: until the
    connection closes; ``("wait", s)``: a whole answer after a pause; ``("late", s, code)``: a status after a pause.
    """

    files: dict[str, bytes]
    faults: dict[str, list[tuple]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    port: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def asked(self, path: str) -> list[dict[str, str]]:
        """The headers of every request for a path."""
        return [headers for asked, headers in self.requests if asked == path]


@contextmanager
def serve(site: Site) -> Iterator[Site]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"site": site}))
    server.daemon_threads = True
    site.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.stop.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    site: Site
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        site, path = self.site, self.path.partition("?")[0]
        site.requests.append((path, {name.lower(): value for name, value in self.headers.items()}))
        faults = site.faults.get(path, [])
        kind, *values = faults.pop(0) if faults else ("whole",)
        self.close_connection = True
        if kind == "late":
            time.sleep(values.pop(0))
        if kind in ("status", "late"):
            return self._head(values[0], {"Content-Length": "0", "Retry-After": "0"})
        if kind == "redirect":
            return self._head(302, {"Content-Length": "0", "Location": values[0]})
        if path not in site.files:
            return self._head(404, {"Content-Length": "0"})
        if kind == "wait":
            time.sleep(values[0])
        data, tag = site.files[path], site.tags.get(path, '"one"')
        start, wanted = 0, self.headers.get("Range")
        if wanted and site.ranges and self.headers.get("If-Range") in (None, tag):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        headers = {"ETag": tag, "Content-Length": str(len(data) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if kind == "no length":
            del headers["Content-Length"]
        self._head(206 if start else 200, headers)
        with suppress(BrokenPipeError, ConnectionResetError):
            self._send(data[start:], kind, values)

    def _send(self, data, kind, values):
        if kind not in ("stall", "close", "drip"):
            self.wfile.write(data)
            return
        self.wfile.write(data[: values[0]])
        self.wfile.flush()
        if kind == "stall":
            self.site.stop.wait(30)
        if kind == "drip":
            for byte in data[values[0] :]:
                if self.site.stop.wait(0.05):
                    return
                self.wfile.write(bytes([byte]))

    def _head(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
