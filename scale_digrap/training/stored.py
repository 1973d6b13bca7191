"""A checkpoint on disk, read tensor by tensor in one process, without the model, the optimizer or the other ranks."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from scale_digrap.optim.portable import PARAM, SCALARS, PortableStateError, open_portable
from scale_digrap.training.engine import CheckpointError, short

BUFFER = "buffer"


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
        except Exception as error:  # whatever unpickling a damaged file raises
            raise CheckpointError(f"cannot read {self.folder / '.metadata'}: {short(error)}") from error
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

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
        entry = self.tensors[key]
        target = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
        self._fill(target, key)
        return target[key]

    def scalars(self) -> dict[str, dict[str, float]]:
        """Layer → name → value of the optimizer's numbers, such as ``omega``."""
        target: dict[str, Any] = {SCALARS: ""}
        if SCALARS not in self._metadata.state_dict_metadata:
            return {}
        self._fill(target, SCALARS)
        scalars: dict[str, dict[str, float]] = json.loads(target[SCALARS])
        return scalars

    def _fill(self, target: dict[str, Any], key: str) -> None:
        planner = DefaultLoadPlanner()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                planner.set_up_planner(target, self._metadata, is_coordinator=True)
                plan = planner.finish_plan(self._reader.prepare_local_plan(planner.create_local_plan()))
                self._reader.read_data(plan, planner).wait()
        except (CheckpointException, Exception) as error:  # CheckpointException is a BaseException
            raise CheckpointError(f"cannot read {key} from {self.folder}: {short(error)}") from error
