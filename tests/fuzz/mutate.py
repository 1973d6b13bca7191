"""Seeded mutations of what lies on disk: bytes, tar headers, JSON and YAML values, log lines."""

from __future__ import annotations

import copy
import json
import random
import tarfile
from typing import Any

import yaml

ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 63, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308, 1e-320,
    float("nan"), float("inf"), "", " ", "0", "-1", "1e9", "nan", "null", "a\nb", "a\0b", "\x1b[2J", "\ud800", "é",
    "../../x", "/dev/zero", "/", "~", ".", "a/b", "$HOME", "${model.path}", "${oc.env:HOME}", "{", "%s", "x" * 5000,
    "-x", "'", '"', [], {}, [None], [[]], [0], ["x"], {"x": 1}, {"": None}, [-1, "x", None], {"a": {"b": []}},
]  # fmt: skip
ODD_NUMBERS = [b"-1", b"0", b"1e999", b"NaN", b"99999999999999999999999", b"0x10", b"null", b"01", b"9" * 5000]
TOKENS = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\n", b"\0", b"\r", b"\xff\xfe", b"\xef\xbb\xbf", b"- ", b"? ", b"&a ",
    b"*a ", b"!!python/object:os.system ", b"!!binary x", b"\t", b"#", b"---\n", b"null", b"{}", b"${", b"\xed\xa0\x80",
    b"[" * 3000, b'{"a":' * 3000,
]  # fmt: skip


def mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    """One to four things that disks, transfers and editors do to a file."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        size = len(found)
        start = chance.randrange(size + 1)
        length = min(size - start, chance.choice((1, 1, 2, 8, 100, 512, 4096)))
        what = chance.randrange(10)
        if what == 0 and length:
            found[start] ^= 1 << chance.randrange(8)
        elif what == 1:
            del found[start : start + length]
        elif what == 2:
            del found[start:]
        elif what == 3:
            found[start : start + length] = bytes(length)
        elif what == 4:
            found[start : start + length] = chance.randbytes(length)
        elif what == 5:
            found[start:start] = found[start : start + length]
        elif what == 6:
            found[start:start] = chance.choice(TOKENS)
        elif what == 7:
            _number(found, chance)
        elif what == 8:
            other = chance.randrange(size + 1)
            found[start : start + length] = found[other : other + length]
        else:
            found += chance.choice((bytes(512), b"\n", b"x", bytes(found[:512])))
    return bytes(found)


def _number(data: bytearray, chance: random.Random) -> None:
    """Replace a run of digits."""
    digits = [place for place, one in enumerate(data) if 48 <= one <= 57]
    if not digits:
        return
    start = end = chance.choice(digits)
    while start and 48 <= data[start - 1] <= 57:
        start -= 1
    while end < len(data) and 48 <= data[end] <= 57:
        end += 1
    data[start:end] = chance.choice(ODD_NUMBERS)


def mutated_tree(value: Any, chance: random.Random) -> Any:
    """A copy of nested plain values in which one to three things are other than they should be."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return chance.choice(ODD_VALUES)
        owner, key = chance.choice(places)
        what = chance.randrange(8)
        if what == 0:
            del owner[key]
        elif what == 1 and isinstance(owner, dict):
            owner[chance.choice(("", "x", str(key) + "s", "\x1b[31m", "a.b", "a\nb"))] = owner[key]
        elif what == 2:
            owner[key] = [owner[key]]
        elif what == 3:
            owner[key] = {"x": owner[key]}
        elif what == 4 and isinstance(owner[key], (int, float)) and not isinstance(owner[key], bool):
            owner[key] = chance.choice((-owner[key], owner[key] + 1, owner[key] * 10**9, str(owner[key])))
        elif what == 5:
            other, name = chance.choice(places)
            if name in other if isinstance(other, dict) else name < len(other):
                owner[key] = copy.deepcopy(other[name])
        else:
            owner[key] = copy.deepcopy(chance.choice(ODD_VALUES))
    return value


