"""Text and JSON from outside: one set of rules."""

from __future__ import annotations

import io
import json
import math
import time

import pytest

from scale_digrap.runtime import text
from scale_digrap.runtime.text import TextError, read_at_most, read_bytes


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, bom):
    path = tmp_path / "classes.txt"
    path.write_bytes(bom + "tür\nhaus\n".encode())
    assert text.read_text(path).split() == ["tür", "haus"]
    path.write_bytes(bom + b'{"a": [1, 2.5e3, "x"]}')
    assert text.read_json(path) == {"a": [1, 2500.0, "x"]}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'{"a": NaN}', "NaN"),
        (b"[Infinity]", "Infinity"),
        (b"[-Infinity]", "Infinity"),
        (b"[1e999]", "1e999"),
        (b"[" * 100_000 + b"]" * 100_000, "deeper than 64"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "deeper than 64"),
        (b"\xff\xfe{\x00}\x00", "UTF-16"),
        (b'"\xe9"', "offset 1"),
        (b"{", "not JSON"),
        (b"1" * 5000, "digits"),
    ],
)
def test_what_is_no_plain_value_is_refused_by_name(data, why):
    with pytest.raises(TextError, match=why) as caught:
        text.parse_json(data, "some/file.json")
    assert "some/file.json" in str(caught.value)


def test_brackets_in_strings_do_not_nest():
    value = {"question": "[" * 500 + '\\"{'}
    assert text.parse_json(json.dumps(value), "x") == value


def test_a_file_above_the_limit_is_not_read(tmp_path):
    path = tmp_path / "big"
    with open(path, "wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(TextError, match=r"larger than 1,000 bytes"):
        text.read_text(path, limit=1000)


def test_printable_text_and_lines():
    assert text.printable("a\x1b[31mb\ud83d\nü😀") == "a\\x1b[31mb\\ud83d\nü😀"
    assert text.one_line(ValueError("a\n  b\x07")) == "ValueError: a b\\x07"
    assert len(text.one_line("x" * 1000)) == 500
    assert text.has_surrogates("a\ud83d")
    assert not text.has_surrogates("😀")


def test_an_unfinished_string_of_escapes_is_refused_in_linear_time():
    data = b"[" * 65 + b'"' + b'\\"' * 500_000
    start = time.monotonic()
    with pytest.raises(text.TextError, match="deeper than 64"):
        text.parse_json(data, "x")
    with pytest.raises(text.TextError, match="is not JSON"):
        text.parse_json(b"[]," * 65 + b'"' + b'\\"' * 500_000, "x")
    assert time.monotonic() - start < 5


def test_numbers_that_are_not_finite_pass_where_the_caller_looks_for_them():
    assert math.isnan(text.parse_json(b"[NaN]", "x", finite=False)[0])


def test_a_limit_is_no_request_for_memory(tmp_path):
    path = tmp_path / "small"
    path.write_bytes(b"x" * 5)
    asked = []

    class Counting(io.BytesIO):
        def read(self, size: int = -1, /) -> bytes:
            asked.append(size)
            return super().read(size)

    assert read_at_most(Counting(b"x" * 5), 1 << 40) == b"x" * 5
    assert max(asked) <= 1 << 20
    assert read_at_most(io.BytesIO(b"x" * 9), 5) == b"x" * 6  # one more tells that it is longer
    with pytest.raises(TextError, match="larger than 4 bytes"):
        read_bytes(path, 4)
    assert read_bytes(path, 5) == b"x" * 5
