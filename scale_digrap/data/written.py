"""What a call that writes shards was asked to do, and what it has done."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from scale_digrap.data.shards import ShardWriteError
from scale_digrap.runtime.text import write_json


@dataclass(frozen=True)
class WriteOptions:
    """How to write.

    Attributes:
        max_count: records in a shard at most; None: no limit.
        max_size: bytes of a shard at most; None: no limit.
        shuffle_seed: of the permutation of all records; None keeps the source's order.
        resize: pixels that the side named by `resize_side` is reduced to; None stores files untouched. Smaller pictures
            are stored untouched too.
        resize_side: ``shortest`` or ``longest``.
        quality: of JPEG and WebP pictures that were resized.
        verify: decode every picture before it is stored.
        allow_missing: pictures that may be missing or unreadable; their records are left out, counted and listed.
        prefix: start of the shards' names.
    """

    max_count: int | None = None
    max_size: int | None = 256 << 20
    shuffle_seed: int | None = 0
    resize: int | None = None
    resize_side: str = "shortest"
    quality: int = 95
    verify: bool = False
    allow_missing: int = 0
    prefix: str = "shard"

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            ShardWriteError: naming the option.
        """
        for name in ("max_count", "max_size", "resize"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ShardWriteError(f"{name} must be at least 1, got {value}")
        if self.resize_side not in ("shortest", "longest"):
            raise ShardWriteError(f"resize_side must be 'shortest' or 'longest', got {self.resize_side!r}")
        if not 1 <= self.quality <= 100:
            raise ShardWriteError(f"quality must be in [1, 100], got {self.quality}")
        if self.allow_missing < 0 or (self.shuffle_seed or 0) < 0:
            raise ShardWriteError("allow_missing and the seed of the shuffle must not be negative")
        if not self.prefix or "/" in self.prefix or self.prefix.startswith("."):
            raise ShardWriteError(f"prefix must be the start of a file name, got {self.prefix!r}")


@dataclass
class Written:
    """What a folder of shards holds, and what was left out: {key, image, reason} of each such record."""

    source: str
    fingerprint: str
    options: dict[str, Any]
    shards: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    resumed: int = 0
    """Shards that an earlier, interrupted call had finished; 0 in the file."""

    @property
    def records(self) -> int:
        return sum(shard["records"] for shard in self.shards)

    @property
    def samples(self) -> int:
        """Questions."""
        return sum(shard["samples"] for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard["bytes"] for shard in self.shards)

    def save(self, path: Path) -> None:
        """Write as JSON; the file is replaced whole or not at all."""
        content = asdict(self)
        del content["resumed"]
        unfinished = path.with_suffix(".tmp")
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(write_json(content, indent=1))  # ASCII: names of files need not be UTF-8
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: Path) -> Written | None:
        """What `save` wrote; None if there is no such file, or another one of that name."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{one.name: content[one.name] for one in fields(cls) if one.name != "resumed"})
        except (OSError, ValueError, KeyError, TypeError):
            return None
