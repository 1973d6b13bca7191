"""Which files a checkpoint consists of, and whether they are what was written.

``manifest.json`` is written last and names every other file with its size and SHA-256; it holds its own checksum. A
folder becomes a checkpoint by one rename, after everything in it has reached the disk. The checksums find damage, not
malice: whoever can write the folder can put them right, so nothing in it is trusted for having them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from scale_digrap.runtime.files import UntrustedFileError, open_inside
from scale_digrap.runtime.text import TextError, one_line, parse_json, printable, read_at_most

NAME = "manifest.json"
_STEP = re.compile(r"step-(\d{1,18})")
_SHA = re.compile(r"[0-9a-f]{64}")
_VERSION = 1
_MAX_BYTES = 1 << 28


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb", buffering=0) as file:
        return _digest(file)


def _digest(file: Any) -> str:
    sha = hashlib.sha256()
    buffer = bytearray(1 << 20)
    view = memoryview(buffer)
    while count := file.readinto(buffer):
        sha.update(view[:count])
    return sha.hexdigest()


def describe(folder: Path, names: Iterable[str]) -> dict[str, list[Any]]:
    """``{name: [bytes, SHA-256]}`` of some of a folder's files."""
    return {name: [(folder / name).stat().st_size, digest(folder / name)] for name in names}


def write(folder: Path, step: int, files: dict[str, list[Any]]) -> None:
    """Write the manifest and make it, and the folder's entries, durable."""
    write_durably(folder / NAME, _text({"version": _VERSION, "step": step, "files": dict(sorted(files.items()))}))
    for inner in {folder, *((folder / name).parent for name in files)}:
        sync_folder(inner)


def write_durably(path: Path, text: str, *, private: bool = False) -> None:
    """Write a small file so that it survives a power failure.

    Args:
        path: the file.
        text: its content.
        private: readable by its owner alone.
    """
    with open(path, "w", encoding="utf-8", opener=_open_private if private else None) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable: names that were created in it or renamed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of what was committed under ``folder``, oldest first; not yet checked."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else []:
        match = _STEP.fullmatch(path.name)  # fullmatch: step-12.tmp is not a checkpoint
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return sorted(found)


def read(folder: Path) -> tuple[dict[str, list[Any]], list[str]]:
    """A checkpoint's files, and what is wrong with its list of them: missing, damaged, or not the folder's content."""
    try:
        body = _read(folder)
    except FileNotFoundError:
        return {}, [f"{NAME} is missing"]
    except UntrustedFileError as error:
        return {}, [one_line(error)]
    except (OSError, TextError) as error:
        return {}, [f"{NAME} cannot be read: {one_line(error)}"]
    except ValueError as error:
        return {}, [f"{NAME} is damaged: {one_line(str(error))}"]
    files: dict[str, list[Any]] = body["files"]
    match = _STEP.fullmatch(folder.name)
    if match and int(match.group(1)) != body["step"]:
        return files, [f"{NAME} is of step {body['step']}"]
    return files, [f"{printable(name)} is not in {NAME}" for name in sorted(_there(folder) - set(files) - {NAME})]


def own_digest(folder: Path) -> str:
    """The checksum of a checkpoint's list of files, which tells checkpoints apart.

    Raises:
        OSError, UntrustedFileError, ValueError: it cannot be read, or is damaged.
    """
    return _own(_read(folder))


def _read(folder: Path) -> dict[str, Any]:
    """The list, of which every entry is a size and a checksum.

    Raises:
        OSError, UntrustedFileError, TextError: it cannot be read.
        ValueError: it is damaged; names what.
    """
    with open_inside(folder, NAME) as file:
        data = read_at_most(file, _MAX_BYTES)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it is larger than {_MAX_BYTES:,} bytes")
    body = parse_json(data, NAME)
    if not isinstance(body, dict) or "sha256" not in body:
        raise ValueError("it holds no list of files with a checksum")
    del body["sha256"]
    if data != _text(body).encode():
        raise ValueError("its checksum does not match")
    files, step = body.get("files"), body.get("step")
    if not isinstance(files, dict) or not _is_count(step):
        raise ValueError("it lacks 'files' or 'step'")
    for name, entry in files.items():
        whole = isinstance(entry, list) and len(entry) == 2 and _is_count(entry[0]) and isinstance(entry[1], str)
        if not whole or not _SHA.fullmatch(entry[1]):
            raise ValueError(f"what it says of {name!r} are not a size and a checksum")
    return body


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _there(folder: Path) -> set[str]:
    """Everything in a folder that is not a folder, links among them, which are not followed."""
    return {
        os.path.relpath(os.path.join(inner, name), folder)
        for inner, folders, files in os.walk(folder)
        for name in (*files, *(name for name in folders if os.path.islink(os.path.join(inner, name))))
    }


def check(folder: Path, files: dict[str, list[Any]]) -> list[str]:
    """What is wrong with these files: one line each. Only regular files inside the folder are read."""
    found = []
    for name, (size, expected) in files.items():
        shown = printable(name)
        try:
            with open_inside(folder, name) as file:
                found += [f"{shown} {wrong}" for wrong in _compare(file, size, expected)]
        except FileNotFoundError:
            found.append(f"{shown} is missing")
        except UntrustedFileError as error:
            found.append(one_line(error))
        except OSError as error:
            found.append(f"{shown} cannot be read: {error.strerror}")
    return found


def _compare(file: BinaryIO, size: int, expected: str) -> list[str]:
    actual = os.fstat(file.fileno()).st_size
    if actual != size:
        return [f"has {actual} bytes, {size} were written"]
    return [] if _digest(file) == expected else ["is damaged: its checksum does not match"]


def problems(folder: Path) -> list[str]:
    """Everything that is wrong with a checkpoint; empty where it is whole. Reads all of it.

    Also what checksums cannot tell: a pickle in it that calls anything, and a state of the run that is none.
    """
    files, wrong = read(folder)
    wrong = wrong + check(folder, files)
    return wrong if wrong else _unsafe(folder)


def _unsafe(folder: Path) -> list[str]:
    from scale_digrap.runtime import dcp_folder
    from scale_digrap.training.run_folder import META, STATE
    from scale_digrap.training.run_state import CheckpointError, OtherVersionError, read_meta

    found = []
    if os.path.lexists(folder / META):
        try:
            read_meta(folder)
        except OtherVersionError:
            pass  # whoever reads it says so
        except CheckpointError as error:
            found.append(one_line(error))
    if os.path.lexists(folder / STATE) and stat.S_ISDIR(os.stat(folder / STATE).st_mode):
        found += [one_line(line) for line in dcp_folder.problems(folder / STATE)]
    return found


def _own(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _text(body: dict[str, Any]) -> str:
    return json.dumps({**body, "sha256": _own(body)}, indent=1) + "\n"
