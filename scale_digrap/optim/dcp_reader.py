"""``torch.distributed.checkpoint.load`` of a folder that is not trusted.

Torch unpickles ``.metadata`` freely, and every entry that is not a tensor too. Here the metadata comes from
:mod:`scale_digrap.runtime.dcp_folder`, entries are read with ``weights_only``, and no file outside the folder is
opened.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from scale_digrap.runtime.dcp_folder import FolderError, StoredTensor, problems, read_index
from scale_digrap.runtime.files import UntrustedFileError, open_inside


class FolderReader(dcp.FileSystemReader):
    """A reader of a folder that is not trusted.

    Args:
        folder: what ``torch.distributed.checkpoint.save`` wrote.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.fs = _Inside(Path(folder))
        self._known: Metadata | None = None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The folder's metadata, read once, without ``planner_data``, which loading does not use.

        Raises:
            FolderError: as :func:`scale_digrap.runtime.dcp_folder.read_index`.
        """
        if self._known is not None:  # that of a large checkpoint has an entry per tensor and rank
            return self._known
        index = read_index(self.path)
        entries: dict[str, Any] = {key: _tensor(tensor) for key, tensor in index.tensors.items()}
        entries |= {key: BytesStorageMetadata() for key in index.objects}
        storage = {
            MetadataIndex(key, offset, number): _StorageInfo(where.file, where.offset, where.length)
            for (key, offset, number), where in index.slices.items()
        }
        self._known = Metadata(
            entries, storage_data=storage, storage_meta=StorageMeta(load_id=self.load_id), version=index.version
        )
        return self._known


class FolderPlanner(DefaultLoadPlanner):
    """Reads what is not a tensor as plain values only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = torch.load(value, weights_only=True)
        super().load_bytes(read_item, _saved(plain))


def load(state_dict: dict[str, Any], reader: FolderReader) -> None:
    """``torch.distributed.checkpoint.load`` of a folder that is not trusted. Collective.

    Raises:
        FolderError: an entry is not safe to read, or damaged so that this can be told.
        CheckpointException: as torch's.
    """
    with warnings.catch_warnings(), explained(reader):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state_dict, storage_reader=reader, planner=FolderPlanner())


@contextmanager
def explained(reader: FolderReader) -> Iterator[None]:
    """Within the block, an error is replaced by what is wrong with the folder, where something is.

    Torch's own words for a pickle that it refuses fill a page, and do not name the file.

    Raises:
        FolderError: what is wrong with the folder; whatever the block raises otherwise.
    """
    try:
        yield
    except (CheckpointException, Exception) as error:  # CheckpointException is a BaseException
        found = problems(reader.path)
        if found:
            raise FolderError(found[0]) from error
        raise


class _Inside(FileSystem):
    """Opens regular files of one folder, and nothing else."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        # Joining has left "../" in the path, and replaced it where the name was absolute.
        before, name = f"{self._folder}/", str(path)
        if mode != "rb" or not name.startswith(before):
            raise UntrustedFileError(f"{name!r} does not name a file inside {self._folder}")
        with open_inside(self._folder, name.removeprefix(before)) as stream:
            yield stream


def _tensor(stored: StoredTensor) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in stored.chunks]
    properties = TensorProperties(dtype=getattr(torch, stored.dtype))
    return TensorStorageMetadata(properties, torch.Size(stored.size), chunks)


def _saved(value: Any) -> io.BytesIO:
    """For torch's planner, which knows where a value goes, but unpickles it freely: a copy of our own making."""
    copy = io.BytesIO()
    torch.save(value, copy)
    copy.seek(0)
    return copy
