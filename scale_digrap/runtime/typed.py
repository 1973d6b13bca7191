"""Objects of dataclasses out of JSON that somebody may have edited: every value is of the type that its field says."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from scale_digrap.runtime.text import TextError, has_surrogates

T = TypeVar("T")
_SHOWN = 60


def structured(kind: type[T], data: Any, name: str) -> T:
    """An object of a dataclass from a mapping.

    Args:
        kind: the dataclass; its fields are of plain types, of ``list``, ``tuple[X, ...]``, ``dict``, ``Literal`` and
            unions of these.
        data: field → value, as :func:`scale_digrap.runtime.text.parse_json` gives it; a list stands for a tuple.
        name: what it is, for the error.

    Raises:
        TextError: not a mapping, a field that is unknown, missing or of another type.
        ScaleDigrapError: what the dataclass itself refuses.
    """
    if not isinstance(data, Mapping):
        raise TextError(f"{name} is {_shown(data)}, expected an object")
    hints = _hints(kind)  # type: ignore[arg-type]
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    for key, value in data.items():
        if key not in fields:
            raise TextError(f"{name} has an unknown key {key!r}; known are {', '.join(fields)}")
        if not fits(value, hints[key]):
            raise TextError(f"{name}: {key} is {_shown(value)}, expected {_told(hints[key])}")
    nothing = dataclasses.MISSING
    missing = [key for key, one in fields.items() if one.default is nothing is one.default_factory and key not in data]
    if missing:
        raise TextError(f"{name} has no {missing[0]!r}")
    return kind(**{key: _tuples(value, hints[key]) for key, value in data.items()})


def fits(value: Any, kind: Any) -> bool:
    """Whether a value from JSON is of a type; integers are floats too, and floats are finite."""
    if kind is Any:
        return True
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return isinstance(value, str | int) and value in inner
    if origin is list:
        return isinstance(value, list) and all(fits(one, inner[0]) for one in value)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(fits(one, inner[0]) for one in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if kind in (None, type(None)):
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is str:
        return isinstance(value, str) and not has_surrogates(value)
    return isinstance(value, kind)


def _tuples(value: Any, kind: Any) -> Any:
    return tuple(value) if get_origin(kind) is tuple and isinstance(value, list) else value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _told(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
