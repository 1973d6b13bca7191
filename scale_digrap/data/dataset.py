"""Random access to the samples of shards: one read per sample, wherever it lies."""

from __future__ import annotations

import hashlib
import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from scale_digrap.data import limits
from scale_digrap.data.decode import ImageDecoder
from scale_digrap.data.descriptors import OPEN_SHARDS
from scale_digrap.data.errors import DataError, ReadError, SampleError, ShardDamage
from scale_digrap.data.faults import FaultPolicy, retry
from scale_digrap.data.fields import field_order, is_image
from scale_digrap.data.index import (
    Manifest,
    ShardEntry,
    check_distinct,
    hash_shard,
    load_index,
)
from scale_digrap.data.sample import VqaSample, check_text, parse_class, parse_json, parse_record
from scale_digrap.data.scan import ShardIndex
from scale_digrap.data.store import ShardStore
from scale_digrap.data.urls import basename, beside, is_local, scheme, show

_HEADER = 512
_GAP = 1 << 16
_SMALLEST_QUESTION = 40
_CHANGED = "its samples have changed since the data set was opened or indexed"

log = logging.getLogger(__name__)


class ShardDataset(torch.utils.data.Dataset[VqaSample]):
    """The samples of tar shards, in shard order; ``dataset[i]`` is a :class:`VqaSample` with its images decoded.

    Opening it reads the manifest beside the shards and the stored indexes; what has none is indexed now.

    Args:
        urls: paths, globs, brace patterns, folders, ``manifest.json`` files or URLs; see :meth:`ShardStore.expand`.
        store: where shards come from; by default local ones only.
        cache_dir: for indexes of shards that lie in read-only places.
        classes: names of the class numbers in ``.cls`` fields; by default those of the manifest.
        class_question: the question that a sample has which is only an image and a class.
        decoder: of images.
        faults: how often a failed read is retried.

    Raises:
        DataError: missing shards, two with the same samples, a shard that is not what the manifest says.
        ShardDamage: see :func:`scale_digrap.data.index.scan_shard`.
    """

    def __init__(
        self,
        urls: str | Path | Sequence[str | Path],
        *,
        store: ShardStore | None = None,
        cache_dir: Path | None = None,
        classes: Sequence[str] | None = None,
        class_question: str = "What is in the picture?",
        decoder: ImageDecoder | None = None,
        faults: FaultPolicy | None = None,
    ) -> None:
        self.store = ShardStore() if store is None else store
        self.cache_dir = cache_dir
        self.decoder = ImageDecoder() if decoder is None else decoder
        self.faults = FaultPolicy() if faults is None else faults
        self.class_question = class_question
        self.urls = self.store.expand(urls)
        self._names = [show(url) for url in self.urls]
        self.remote = not all(is_local(url) for url in self.urls)
        self._owner = object()  # of its entries among the open shards of this process
        self._said: set[str] = set()
        self._lines: dict[int, ShardEntry] = {}
        manifests = self._manifests()
        listed = [name for manifest in manifests for name in manifest.classes or ()]
        self.classes = list(classes) if classes is not None else listed or None
        self.entries = [self._entry(number) for number in range(len(self.urls))]
        check_distinct(self.entries, self._sha256)
        self.counts = np.array([entry.samples for entry in self.entries], dtype=np.int64)
        """Samples of every shard."""
        self._ends: list[int] = np.cumsum(self.counts).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> VqaSample:
        return self.sample(*self.place(index))

    def place(self, index: int) -> tuple[int, int]:
        """(shard, sample in the shard) of a sample in shard order."""
        index = range(len(self))[index]
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def sample(self, shard: int, number: int) -> VqaSample:
        """Sample ``number`` of a shard.

        Raises:
            SampleError: it cannot be decoded.
            ShardDamage: the shard has changed since it was indexed.
            ReadError: storage keeps failing.
        """
        opened = self._open(shard)
        try:
            return self._decode(opened, *opened.record(number))
        except SampleError as error:
            raise SampleError(f"{self.name(shard)}: sample {opened.key(number)!r}: {error}") from None

    def questions(self, shard: int) -> Iterator[dict[str, Any] | SampleError]:
        """What every sample of a shard carries besides its images (``question``, ``answers``, ``question_id``, …), in
        order; images are not read. In place of a record that is not valid comes the error."""
        opened = self._open(shard)
        for record, key in enumerate(opened.index.keys):
            try:
                meta = self._meta(opened.read(record, images=False))
            except SampleError as error:
                yield SampleError(f"{self.name(shard)}: record {key!r}: {error}")
                continue
            for asked in meta.pop("questions", None) or [{}]:
                try:
                    check_text({**meta, **asked})
                except SampleError as error:
                    yield SampleError(f"{self.name(shard)}: record {key!r}: {error}")
                else:
                    yield {**meta, **asked}

    def line(self, shard: int) -> ShardEntry | None:
        """What the manifest beside the shards says of a shard, if there is one."""
        return self._lines.get(shard)

    def name(self, shard: int) -> str:
        """Path or URL of a shard, for messages."""
        return self._names[shard]

    def key(self, shard: int, number: int) -> str:
        """The key of sample ``number`` of a shard."""
        return self._open(shard).key(number)

    @property
    def paths(self) -> list[Path]:
        """Local paths of all shards; remote ones are fetched."""
        return [self.store.path(url, entry) for url, entry in zip(self.urls, self.entries, strict=True)]

    @property
    def keys(self) -> list[str]:
        """The keys of all samples, in order."""
        shards = enumerate(self.counts.tolist())
        return [self.key(shard, number) for shard, count in shards for number in range(count)]

    def fingerprint(self) -> str:
        """Changes when the samples or their order change; not when the files move or are renamed."""
        digest = hashlib.blake2b(digest_size=12)
        for entry in self.entries:
            digest.update(entry.layout.encode() + b"\0")
        return digest.hexdigest()

    def close(self) -> None:
        """Close the shards; they open again on the next access."""
        OPEN_SHARDS.drop(self._owner)

    def __del__(self) -> None:
        if getattr(self, "_owner", None) is not None:
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_owner"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _owner=object())

    # Opening

    def _manifests(self) -> list[Manifest]:
        """Those beside the shards, one per folder; also notes the line of every shard that is in one."""
        manifests: dict[str, Manifest | None] = {}
        lines: dict[str, dict[str, ShardEntry]] = {}
        for number, url in enumerate(self.urls):
            if scheme(url) == "pipe":
                continue
            folder = beside(url, "")
            if folder not in manifests:
                manifests[folder] = manifest = self.store.manifest(url)
                lines[folder] = {entry.name: entry for entry in manifest.shards} if manifest else {}
            line = lines[folder].get(basename(url))
            if line is not None:
                self._lines[number] = line
        return [manifest for manifest in manifests.values() if manifest is not None]

    def _entry(self, number: int) -> ShardEntry:
        url, line = self.urls[number], self._lines.get(number)
        if line is not None:
            if is_local(url):
                self.store.path(url, line)  # compares the size
            # A question takes more than this in JSON; a false number would be believed until memory runs out.
            if not 0 <= line.samples <= line.bytes // _SMALLEST_QUESTION or line.bytes >= 1 << 62:
                raise ShardDamage(
                    show(url),
                    None,
                    f"its manifest says {line.samples} samples in {line.bytes} bytes, which cannot be: index the "
                    "folder again",
                )
            # What a manifest says is compared when a shard is opened; the first one now, because what is wrong with a
            # set (made by other rules, rewritten since) is most often wrong with all of it.
            if line.layout and (number or not is_local(url)):
                return line
        index = OPEN_SHARDS.retry(lambda: self._index(number, line))
        if line is not None and line.samples != index.samples:
            raise ShardDamage(
                show(url),
                None,
                f"has {index.samples} samples, its manifest says {line.samples}: index the folder again",
            )
        if line is not None and line.layout:
            if index.layout != line.layout:
                raise ShardDamage(show(url), None, _CHANGED)
            return line
        sha256 = index.sha256 if line is None else line.sha256
        return ShardEntry(basename(url), index.size, index.samples, sha256, index.layout)

    def _index(self, number: int, line: ShardEntry | None) -> ShardIndex:
        url = self.urls[number]
        path = self.store.path(url, line)
        if is_local(url):
            return load_index(path, cache_dir=self.cache_dir)
        # The store has compared the checksum, so an index survives that a shard is fetched anew.
        cache = self.store.cache.index_folder if self.store.cache is not None else self.cache_dir
        return load_index(path, cache_dir=cache, beside=False, sha256=line.sha256 if line else "")

    def _sha256(self, number: int) -> str:
        index = self._index(number, self._lines.get(number))
        return hash_shard(self.store.path(self.urls[number], self._lines.get(number)), index).sha256

    def _open(self, shard: int) -> _OpenShard:
        opened: _OpenShard | None = OPEN_SHARDS.get(self._owner, shard)
        if opened is None:
            opened = OPEN_SHARDS.put(self._owner, shard, lambda: self._opened(shard))
        return opened

    def _opened(self, shard: int) -> _OpenShard:
        entry = self.entries[shard]
        index = self._index(shard, self._lines.get(shard))
        if index.layout != entry.layout:
            raise ShardDamage(self.name(shard), None, _CHANGED)
        if index.samples != entry.samples:
            raise ShardDamage(
                self.name(shard),
                None,
                f"has {index.samples} samples, its manifest says {entry.samples}: index the folder again",
            )
        self._say_unread(index)
        return _OpenShard(
            self.name(shard), self.store.path(self.urls[shard], self._lines.get(shard)), index, self.faults
        )

    def _say_unread(self, index: ShardIndex) -> None:
        """Say once what lies in the shards and no loader reads: among several processes, the first one does."""
        worker = torch.utils.data.get_worker_info()
        new = [name for name in index.unread if name not in self._said]
        if new and (worker is None or worker.id == 0):
            log.warning(
                "%s: members that are not read: %s (said once for each kind; `scale-digrap shards validate` counts)",
                show(index.name),
                ", ".join(f".{name}" for name in new),
            )
        self._said.update(new)

    # Decoding

    def _decode(self, opened: _OpenShard, record: int, question: int | None) -> VqaSample:
        data = opened.read(record)
        meta = self._meta(data)
        key = data.key
        if question is not None:
            key = f"{key}#{question}"
            asked = meta.pop("questions")[question]
            meta = {**meta, **asked}
        else:
            grouped = meta.pop("questions", None)
            if grouped:
                meta = {**meta, **grouped[0]}
        check_text(meta)
        images = decode_all(self.decoder, data.images)
        return VqaSample(
            key=key,
            image=images[0] if images else None,
            question=meta.pop("question"),
            answers=meta.pop("answers"),
            question_id=str(meta.pop("question_id")),
            extra=meta,
            more_images=images[1:],
        )

    def _meta(self, data: _Record) -> dict[str, Any]:
        """The JSON of a record; for an image with a class and nothing else, a question and the class's name."""
        if data.cls is None:
            return parse_record(data.json or b"")
        if data.json is not None and {"question", "questions"} & parse_json(data.json).keys():
            return parse_record(data.json)
        if self.classes is None:
            raise DataError(
                "the shards hold class numbers (.cls) and no questions: name the classes, in the manifest or in the "
                "configuration (data.classes)"
            )
        number = parse_class(data.cls)
        if number >= len(self.classes):
            raise SampleError(f"its .cls is {number}, there are {len(self.classes)} classes")
        own = parse_json(data.json) if data.json is not None else {}
        named = {"question": self.class_question, "answers": [self.classes[number]], "question_id": data.key}
        return {"class": number, **own, **named}


