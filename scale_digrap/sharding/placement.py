"""What one local tensor is, in terms of the unsharded layer that it belongs to."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
        ranks: global ranks that hold this layer by the word of the tensor itself (its mesh, its process group);
            ``None`` where nothing tells, as for a plain tensor.
    """

    shape: torch.Size
    shards: int
    runs: tuple[RowRun, ...]
    offset: int | None = None
    ranks: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        """Elements of the layer on this rank."""
        return sum(run.rows * run.cols for run in self.runs)


def flat_runs(shape: Sequence[int], start: int, stop: int) -> tuple[RowRun, ...]:
    """The rows that elements ``[start, stop)`` of a flattened layer hold: a part, whole rows, a part.

    Args:
        shape: shape of the unsharded layer.
        start: first element, counted in the flattened layer.
        stop: one past the last element.
    """
    if stop <= start:
        return ()
    rows = shape[0] if len(shape) else 1
    cols = math.prod(shape) // rows
    runs: list[RowRun] = []
    at = start
    while at < stop:
        row, offset = divmod(at, cols)
        whole = (stop - at) // cols if offset == 0 else 0
        if whole:
            runs.append(RowRun(at - start, whole, cols))
            at += whole * cols
        else:
            length = min(cols - offset, stop - at)
            runs.append(RowRun(at - start, 1, length, torch.tensor([row])))
            at += length
    return tuple(runs)
