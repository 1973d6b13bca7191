from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from scale_digrap.runtime.text import TextError
from scale_digrap.runtime.typed import fits, structured


@dataclass(frozen=True)
class Thing:
    name: str
    kind: Literal["a", "b"]
    size: float = 0.0
    count: int | None = None
    tags: tuple[str, ...] = ()
    more: dict[str, dict[str, float | None]] = field(default_factory=dict)
    free: Any = None


def test_an_object_of_the_right_types():
    data = {"name": "x", "kind": "a", "size": 2, "count": None, "tags": ["t"], "more": {"l": {"d": None}}, "free": [1]}
    assert structured(Thing, data, "it") == Thing("x", "a", 2, None, ("t",), {"l": {"d": None}}, [1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": {"x": 1}}, "it: name is {'x': 1}, expected str"),
        ({"name": "\ud800"}, "it: name is '\\ud800', expected str"),
        ({"kind": "c"}, "it: kind is 'c', expected Literal['a', 'b']"),
        ({"kind": []}, "it: kind is [], expected Literal['a', 'b']"),
        ({"size": True}, "it: size is True, expected float"),
        ({"size": float("nan")}, "it: size is nan, expected float"),
        ({"count": 1.5}, "it: count is 1.5, expected int | None"),
        ({"tags": ["t", 1]}, "it: tags is ['t', 1], expected tuple[str, ...]"),
        ({"more": {"l": {"d": "x"}}}, "it: more is {'l': {'d': 'x'}}, expected dict[str, dict[str, float | None]]"),
        ({"nam": 1}, "it has an unknown key 'nam'; known are name, kind, size, count, tags, more, free"),
    ],
)
def test_a_value_of_another_type_is_named(change, message):
    with pytest.raises(TextError) as raised:
        structured(Thing, {"name": "x", "kind": "a", **change}, "it")
    assert str(raised.value) == message


def test_what_is_missing_is_named():
    with pytest.raises(TextError, match="it has no 'kind'"):
        structured(Thing, {"name": "x"}, "it")
    with pytest.raises(TextError, match=r"it is \[\], expected an object"):
        structured(Thing, [], "it")


def test_numbers_beyond_floats_do_not_overflow():
    assert fits(10**400, int)
    assert fits(10**400, float)  # compared, not converted
