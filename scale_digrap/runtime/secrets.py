"""Secrets stay out of logs, copies of the configuration, results and terminals.

Two things are secret: what a URL carries to prove who asks (user and password, signatures in the query), and values
whose key or variable says so (``*_TOKEN``, ``*_SECRET*``, ``password``, …).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"

_USER = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>[^/\s@?#'\"]*)@")
_QUERY = re.compile(r"(?P<key>[?&;][A-Za-z0-9_.%-]+=)(?P<value>[^&;\s#'\"]*)")
_SECRET_KEY = re.compile(
    r"(?:^|[^a-z])(?:pass(?:wd|word|phrase)?|pwd|secrets?|tokens?|api[^a-z]?keys?|access[^a-z]?keys?|account[^a-z]?keys?|"
    r"private[^a-z]?keys?|credentials?|auth|authorization|bearer|cookie|signature|sig|sas|key)(?:$|[^a-z])",
    re.IGNORECASE,
)
_PLAIN_KEYS = re.compile(
    r"(?:max|min|num|image|new|eos|bos|pad|vocab|special|stop|sort|primary|cluster|kl)[^a-z]?\w*", re.I
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def is_secret_key(key: str) -> bool:
    """Whether a key's name says that its value is secret: ``HF_TOKEN``, ``aws_secret_access_key``, ``apiKey``."""
    spaced = _CAMEL.sub("_", key)
    return _SECRET_KEY.search(spaced) is not None and _PLAIN_KEYS.fullmatch(spaced) is None


def mask(text: str) -> str:
    """Text in which every URL has lost what proves who asks.

    ``scheme://user:password@host`` loses user and password. Of a query, every value is masked: signatures have a name
    of their own in every store (``X-Amz-Signature``, ``sig``, ``token``, ``Signature``, ``GoogleAccessId``), and
    nothing in a log needs the others.
    """
    if "://" not in text:
        return text
    text = _USER.sub(lambda found: f"{found['scheme']}{MASK}@", text)
    return re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]*", lambda found: _QUERY.sub(rf"\g<key>{MASK}", found[0]), text)


def mask_tree(value: Any, key: str = "") -> Any:
    """A copy of nested plain values with every secret masked: by the key's name, and inside every string.

    Args:
        value: mappings, sequences and plain values.
        key: the name under which ``value`` stands.
    """
    if isinstance(value, Mapping):
        return {name: mask_tree(inner, str(name)) for name, inner in value.items()}
    # Numbers under names such as ``tokens`` are counts; a password may be a number.
    if isinstance(value, str) and value and is_secret_key(key):
        return MASK
    if isinstance(value, int | float) and not isinstance(value, bool) and "pass" in key.lower():
        return MASK
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [mask_tree(inner, key) for inner in value]
    return value
