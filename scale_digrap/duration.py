"""Lengths of time as people write them."""

from __future__ import annotations

import re

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def seconds(text: str) -> int:
    """Seconds in ``3h50m``, ``90m``, ``1d12h`` or ``45s``.

    Raises:
        ValueError: anything else, and zero.
    """
    match = _DURATION.fullmatch(text.strip())
    counts = match.groups() if match else [None] * len(_UNITS)
    total = sum(int(count or 0) * unit for count, unit in zip(counts, _UNITS.values(), strict=True))
    if total <= 0:
        raise ValueError(f"{text!r} is no length of time above zero: write for example 3h50m, 90m or 45s")
    return total