def decode_all(decoder: Callable[[bytes], Any], images: Sequence[bytes]) -> list[Image.Image | bytes]:
    """The pictures of a record, after a look at what all of them would take."""
    if isinstance(decoder, ImageDecoder):
        decoder.check(images)
    return [decoder(image) for image in images]


@dataclass
class _Record:
    """The fields of a record as they are stored."""

    key: str
    json: bytes | None
    cls: bytes | None
    images: list[bytes]


class _OpenShard:
    """A shard's index with its file descriptor, which belongs to one process: pread has no shared position."""

    def __init__(self, name: str, path: Path, index: ShardIndex, faults: FaultPolicy) -> None:
        self.name, self.path, self.index, self.faults = name, path, index, faults
        # The columns that are read, in the order of the images; others (a pickle, say) are never even read.
        wanted = sorted((name for name in index.fields if name in ("json", "cls") or is_image(name)), key=field_order)
        self._wanted = [(field, index.fields.index(field)) for field in wanted]
        grouped = len(index.questions) > 0 and int(index.questions.max()) > 1
        self._ends: list[int] | None = np.cumsum(index.questions).tolist() if grouped else None
        self._descriptor: int | None = None

    def record(self, number: int) -> tuple[int, int | None]:
        """(record, question in it) of a sample; None where the record is one sample."""
        if self._ends is None:
            return number, None
        record = bisect_right(self._ends, number)
        count = int(self.index.questions[record])
        return record, (number - self._ends[record] + count if count > 1 else None)

    def key(self, number: int) -> str:
        record, question = self.record(number)
        key = self.index.keys[record]
        return key if question is None else f"{key}#{question}"

    def read(self, record: int, *, images: bool = True) -> _Record:
        key, spans = self.index.keys[record], self.index.spans[record].tolist()
        wanted = self._wanted if images else [item for item in self._wanted if item[0] in ("json", "cls")]
        parts = [(field, *spans[column]) for field, column in wanted if spans[column][1] >= 0]
        if not parts:
            raise ShardDamage(self.name, None, f"record {key!r} has no field that can be read")
        limits.check_sizes({field: size for field, _, size in parts})
        low = min(offset for _, offset, _ in parts) - _HEADER
        high = max(offset + size for _, offset, size in parts)
        found = _Record(key, None, None, [])
        # Members of a record lie together: one read, unless there is something large between them.
        whole = None
        if high - low <= sum(size + _HEADER for _, _, size in parts) + _GAP:
            whole = self._bytes(low, high - low)
        for field, offset, size in parts:
            block = self._bytes(offset - _HEADER, size + _HEADER) if whole is None else None
            start = offset - _HEADER - low if block is None else 0
            source = whole if block is None else block
            assert source is not None
            self._check_header(source[start : start + 100], f"{key}.{field}", offset - _HEADER)
            data = source[start + _HEADER : start + _HEADER + size]
            if field == "json":
                found.json = data
            elif field == "cls":
                found.cls = data
            else:
                found.images.append(data)
        return found

    def _check_header(self, stored: bytes, expected: str, offset: int) -> None:
        """The member's own name, in front of its data: an index of another file would pair wrong images and answers."""
        if len(expected) < 100 and expected.isascii():
            name = stored.rstrip(b"\0").decode("ascii", "replace")
            if name.lower() != expected.lower():
                raise ShardDamage(
                    self.name,
                    offset,
                    f"expected member {expected!r}, found {name[:100]!r}: changed since it was indexed",
                )

    def _bytes(self, offset: int, size: int) -> bytes:
        try:
            data = retry(
                lambda: self._pread(size, offset),
                retries=self.faults.retries,
                backoff_s=self.faults.backoff_s,
                again=self.close,
            )
        except OSError as error:
            raise ReadError(
                f"{self.name}: cannot be read at byte {offset}, after {self.faults.retries} retries: {error.strerror}"
            ) from None
        if len(data) != size:
            raise ShardDamage(self.name, offset, "has become shorter since it was indexed")
        return data

    def _pread(self, size: int, offset: int) -> bytes:
        if self._descriptor is None:
            self._descriptor = OPEN_SHARDS.retry(lambda: os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        return os.pread(self._descriptor, size, offset)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.close()
