"""Pictures with class labels: a folder per class, or lists of ``path label`` lines as DomainNet publishes them.

A record has the class number (``.cls``) and the same as a question (``.json``): what is in the image, answered by the
class's name. An image classifier reads the one, a vision-language model the other.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scale_digrap.data.errors import SampleError
from scale_digrap.data.sample import check_text
from scale_digrap.data.shards import ShardWriteError, encode_json
from scale_digrap.data.sidecars import is_sidecar
from scale_digrap.data.sources.records import Record, Source, printed, unique_keys
from scale_digrap.runtime import text

QUESTION = "what is in the image"
"""DiGraP's (Huang et al., 2024) DomainNet-oVQA asks this."""

_EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}  # torchvision's ImageFolder
    | {".jpe", ".jfif", ".jif", ".gif"}
)


def read_image_folder(folder: str | Path, *, question: str = QUESTION, classes: str | Path | None = None) -> Source:
    """``FOLDER/CLASS/…/picture.jpg``; classes are numbered in the order of their sorted folder names, and links to
    folders are followed, as `torchvision.datasets.ImageFolder` does. Hidden folders and files, and what systems leave
    behind, are left out; what is left out is counted in `Source.notes`.

    Args:
        folder: holds one folder per class; pictures may lie deeper in it.
        question: of every sample.
        classes: file with one folder name per line, in the order of their numbers, instead of the sorted ones.

    Raises:
        ShardWriteError: no such folder, no classes, a class without pictures or without a number, or whose name is not
            UTF-8.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ShardWriteError(f"no such image folder: {root}")
    left = _LeftOut()
    present = []
    for path in sorted(root.iterdir()):
        if not path.is_dir():
            left.file(path.name, "outside of any class")
        elif _is_hidden(path.name):
            left.add("hidden folders", path.name)
        elif text.has_surrogates(path.name):
            raise ShardWriteError(f"{root}: the name of folder {printed(path.name)} is not UTF-8: rename it")
        else:
            present.append(path.name)
    names = present if classes is None else read_classes(classes)
    if unknown := sorted(set(present) - set(names)):
        raise ShardWriteError(f"{root}: folders {unknown[:3]} are not in the list of classes {classes}")
    items: list[tuple[str, int]] = []
    for label, name in enumerate(names):
        files = sorted(_walk(root / name, name, left)) if name in present else []
        if not files and name in present:
            raise ShardWriteError(f"{root / name} holds no pictures ({', '.join(sorted(_EXTENSIONS))})")
        items += [(path.relative_to(root).as_posix(), label) for path in files]
    return _source(f"image folder: {root.name}", root, items, names, question, left.notes())


@dataclass
class _LeftOut:
    """What a walk through folders leaves out: reason → how many, and the first one."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, name)

    def file(self, name: str, reason: str = "") -> None:
        """A file: its own name says why, unless `reason` does."""
        last = name.rpartition("/")[2]
        if _is_hidden(last):
            self.add("hidden files", name)
        elif reason:
            self.add(f"files {reason}", name)
        else:
            self.add(f"files with the extension {Path(last).suffix.lower() or '(none)'}", name)

    def notes(self) -> list[str]:
        return [f"{count} {reason}, such as {printed(self.first[reason])}" for reason, count in self.counts.items()]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or is_sidecar(name)


def _walk(folder: Path, name: str, left: _LeftOut, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """The pictures below a folder, through links too, but never into a folder that it lies in."""
    status = folder.stat()
    here = above | {(status.st_dev, status.st_ino)}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda one: one.name):
            inner = f"{name}/{entry.name}"
            if not entry.is_dir():
                if Path(entry.name).suffix.lower() in _EXTENSIONS and not _is_hidden(entry.name):
                    yield folder / entry.name
                else:
                    left.file(inner)
                continue
            target = entry.stat()
            if _is_hidden(entry.name):
                left.add("hidden folders", inner)
            elif (target.st_dev, target.st_ino) in here:
                left.add("links to a folder that they lie in", inner)
            else:
                yield from _walk(folder / entry.name, inner, left, here)


