"""How large a record may be. Real data stays far below; what is larger is an error before memory is taken for it.

A shard is not trusted: a few kilobytes of it can ask for gigabytes (a sparse file, a picture of one colour, brackets).
Limits on pictures are :class:`scale_digrap.data.decode.ImageDecoder`'s, which may be set.
"""

from __future__ import annotations

from collections.abc import Mapping

from scale_digrap.data.errors import SampleError

JSON_BYTES = 16 << 20
"""Of a record's ``.json``; with all questions about a picture, real ones have some kilobytes."""

CLASS_BYTES = 64
"""Of a record's ``.cls``."""

IMAGE_BYTES = 256 << 20
"""Of one encoded picture."""

RECORD_BYTES = 512 << 20
"""Of all members of a record that are read or copied."""

HEADER_BYTES = 1 << 20
"""Of a member's name and other fields of a tar header."""

QUESTION_CHARACTERS = 100_000
"""Of a question: some 40 pages."""

ANSWER_CHARACTERS = 20_000
"""Of one answer."""

QUESTIONS = 100_000
"""In one record."""

ANSWERS = 10_000
"""To one question."""


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Refuse a record before it is read.

    Args:
        sizes: field → bytes, of the fields that are to be read.

    Raises:
        SampleError: over a limit, which it names.
    """
    for name, size in sizes.items():
        limit = {"json": JSON_BYTES, "cls": CLASS_BYTES}.get(name, IMAGE_BYTES)
        if size > limit:
            raise SampleError(f"its .{name} has {size:,} bytes, the limit is {limit:,}")
    if sum(sizes.values()) > RECORD_BYTES:
        raise SampleError(f"its members have {sum(sizes.values()):,} bytes together, the limit is {RECORD_BYTES:,}")
