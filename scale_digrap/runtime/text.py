"""Text and JSON from outside: UTF-8 with or without a byte order mark, finite numbers, bounded size and depth.

Every file that a person or another program wrote is read through here, so that a BOM, ``NaN``, a lone surrogate or a
nested bomb means the same everywhere: one error that names the file, never a wrong value.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from scale_digrap.errors import ScaleDigrapError

MAX_TEXT_BYTES = 1 << 30
"""Largest text file that is read whole: annotation files of the public suites reach some hundred MB."""

MAX_JSON_DEPTH = 64
"""Deepest nesting of JSON from outside; real files use less than ten levels."""

_UNFIT = frozenset("\ufeff\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_PIECE = 1 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")
# A string without an end goes to the end of the text: were it no match, every quote in it would be tried anew.
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)


class TextError(ScaleDigrapError, ValueError):
    """Text from outside that cannot be used: names the file, the place and the reason."""


def decode(data: bytes, name: str) -> str:
    """Text of UTF-8 bytes; a leading byte order mark is dropped.

    Args:
        data: the bytes.
        name: what they are, for the error.

    Raises:
        TextError: not UTF-8.
    """
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        hint = "; it looks like UTF-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ""
        raise TextError(
            f"{name} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}{hint}. Save it as UTF-8"
        ) from None


def read_text(path: str | os.PathLike[str], limit: int = MAX_TEXT_BYTES) -> str:
    """The text of a file, UTF-8 with or without a byte order mark.

    Raises:
        TextError: it cannot be opened, is larger than ``limit`` bytes, or is not UTF-8.
    """
    return decode(read_bytes(path, limit), str(path))


def read_bytes(path: str | os.PathLike[str], limit: int = MAX_TEXT_BYTES) -> bytes:
    """The bytes of a file, of which no more than ``limit`` are ever held.

    Raises:
        TextError: it cannot be opened or is larger.
    """
    try:
        with open(path, "rb") as file:
            data = read_at_most(file, limit)
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) > limit:
        raise TextError(f"{path} is larger than {limit:,} bytes, the most that is read of such a file")
    return data


def read_at_most(file: BinaryIO, limit: int) -> bytes:
    """The rest of a file, or ``limit`` + 1 bytes of it where it is longer.

    In pieces: ``file.read(limit + 1)`` asks for that much memory before it knows how long the file is.
    """
    parts, left = [], limit + 1
    while left and (part := file.read(min(left, _PIECE))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def parse_json(data: bytes | str, name: str, *, depth: int = MAX_JSON_DEPTH, finite: bool = True) -> Any:
    """The value of JSON from outside.

    Args:
        data: the document; bytes are UTF-8 with or without a byte order mark.
        name: what it is, for the error.
        depth: deepest nesting that is accepted.
        finite: refuse numbers that are not finite. A caller that lets them through looks for them itself, to say in
            which entry they stand.

    Raises:
        TextError: not UTF-8, not JSON, a number that is not finite (``NaN``, ``Infinity``, ``1e999``), or nested
            deeper than ``depth``.
    """
    text = decode(data, name) if isinstance(data, bytes) else data.removeprefix("\ufeff")
    if _deeper_than(text, depth):
        raise TextError(f"{name} is nested deeper than {depth} levels")
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite) if finite else json.loads(text)
    except json.JSONDecodeError as error:
        raise TextError(f"{name} is not JSON: {error}") from None
    except (ValueError, RecursionError) as error:  # ValueError: an integer of over 4,300 digits, or _refuse
        raise TextError(f"{name}: {error}") from None


def read_json(path: str | os.PathLike[str], limit: int = MAX_TEXT_BYTES, *, finite: bool = True) -> Any:
    """The value of a JSON file, under the rules of :func:`parse_json`.

    Raises:
        TextError: it cannot be read, or breaks one of the rules.
    """
    return parse_json(read_bytes(path, limit), str(path), finite=finite)


def write_json(value: Any, **options: Any) -> str:
    """JSON that every reader takes: ASCII by default, numbers finite.

    Raises:
        ValueError: a number is not finite.
    """
    return json.dumps(value, allow_nan=False, **options)


def finite(value: Any) -> Any:
    """A copy of nested plain values that JSON can hold: a number that is not finite, which JSON has no word for, is
    ``None``; keys are text."""
    if isinstance(value, Mapping):
        return {str(name): finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def has_surrogates(text: str) -> bool:
    """Whether a string holds lone surrogates, which no UTF-8 file and no tokenizer takes."""
    return _SURROGATE.search(text) is not None


def printable(text: str) -> str:
    """Text that is safe on a terminal, in a log and in a UTF-8 file.

    Control characters, terminal escapes and lone surrogates become backslash escapes; newlines stay.
    """
    return "".join(
        one if one == "\n" or one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text
    )


def unfit(text: str) -> str | None:
    """What in a string does not belong into a name, a path or a line of a script, or ``None``: control characters
    (line breaks among them), lone surrogates, what separates lines or turns the direction of text."""
    for one in text:
        if unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") or one in _UNFIT or ord(one) & 0xFFFE == 0xFFFE:
            name = {"\n": "a line break", "\r": "a carriage return", "\t": "a tab", "\0": "a NUL byte"}.get(one)
            return name or f"the control character {one.encode('unicode_escape').decode('ascii')}"
    return None


def one_line(error: BaseException | str, limit: int = 500) -> str:
    """An error's text on one printable line: ``Type: message`` where the message alone says too little."""
    if isinstance(error, str):
        text = error
    elif isinstance(error, ScaleDigrapError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    line = printable(" ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a finite number; JSON has no such value")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{digits} is not a finite number")
    return value


def _deeper_than(text: str, limit: int) -> bool:
    # Counted before parsing: the parser itself recurses. Few brackets cannot nest deeply, which spares the scan.
    if text.count("[") + text.count("{") <= limit:
        return False
    depth = 0
    for match in _BRACKETS.finditer(text):
        token = match.group()
        if token in "[{":
            depth += 1
            if depth > limit:
                return True
        elif token in "]}":
            depth -= 1
    return False


def home(path: str) -> str:
    """A path of a person's with ``~`` and ``~user`` expanded; URLs and other text stay as they are.

    Raises:
        TextError: nobody knows whose home is meant: ``HOME`` is not set, or there is no such user.
    """
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        raise TextError(
            f"{path}: no home folder is known for {path.split('/')[0]!r} (HOME is not set, or no such user): write the "
            "whole path"
        ) from None