def read_image_lists(
    lists: Sequence[str | Path],
    images: str | Path,
    *,
    question: str = QUESTION,
    classes: str | Path | None = None,
) -> Source:
    """Lines ``real/aircraft_carrier/real_001_000001.jpg 0``: a path below `images` and a class number.

    Args:
        lists: text files, such as DomainNet's ``real_train.txt``.
        images: folder that the paths begin in.
        question: of every sample.
        classes: file with one class name per line, in the order of their numbers; without it, the folder that a picture
            lies in names its class.

    Raises:
        ShardWriteError: a line of another form, a picture listed twice, or numbers and names that contradict.
    """
    root = Path(images)
    items: list[tuple[str, int]] = []
    for file in lists:
        items += _lines(file)
    if len({path for path, _ in items}) < len(items):
        seen: set[str] = set()
        twice = next(path for path, _ in items if path in seen or seen.add(path))  # type: ignore[func-returns-value]
        raise ShardWriteError(f"{twice} is listed twice in {', '.join(map(str, lists))}: it would count twice")
    names = read_classes(classes) if classes is not None else _names_of_folders(items)
    if wrong := [path for path, label in items if label >= len(names)]:
        raise ShardWriteError(f"{wrong[0]} has a class number of {len(names)} or more; there are {len(names)} classes")
    return _source(f"image lists: {', '.join(Path(file).name for file in lists)}", root, items, names, question)


def read_classes(file: str | Path) -> list[str]:
    """Class names, one per line.

    Raises:
        ShardWriteError: it cannot be read, or a name is empty or occurs twice.
    """
    names = [name.strip() for name in _read(file).splitlines()]
    if not names or "" in names or len(set(names)) < len(names):
        raise ShardWriteError(f"{file}: needs one class name per line, none empty and none twice")
    return names


def _read(file: str | Path) -> str:
    try:
        return text.read_text(file)
    except text.TextError as error:
        raise ShardWriteError(str(error)) from None


_LONGEST_LABEL = 9


def _lines(file: str | Path) -> list[tuple[str, int]]:
    items = []
    for number, line in enumerate(_read(file).splitlines(), start=1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isdecimal() or len(label) > _LONGEST_LABEL:
            raise ShardWriteError(f"{file}, line {number}: expected 'path label', got {line[:200]!r}")
        items.append((path.strip(), int(label)))
    return items


def _names_of_folders(items: Sequence[tuple[str, int]]) -> list[str]:
    names: dict[int, str] = {}
    labels: dict[str, int] = {}
    for path, label in items:
        name = Path(path).parent.name
        if not name or names.setdefault(label, name) != name or labels.setdefault(name, label) != label:
            raise ShardWriteError(
                f"{path} has class {label}, which is elsewhere {names.get(label)!r}, and folder {name!r}, which is "
                f"elsewhere class {labels.get(name)}: folders do not name the classes here; give the names in a file"
            )
    absent = sorted(set(range(max(names, default=-1) + 1)) - set(names))
    if absent:
        raise ShardWriteError(f"classes {absent[:5]} occur in no line, so their names are unknown: give them in a file")
    return [names[label] for label in sorted(names)]


def _source(
    description: str,
    root: Path,
    items: list[tuple[str, int]],
    names: list[str],
    question: str,
    notes: Sequence[str] = (),
) -> Source:
    if not items:
        raise ShardWriteError(f"{description}: no pictures")
    if not question.strip():
        raise ShardWriteError("the question must not be empty")
    for name in (question, *names):
        try:
            check_text({"question": question, "answers": [name], "question_id": ""})
        except SampleError as error:
            raise ShardWriteError(f"{description}: class {printed(name)}: {error}") from None
    spoken = [name.replace("_", " ") for name in names]
    if len(set(spoken)) < len(spoken):
        raise ShardWriteError(f"{description}: two class names differ only by '_' and a blank")
    keys = unique_keys([path.rpartition(".")[0] or path for path, _ in items], [path for path, _ in items])
    records = []
    for key, (path, label) in zip(keys, items, strict=True):
        # A file's name may be any bytes; what is written into JSON is text.
        shown = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        content = {"question": question, "answers": [spoken[label]], "question_id": shown, "image_id": shown}
        records.append(Record(key, (str(root / path),), encode_json(content), label=label))
    return Source(description, records, spoken, notes=list(notes))
