"""What one local tensor is, in terms of the unsharded layer that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowRun:
    """Consecutive rows, or one part of a row, of a layer in the local tensor.

    A row is ``tensor.view(shape[0], -1)[r]`` of the unsharded layer.

    Attributes:
        start: offset of the run in the flattened local tensor, in elements.
        rows: number of rows in the run.
        cols: elements of each row that are on this rank.
        row_ids: int64 ``[rows]``, the rows' numbers in the unsharded layer, where the rows are completed by other
            ranks; ``None`` where every row of the run lies whole on this rank.
    """

    start: int
    rows: int
    cols: int
    row_ids: Tensor | None = None


@dataclass(frozen=True)
class Placement:
    """What one tensor that the optimizer sees is, in terms of its layer.

    Attributes:
        shape: shape of the unsharded layer.
        shards: into how many distinct shards the layer is cut; a rank group of size ``world`` then holds
            ``world / shards`` copies of each.
        runs: the local rows; empty for an empty shard.
        offset: where the local tensor is a 1-D slice of the flattened layer, the place of its first element in the
            layer; ``None`` where it is an N-D block.
    """

    shape: torch.Size
    shards: int
    runs: tuple[RowRun, ...]
    offset: int | None = None
