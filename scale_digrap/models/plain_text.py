"""Text from data, made plain: what a model takes for a signal must not come from a question.

Tokenizers read their control tokens wherever they stand: ``<image>`` in a question asks for a picture that is not
there, ``<|im_end|>`` ends the turn, ``</s>`` the sequence. In a question, an answer or the name of a class they are
words, and are read as words.
"""

from __future__ import annotations

import re
from typing import Any

_MEDIA = (
    "image",
    "video",
    "audio",
    "boi",
    "eoi",
    "boa",
    "eoa",
    "image_break",
    "image_end",
    "vision_start",
    "vision_end",
)
_ROUNDS = 3
_LONE = re.compile("[\ud800-\udfff]")


def control_tokens(processor: Any) -> list[str]:
    """Strings that a processor or its tokenizer does not read as text, longest first.

    Those of a single character, of letters and digits alone (a padding token ``!`` or ``pad``), and of spaces are left
    out: they cannot be told from text, and are no more than it.
    """
    tokenizer = processor.tokenizer
    found = {str(token) for token in getattr(tokenizer, "all_special_tokens", ())}
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    found |= {str(token) for token in added.values() if getattr(token, "special", False)}
    found |= set(media_tokens(processor))
    return sorted(
        (token for token in found if len(token) > 1 and not token.isalnum() and not token.isspace()),
        key=lambda token: (-len(token), token),
    )


def media_tokens(processor: Any) -> list[str]:
    """Strings that stand for a picture, a video or a sound in a prompt."""
    found = set()
    for owner in (processor, processor.tokenizer):
        for name in _MEDIA:
            token = getattr(owner, f"{name}_token", None)
            if token is not None and str(token):
                found.add(str(token))
    return sorted(found)


class PlainText:
    """Text → the same text, in which no control token of a processor stands whole, and no lone surrogate.

    A control token gets a space after its first character (``< image>``); half a character becomes U+FFFD.
    """

    def __init__(self, processor: Any) -> None:
        tokens = control_tokens(processor)
        self._pattern = re.compile("|".join(map(re.escape, tokens))) if tokens else None

    def __call__(self, text: str) -> str:
        """The text made plain; itself where it is."""
        text = _LONE.sub("\ufffd", text)
        if self._pattern is not None:
            # Taking one apart may complete another: "<im<image>age>" is not, but a token may hold a space.
            for _ in range(_ROUNDS):
                if not self._pattern.search(text):
                    return text
                text = self._pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
            text = self._pattern.sub(" ", text)
        return text
