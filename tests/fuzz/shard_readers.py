"""Readers of shards, their indexes and manifests, and of the files that shards are written from."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.fuzz import mutate
from tests.fuzz.cases import Files, all_of, command, put, taken

# -- shards ------------------------------------------------------------------------------------------------------------


def _png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), 20 * number, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def _shard(first: int, count: int) -> bytes:
    members: list[tuple[str, bytes]] = []
    for number in range(first, first + count):
        asked = {"question": f"number {number}", "answers": [str(number)], "question_id": number, "image_id": number}
        members.append((f"s{number:05d}.json", json.dumps(asked).encode()))
        if number % 3 == 1:
            members += [(f"s{number:05d}.0.png", _png(number)), (f"s{number:05d}.1.png", _png(number))]
        elif number % 3 == 2:
            members.append((f"s{number:05d}.png", _png(number)))
    return mutate.tar(members)


def shards(folder: Path) -> Files:
    """Two shards of three samples, not indexed."""
    return {"a-000000.tar": _shard(0, 3), "a-000001.tar": _shard(3, 3)}


def indexed(folder: Path) -> Files:
    """The same with their indexes and a manifest."""
    from scale_digrap.data.index import index_shards

    put(shards(folder), folder)
    index_shards(sorted(folder.glob("*.tar"))).save(folder / "manifest.json")
    return taken(folder)


def read_shards(folder: Path) -> None:
    """``shards validate``, ``info``, ``peek``, ``repair`` and ``index``, then the loader over what ``index`` took."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    all_of(
        lambda: command("shards", "validate", folder, "--decode"),
        lambda: command("shards", "info", folder),
        lambda: command("shards", "peek", folder, "-n", 9),
        lambda: command("shards", "repair", folder, "--to", folder / "repaired", "--drop-bad"),
        lambda: command("shards", "index", folder),
        lambda: load(folder),
    )


def load(folder: Path) -> list[tuple[str, ...]]:
    """Two epochs of the loader: (key, question, answers, pictures) of each sample."""
    from scale_digrap.data.faults import FaultPolicy
    from scale_digrap.data.loader import ShardDataset, TrainLoader

    found = []
    data = ShardDataset(str(folder), faults=FaultPolicy(retries=1))
    loader = TrainLoader(data, batch_size=2, collate=list, faults=FaultPolicy(retries=1))
    batches = iter(loader)
    for _ in range(min(6, max(1, loader.samples))):
        for sample in next(batches):
            pictures = ",".join(str(image.getpixel((0, 0))) for image in sample.images)
            found.append((sample.key, sample.question, *map(str, sample.answers), pictures))
    loader.close()
    data.close()
    return found


_EXPECTED = {
    (f"s{n:05d}", f"number {n}", str(n), ",".join([str((20 * n,) * 3)] * (0, 2, 1)[n % 3])) for n in range(6)
}  # fmt: skip


def read_indexed(folder: Path) -> None:
    """The loader over stored indexes: what it hands out is what the shards hold, whatever the indexes say."""
    from scale_digrap.data.loader import ShardDataset

    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    found = load(folder)
    assert set(found) <= _EXPECTED, f"samples that are in no shard: {set(found) - _EXPECTED}"
    data = ShardDataset(str(folder))
    assert {(sample.key, sample.question) for sample in data} == {one[:2] for one in _EXPECTED}, "samples are missing"


def read_manifest(folder: Path) -> None:
    """The manifest with the shards it is of: samples are those of the shards, or it is refused."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    command("shards", "validate", folder)
    found = load(folder)
    assert set(found) <= _EXPECTED, f"samples that are in no shard: {set(found) - _EXPECTED}"


# -- annotation files --------------------------------------------------------------------------------------------------


def annotations(folder: Path) -> Files:
    """A question or two in the form of each published set, and their pictures."""
    asked = [{"question_id": n, "image_id": n, "question": f"number {n}"} for n in (1, 2)]
    given = [
        {"question_id": n, "image_id": n, "answers": [{"answer": "a"}] * 10, "answer_type": "other"} for n in (1, 2)
    ]
    listed = [{"image": "1.png", "question": "q", "question_id": n, "answer": ["a", "b"]} for n in (1, 2)]
    text = [{"question_id": n, "image_id": "1", "question": "q", "answers": ["a"] * 10} for n in (1, 2)]
    blind = [{"image": "1.png", "question": "q", "answers": [{"answer": "a"}] * 10, "answerable": 1}]
    graph = {str(n): {"imageId": "1", "question": "q", "answer": "a", "types": {"detailed": "d"}} for n in (1, 2)}
    contents: dict[str, Any] = {
        "vqa-questions.json": {"data_subtype": "val2014", "questions": asked},
        "vqa-annotations.json": {"annotations": given},
        "lavis.json": listed,
        "textvqa.json": {"data": text},
        "vizwiz.json": blind,
        "gqa.json": graph,
    }
    files = {name: json.dumps(content).encode() for name, content in contents.items()}
    files["list.txt"] = b"a/1.png 0\nb/1.png 1\n"
    names = ("1.png", "COCO_val2014_000000000001.jpg", "COCO_val2014_000000000002.jpg", "1.jpg", "a/1.png", "b/1.png")
    return files | {f"images/{name}": _png(1) for name in names}


def read_annotations(folder: Path) -> None:
    """``shards write`` of each set, and what it wrote."""
    from scale_digrap.data.loader import ShardDataset

    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    sources = {
        "vqa": ("--questions", folder / "vqa-questions.json", "--annotations", folder / "vqa-annotations.json"),
        "gqa": ("--questions", folder / "gqa.json"),
        "image-list": (folder / "list.txt",),
        **{name: ("--annotations", folder / f"{name}.json") for name in ("lavis", "textvqa", "vizwiz")},
    }

    def write(source: str) -> None:
        out = folder / f"out-{source}"
        command("shards", "write", source, *sources[source], "--images", folder / "images", "--to", out)
        list(ShardDataset(str(out)))

    all_of(*(lambda source=source: write(source) for source in sources))  # type: ignore[misc]
