"""An S3 store on loopback (moto's server), behind a door that misbehaves as it is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

_DENIED = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'


@dataclass
class Bucket:
    """A bucket with objects, and what goes wrong.

    Attributes:
        endpoint: address of the server.
        faults: what happens to the next requests with these methods: ``("GET", "reset")`` breaks the connection off in
            the middle of the answer; ``("GET", "short")`` says nothing and sends less; ``("GET", 503)`` answers so.
        refuse: S3's code for every request (``ExpiredToken``), or None; HEAD gets the status alone, as from S3.
        keys: access keys that are known; others are denied. Empty: all are.
        requests: (method, path, Range, access key) of all that came.
    """

    endpoint: str = ""
    faults: list[tuple[str, Any]] = field(default_factory=list)
    refuse: str | None = None
    keys: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str, str]] = field(default_factory=list)

    def options(self, **more: Any) -> dict[str, Any]:
        """Storage options for it, with a key that works."""
        return {"endpoint_url": self.endpoint, "key": "known", "secret": "geheim", **more}


class _Reset(Exception):  # noqa: N818 (no error of the test)
    pass


class _Door:
    def __init__(self, bucket: Bucket, inner: Any) -> None:
        self.bucket, self.inner = bucket, inner

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        given = environ.get("HTTP_AUTHORIZATION", "")
        key = given.partition("Credential=")[2].partition("/")[0]
        if method not in ("GET", "HEAD"):
            return self.inner(environ, start_response)
        self.bucket.requests.append((method, path, environ.get("HTTP_RANGE", ""), key))
        code = self.bucket.refuse
        if code is None and self.bucket.keys and key not in self.bucket.keys:
            code = "AccessDenied" if not key else "InvalidAccessKeyId"
        if code is not None:
            body = _DENIED.format(code=code).encode()
            status = "400 Bad Request" if code == "ExpiredToken" else "403 Forbidden"
            start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body if method == "GET" else b""]
        number = next((n for n, (which, _) in enumerate(self.bucket.faults) if which == method), None)
        fault = None if number is None else self.bucket.faults.pop(number)[1]
        if isinstance(fault, int):
            start_response(f"{fault} Fault", [("Content-Length", "0")])
            return [b""]
        answer = self.inner(environ, start_response)
        if fault is None:
            return answer
        return _cut(b"".join(answer), environ)


def _cut(body: bytes, environ: dict[str, Any]) -> Iterator[bytes]:
    yield body[: len(body) // 2]
    environ["werkzeug.socket"].shutdown(2)
    raise _Reset


class _Quiet(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        pass


@contextmanager
def serve_bucket(objects: dict[str, bytes], name: str = "shards") -> Iterator[Bucket]:
    """A server that holds one bucket, without anything in the environment."""
    import boto3

    bucket = Bucket()
    app = _Door(bucket, DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=_Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    bucket.endpoint = f"http://127.0.0.1:{server.server_port}"
    client = boto3.client(
        "s3",
        endpoint_url=bucket.endpoint,
        aws_access_key_id="known",
        aws_secret_access_key="geheim",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=name)
    for key, data in objects.items():
        client.put_object(Bucket=name, Key=key, Body=data)
    bucket.put = lambda key, data: client.put_object(Bucket=name, Key=key, Body=data)  # type: ignore[attr-defined]
    bucket.requests.clear()
    try:
        yield bucket
    finally:
        server.shutdown()
        server.server_close()
