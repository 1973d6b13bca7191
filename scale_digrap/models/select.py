"""Choosing parameters and modules by regular expression; a pattern that matches nothing is an error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from torch import nn

from scale_digrap.errors import ScaleDigrapError


class SelectionError(ScaleDigrapError):
    """A pattern without a match, or a selection that leaves nothing to train."""


def match_names(patterns: Sequence[str], names: Iterable[str], *, key: str, full: bool = False) -> list[str]:
    """The names that any pattern matches, in their own order.

    Args:
        patterns: regular expressions.
        names: what there is to choose from.
        key: the configuration key of the patterns, for the message.
        full: the whole name must match (``re.fullmatch``); otherwise a part is enough (``re.search``).

    Raises:
        SelectionError: a pattern that matches no name; the message lists near names.
    """
    names = list(names)
    chosen: set[str] = set()
    for pattern in patterns:
        test = re.compile(pattern).fullmatch if full else re.compile(pattern).search
        found = [name for name in names if test(name)]
        if not found:
            raise SelectionError(f"{key}: {pattern!r} matches nothing{_near(pattern, names)}")
        chosen.update(found)
    return [name for name in names if name in chosen]


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Stop training the parameters that match (``model.freeze``); returns their names.

    Raises:
        SelectionError: a pattern without a match, or nothing left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen = match_names(patterns, names, key="model.freeze")
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SelectionError(f"model.freeze={list(patterns)} leaves nothing to train")
    return frozen


def _near(pattern: str, names: Sequence[str], count: int = 3) -> str:
    """Names like the pattern, compared part by part: full names are long, and differ from a pattern by their length."""
    words = re.sub(r"[\\^$.*+?()\[\]{}|]+", " ", pattern).split()
    parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    whole = {piece: part for part in parts for piece in (*part.split("_"), part)}
    close = [whole[near] for word in words for near in difflib.get_close_matches(word, whole, n=count, cutoff=0.6)]
    if close:
        return f"; names contain {', '.join(dict.fromkeys(close))}"
    return f"; names are like {', '.join(names[:count])}" if names else ""