def _places(value: Any) -> Any:
    """(owner, key) of everything below a value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield value, key
            yield from _places(inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield value, index
            yield from _places(inner)


def mutated_json(data: bytes, chance: random.Random) -> bytes:
    """JSON with other values, or with damage to its bytes."""
    if chance.random() < 0.3:
        return mutated_bytes(data, chance)
    return json.dumps(mutated_tree(json.loads(data), chance)).encode("utf-8", "surrogatepass")


def mutated_lines(data: bytes, chance: random.Random) -> bytes:
    """JSON lines of which some are torn, doubled, out of order, or hold other values."""
    lines = data.splitlines(keepends=True)
    for _ in range(chance.choice((1, 1, 2))):
        place, what = chance.randrange(len(lines)), chance.randrange(7)
        if what == 0:
            lines[place] = chance.choice((b"null\n", b"{}\n", b"[]\n", b"1\n", b'"x"\n', b"\n", b"\xff\n", b"NaN\n"))
        elif what == 1:
            lines[place] = lines[place][: chance.randrange(len(lines[place]) + 1)]
        elif what == 2:
            lines.insert(place, lines[-1])
        elif what == 3:
            lines[place] = mutated_bytes(lines[place], chance)
        elif what == 4:
            chance.shuffle(lines)
        else:
            try:
                value = json.loads(lines[place])
            except ValueError:
                continue
            lines[place] = json.dumps(mutated_tree(value, chance)).encode() + b"\n"
    return b"".join(lines)


def mutated_yaml(data: bytes, chance: random.Random) -> bytes:
    """YAML with other values, or with damage to its bytes."""
    if chance.random() < 0.3:
        return mutated_bytes(data, chance)
    value = mutated_tree(yaml.safe_load(data), chance)
    try:
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:
        return json.dumps(value).encode()


def mutated_tar(data: bytes, chance: random.Random) -> bytes:
    """A tar of which one field of one header is another, half of the time with the checksum put right."""
    if chance.random() < 0.3:
        return mutated_bytes(data, chance)
    headers = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    if not headers:
        return mutated_bytes(data, chance)
    start = chance.choice(headers)
    header = bytearray(data[start : start + 512])
    # name, mode, size, mtime, checksum, type, link name, magic, device, prefix
    place, length = chance.choice(
        ((0, 100), (100, 8), (124, 12), (136, 12), (148, 8), (156, 1), (157, 100), (257, 8), (329, 16), (345, 155))
    )
    if place == 124:
        size = chance.choice((b"-1", b"0", b"1", b"77777777777", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"8", b"", b"x"))
        header[place : place + length] = size.ljust(length, b"\0")[:length]
    elif place == 156:
        header[place] = chance.choice(b"01234567xgLKSVNMDA\0\xff")
    elif place in (0, 345):
        name = chance.choice(
            (b"", b"x", b".", b"../../x.json", b"/x.json", b"a.json/", b"a" * 99, b"\xff.json", b"a\x1b[2J.json",
             b"a.b.json", b"s00001.json", b"__x__.json", b"a.999.png", b"a.00.png", b"a.cls", b"a.exe", b"._a.json")
        )  # fmt: skip
        header[place : place + length] = name.ljust(length, b"\0")[:length]
    else:
        header[place : place + length] = chance.randbytes(length)
    if chance.random() < 0.7:
        header[148:156] = b" " * 8
        total = sum(header)
        header[148:156] = b"%06o\0 " % total
    return data[:start] + bytes(header) + data[start + 512 :]


def mutated_index(data: bytes, chance: random.Random) -> bytes:
    """An index with another number in its arrays, another value in its header, or damage to its bytes."""
    from scale_digrap.data import index

    what = chance.randrange(3)
    length_at = len(index._MAGIC)
    start = length_at + index._LENGTH + index._DIGEST
    length = int(data[length_at : length_at + index._LENGTH])
    if what == 0:
        return mutated_bytes(data, chance)
    if what == 1:  # forged: its digest fits
        header = json.dumps(mutated_tree(json.loads(data[start : start + length]), chance)).encode()
        header += b" " * (-(start + len(header)) % 8)
        sizes = str(len(header)).rjust(index._LENGTH).encode()
        return data[:length_at] + sizes + index._digest(header) + header + data[start + length :]
    place = chance.randrange((start + length) // 4, len(data) // 4) * 4
    number = chance.choice((0, 1, 2, 3, 512, 2**31 - 1, -1, -(2**31)))
    return data[:place] + number.to_bytes(4, "little", signed=True) + data[place + 4 :]


def tar(members: list[tuple[str, bytes]]) -> bytes:
    """A plain archive, for templates."""
    import io

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()
