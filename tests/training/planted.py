"""Pickles that leave a mark when they run, planted where a checkpoint's bytes are read; the checksums are put right."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Payload:
    """Unpickling it creates the marker file and gives the value that belongs there."""

    def __init__(self, marker: Path, value: Any = None) -> None:
        self.marker, self.value = str(marker), value

    def __reduce__(self) -> Any:
        return eval, (
            f"(open({self.marker!r}, 'w').close(), __import__('pickle').loads({pickle.dumps(self.value)!r}))[1]",
        )


class Call:
    """Unpickling it calls a function by its dotted name (protocol 4 looks up every part of it)."""

    def __init__(self, module: str, name: str, *arguments: Any) -> None:
        self._stream = (
            b"\x80\x04"
            + b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
            + b"\x93"
            + pickle.dumps(arguments, 4)[2:-1]
            + b"R."
        )

    def dumps(self) -> bytes:
        return self._stream


def put_right(checkpoint: Path) -> None:
    """A manifest that fits what is there: whoever can write the folder can do so."""
    path = checkpoint / "manifest.json"
    body = json.loads(path.read_text())
    del body["sha256"]
    names = [file for file in checkpoint.rglob("*") if file.is_file() and file != path]
    body["files"] = {
        str(file.relative_to(checkpoint)): [file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()]
        for file in sorted(names)
    }
    write_manifest(checkpoint, body)


def write_manifest(checkpoint: Path, body: dict[str, Any]) -> None:
    own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps({**body, "sha256": own}, indent=1) + "\n")


def metadata(checkpoint: Path, marker: Path) -> None:
    path = checkpoint / "state" / ".metadata"
    path.write_bytes(pickle.dumps(Payload(marker, pickle.loads(path.read_bytes()))))
    put_right(checkpoint)


def inside_metadata(checkpoint: Path, marker: Path) -> None:
    """Not the whole, but one field of it."""
    path = checkpoint / "state" / ".metadata"
    found = pickle.loads(path.read_bytes())
    found.planner_data = Payload(marker, found.planner_data)
    path.write_bytes(pickle.dumps(found))
    put_right(checkpoint)


def dotted(checkpoint: Path, marker: Path) -> None:
    """A name below a module of torch that is allowed."""
    stream = Call("torch.serialization", "os.system", f"touch {marker}").dumps()
    (checkpoint / "state" / ".metadata").write_bytes(stream)
    put_right(checkpoint)


def entry(key: str) -> Callable[[Path, Path], None]:
    """The plant of one entry of the data files."""

    def plant(checkpoint: Path, marker: Path) -> None:
        path = checkpoint / "state" / ".metadata"
        found = pickle.loads(path.read_bytes())
        (place,) = [index for index in found.storage_data if index.fqn.startswith(key)][:1]
        info = found.storage_data[place]
        archive = io.BytesIO()
        data = checkpoint / "state" / info.relative_path
        whole = data.read_bytes()
        value = torch.load(io.BytesIO(whole[info.offset : info.offset + info.length]), weights_only=False)
        torch.save(Payload(marker, value if isinstance(value, str) else None), archive)
        # As large as what was there, so that no size tells.
        planted = archive.getvalue()
        found.storage_data[place] = type(info)(info.relative_path, len(whole), len(planted))
        data.write_bytes(whole + planted)
        path.write_bytes(pickle.dumps(found))
        put_right(checkpoint)

    return plant
