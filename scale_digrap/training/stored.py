"""A checkpoint on disk, read tensor by tensor in one process, without the model, the optimizer or the other ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from scale_digrap.optim.dcp_reader import FolderPlanner, explained
from scale_digrap.optim.portable import (
    PARAM,
    SCALARS,
    PortableStateError,
    canonical_names,
    open_portable,
    parse_scalars,
)
from scale_digrap.runtime.dcp_folder import FolderError
from scale_digrap.training.engine import CheckpointError, short

BUFFER, FROZEN = "buffer", "frozen"
"""Kinds of tensors beside the trained layers: persistent buffers, and frozen parts of an adapter that is trained on."""


class StoredState:
    """The neutral form of training state (:mod:`scale_digrap.optim.portable`) in a folder.

    Args:
        folder: ``step-N/state``, or what ``save_portable`` wrote.

    Attributes:
        tensors: key, such as ``exp_avg.LAYER``, → its size and dtype. Tensors are 1-D: the elements of the layer;
            buffers have their own shape.

    Raises:
        CheckpointError: no such folder, or its metadata cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self._reader, self._metadata = open_portable(folder)
        except PortableStateError as error:
            raise CheckpointError(str(error)) from None
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._keys: dict[str, str] = {}  # of what was renamed: the key in the folder
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def rename(self, names: Iterable[str]) -> None:
        """From now on, call the layers by these names where they differ by the parts of wrappers alone.

        Args:
            names: a model's parameters.
        """
        of_model = {stored: name for name, stored in canonical_names(names).items()}
        layers = set(self.layers())
        here = {name: of_model.get(stored, name) for name, stored in canonical_names(layers).items()}
        for key in list(self.tensors):
            kind, _, name = key.partition(".")
            new = f"{kind}.{here.get(name, name)}"
            if new != key and name in layers:
                self._keys[new] = self._keys.pop(key, key)
                self.tensors[new] = self.tensors.pop(key)

    def layers(self) -> list[str]:
        """Names of the layers whose weights are here, sorted."""
        return self.names(PARAM)

    def names(self, kind: str) -> list[str]:
        """Names of the layers that have a tensor of a kind: ``param``, ``exp_avg``, ``anchor``, …"""
        return sorted(key.removeprefix(f"{kind}.") for key in self.tensors if key.startswith(f"{kind}."))

    def kinds(self) -> dict[str, list[TensorStorageMetadata]]:
        """What is stored of each kind."""
        found: dict[str, list[TensorStorageMetadata]] = {}
        for key, entry in self.tensors.items():
            found.setdefault(key.partition(".")[0], []).append(entry)
        return found

    def read(self, key: str) -> Tensor:
        """One tensor, in main memory, in the dtype in which it was saved.

        Raises:
            CheckpointError: there is none of that name, or its files are missing or damaged.
        """
        if key not in self.tensors:
            raise CheckpointError(f"{self.folder} holds no tensor {key!r}")
        entry, stored = self.tensors[key], self._keys.get(key, key)
        target = {stored: torch.empty(entry.size, dtype=entry.properties.dtype)}
        self._fill(target, stored)
        return target[stored]

    def scalars(self) -> dict[str, dict[str, float]]:
        """Layer → name → value of the optimizer's numbers, such as ``omega``."""
        target: dict[str, Any] = {SCALARS: ""}
        if SCALARS not in self._metadata.state_dict_metadata:
            return {}
        self._fill(target, SCALARS)
        try:
            return parse_scalars(target[SCALARS], str(self.folder))
        except PortableStateError as error:
            raise CheckpointError(str(error)) from None

    def _fill(self, target: dict[str, Any], key: str) -> None:
        planner = FolderPlanner()
        try:
            with warnings.catch_warnings(), explained(self._reader):
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                planner.set_up_planner(target, self._metadata, is_coordinator=True)
                plan = planner.finish_plan(self._reader.prepare_local_plan(planner.create_local_plan()))
                self._reader.read_data(plan, planner).wait()
        except FolderError as error:
            raise CheckpointError(str(error)) from error
        except (CheckpointException, Exception) as error:  # CheckpointException is a BaseException
            raise CheckpointError(f"cannot read {key} from {self.folder}: {short(error)}") from error
