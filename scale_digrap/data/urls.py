"""What shards are called: patterns, and URLs without their secrets.

A URL may carry credentials: ``user:password@``, a signature in the query, a token in a ``pipe:`` command. `show` is
the form for messages, `identity` the form that names the object itself, whoever asks for it.
"""

from __future__ import annotations

import hashlib
import re
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_WEB = ("http", "https")
_SIGNED_PREFIXES = ("x-amz-", "x-goog-")
_SIGNED_NAMES = frozenset(
    [
        "awsaccesskeyid",
        "googleaccessid",
        "signature",
        "expires",
        "key-pair-id",
        "policy",
        "token",
        "access_token",
        "auth",
        "sas",
        "sig",
    ]
)
# Azure's shared access signatures spread over short names that mean something else elsewhere: only together with `sig`.
_AZURE_NAMES = frozenset(
    ["sv", "ss", "srt", "sr", "sp", "se", "st", "spr", "sip", "skoid", "sktid", "skt", "ske", "sks", "skv"]
)


def scheme(url: str) -> str:
    """``http``, ``s3``, …; ``pipe`` for a command; ``file`` for a local path."""
    if url.startswith("pipe:"):
        return "pipe"
    found = _SCHEME.match(url)
    chained = re.match(r"([a-z0-9+.-]+)::.*://", url, re.IGNORECASE)  # fsspec's chains: ``zip::s3://…``
    if chained and not found:
        return chained.group(1).lower()
    return found.group(1).lower() if found else "file"


def is_local(url: str) -> bool:
    """Whether the shard lies in the file system: a plain path or ``file://``."""
    return scheme(url) == "file"


def local_path(url: str) -> str:
    """The path of a local shard."""
    return unquote(urlsplit(url).path) if _SCHEME.match(url) else url


def show(url: str) -> str:
    """The URL for errors and logs: no user, password, query or command arguments."""
    kind = scheme(url)
    if kind == "file":
        return local_path(url)
    if kind == "pipe":
        words = url[len("pipe:") :].split()
        return f"pipe:{words[0] if words else ''} … ({_digest(url)})"
    front, path, query = _parts(url)
    return front + path + ("?…" if query else "")


def identity(url: str) -> str:
    """The URL without what says who asks: two signatures for one object are one object."""
    kind = scheme(url)
    if kind == "file":
        return local_path(url)
    if kind == "pipe":
        return url
    front, path, query = _parts(url)
    if kind not in _WEB:
        return front + path + (f"?{query}" if query else "")
    pairs = parse_qsl(query, keep_blank_values=True)
    drop = _SIGNED_NAMES | (_AZURE_NAMES if any(name.lower() == "sig" for name, _ in pairs) else set())
    kept = [
        (name, value)
        for name, value in pairs
        if name.lower() not in drop and not name.lower().startswith(_SIGNED_PREFIXES)
    ]
    return front + path + (f"?{urlencode(kept)}" if kept else "")


def basename(url: str) -> str:
    """The last part of the path, for people to recognise the shard by."""
    kind = scheme(url)
    if kind == "pipe":
        return "pipe.tar"
    path = local_path(url) if kind == "file" else "".join(_parts(url)[:2]).partition("://")[2]
    return (unquote(path) if kind in _WEB else path).rstrip("/").rsplit("/", 1)[-1]


def cache_name(url: str) -> str:
    """File name in a cache: ``sha256(identity)[:16]-basename``. Equal base names of two URLs do not collide."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", basename(url))[-100:].lstrip(".-") or "shard"
    return f"{_digest(identity(url))}-{plain}"


def beside(url: str, name: str) -> str:
    """The URL of file `name` in the folder that holds `url`; a query (a signature) is for one object and is dropped.

    Raises:
        ValueError: `url` is a command, which has no folder.
    """
    if scheme(url) == "pipe":
        raise ValueError("a pipe: command has no folder")
    plain = urlunsplit((*urlsplit(url)[:3], "", "")) if scheme(url) in _WEB else url
    folder, slash, _ = plain.rpartition("/")
    return f"{folder}{slash}{name}"


def _parts(url: str) -> tuple[str, str, str]:
    """``scheme://host``, path and query. Keys in object stores may hold a ``#``; only web addresses have fragments."""
    front, _, rest = url.rpartition("::") if "::" in url else ("", "", url)
    found = _SCHEME.match(rest)
    if found is None:
        return f"{front}::", rest, ""
    kind = found.group(1).lower()
    user, at, tail = _user(rest[found.end() :])
    host, slash, path = tail.partition("/")
    # Elsewhere, what stands before the @ may be part of the name (abfs://container@account); a password never is.
    kept = f"{user}@" if at and kind not in _WEB and ":" not in user else ""
    path, _, query = path.partition("?")
    if kind in _WEB:
        path, query = path.partition("#")[0], query.partition("#")[0]
    chain = f"{front}::" if front else ""
    return f"{chain}{kind}://{kept}{host}", slash + path, query


def _user(rest: str) -> tuple[str, str, str]:
    """What stands before the host of a URL without its scheme, the ``@`` after it, and the rest.

    A password may hold slashes (those of S3 often do), which then do not end the host.
    """
    host = rest.partition("/")[0]
    _, colon, word = host.partition(":")
    if colon and "@" not in host and "@" in rest and not word.isdecimal():
        user, _, tail = rest.rpartition("@")
        return user, "@", tail
    user, at, _ = host.rpartition("@")
    return user, at, rest[len(user) + len(at) :]


def has_password(url: str) -> bool:
    """Whether a URL carries ``user:password@``."""
    if scheme(url) in ("file", "pipe"):
        return False
    rest = url.rpartition("::")[2]
    found = _SCHEME.match(rest)
    return found is not None and ":" in _user(rest[found.end() :])[0]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def scrub(text: str, url: str) -> str:
    """An error text of another library, without the secrets of `url` that it may repeat."""
    secrets = {url: show(url)}
    kind = scheme(url)
    if kind == "pipe":
        secrets[url[len("pipe:") :]] = show(url)
    elif kind != "file":
        rest = url.rpartition("::")[2].partition("://")[2]
        user = _user(rest)[0]
        user = user if kind in _WEB or ":" in user else ""
        query = rest.partition("?")[2].partition("#")[0]
        secrets |= {secret: "…" for secret in (user, user.partition(":")[2], query) if secret}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, secrets[secret])
    return text
