"""Which files a checkpoint consists of, and whether they are what was written.

``manifest.json`` is written last and names every other file with its size and SHA-256; it holds its own checksum. A
folder becomes a checkpoint by one rename, after everything in it has reached the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NAME = "manifest.json"
_STEP = re.compile(r"step-(\d+)")
_VERSION = 1


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    sha = hashlib.sha256()
    buffer = bytearray(1 << 20)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
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


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that it survives a power failure."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


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
        text = (folder / NAME).read_text(encoding="utf-8")
        body = json.loads(text)
        del body["sha256"]
        if text != _text(body):
            return {}, [f"{NAME} is damaged: its checksum does not match"]
        files = body["files"]
    except FileNotFoundError:
        return {}, [f"{NAME} is missing"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return {}, [f"{NAME} cannot be read: {' '.join(str(error).split())}"]
    match = _STEP.fullmatch(folder.name)
    if match and int(match.group(1)) != body["step"]:
        return files, [f"{NAME} is of step {body['step']}"]
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {NAME}
    return files, [f"{name} is not in {NAME}" for name in sorted(there - set(files))]


def check(folder: Path, files: dict[str, list[Any]]) -> list[str]:
    """What is wrong with these files: one line each."""
    found = []
    for name, (size, expected) in files.items():
        path = folder / name
        try:
            actual = path.stat().st_size
            if actual != size:
                found.append(f"{name} has {actual} bytes, {size} were written")
            elif digest(path) != expected:
                found.append(f"{name} is damaged: its checksum does not match")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror}")
    return found


def problems(folder: Path) -> list[str]:
    """Everything that is wrong with a checkpoint; empty where it is whole. Reads all of it."""
    files, wrong = read(folder)
    return wrong + check(folder, files)


def _text(body: dict[str, Any]) -> str:
    own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": own}, indent=1) + "\n"
