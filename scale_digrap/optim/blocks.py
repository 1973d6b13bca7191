"""Local pieces of layers as matrices: large layers cut up, many small ones stacked, so that one pass serves many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scale_digrap.optim.functional import Workspace
from scale_digrap.sharding.layout import ShardLayout


@dataclass(frozen=True)
class Piece:
    """``rows × cols`` elements of one layer, from element ``start`` of its flattened local tensor."""

    index: int
    start: int
    rows: int
    cols: int
    slots: Tensor | None = None

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    def of(self, local: Tensor) -> Tensor:
        """``[rows, cols]`` of a local tensor, right for any strides; shares storage where that is contiguous."""
        if self.numel == local.numel():
            return local.reshape(self.rows, self.cols)
        return local.reshape(-1).narrow(0, self.start, self.numel).view(self.rows, self.cols)


@dataclass(frozen=True)
class Block:
    """Pieces of equal ``cols`` that one pass treats as one matrix: of one group, of one kind, few enough for small
    temporaries.

    Attributes:
        owner: int64 ``[rows]``, the layer of each row.
        slots: int64 ``[rows]``, each row's place among the rows that straddle ranks; ``None`` for whole rows.
    """

    group: int
    anchored: bool
    by_rows: bool
    pieces: tuple[Piece, ...]
    owner: Tensor
    slots: Tensor | None

    @classmethod
    def make(cls, group: int, anchored: bool, by_rows: bool, pieces: list[Piece], device: torch.device) -> Block:
        counts = [piece.rows for piece in pieces]
        index = torch.tensor([piece.index for piece in pieces], device=device)
        owner = torch.repeat_interleave(index, torch.tensor(counts, device=device), output_size=sum(counts))
        parts = [piece.slots for piece in pieces if piece.slots is not None]
        return cls(group, anchored, by_rows, tuple(pieces), owner, torch.cat(parts) if parts else None)

    def only(self, pieces: list[Piece]) -> Block:
        """The block of some of its pieces."""
        if len(pieces) == len(self.pieces):
            return self
        return Block.make(self.group, self.anchored, self.by_rows, pieces, self.owner.device)

    def matrix(self, role: str, tensors: list[Any], workspace: Workspace, dtype: torch.dtype | None = None) -> Tensor:
        """``[rows, cols]`` of ``dtype`` (theirs by default) out of one local tensor per layer."""
        pieces = [piece.of(tensors[piece.index]) for piece in self.pieces]
        return workspace.gather(role, pieces, self.owner.numel(), dtype)


def make_blocks(
    layout: ShardLayout, local: Sequence[Tensor], kinds: Sequence[tuple[int, bool, bool]], device: torch.device
) -> list[Block]:
    """Sort the local rows of all layers into blocks.

    Args:
        layout: where the layers live.
        local: each layer's local elements.
        kinds: for each layer its parameter group, whether it has an anchor, and whether that is stored.
        device: where sums are taken.
    """
    # On a CPU a block's temporaries stay in the cache, which is worth a factor of two; elsewhere launches dominate.
    limit = 1 << 18 if device.type == "cpu" else 1 << 24
    sorted_pieces: dict[tuple, list[Piece]] = {}
    for index, placed in enumerate(layout.placements):
        by_rows, values = layout.layers[index].by_rows, local[index]
        for run in placed.runs:
            rows, cols = (run.rows, run.cols) if by_rows else (1, run.rows * run.cols)
            slots = layout.row_slots(index, run, device)
            most = limit if values.is_contiguous() else rows * cols
            for start, height, width in _tiles(rows, cols, most, whole_rows=by_rows and slots is None):
                part = None if slots is None else slots[start // cols : start // cols + height]
                piece = Piece(index, run.start + start, height, width, part)
                # Rows that straddle ranks have no cosine yet; a piece that is dear to copy gets its own block.
                alone = index if height * width > limit // 4 else None
                kind = (*kinds[index], by_rows, values.dtype, width, part is None, alone)
                sorted_pieces.setdefault(kind, []).append(piece)
    blocks: list[Block] = []
    for (group, anchored, _, by_rows, *_), pieces in sorted_pieces.items():
        taken: list[Piece] = []
        for piece in pieces:
            if taken and sum(other.numel for other in taken) + piece.numel > limit:
                blocks.append(Block.make(group, anchored, by_rows, taken, device))
                taken = []
            taken.append(piece)
        blocks.append(Block.make(group, anchored, by_rows, taken, device))
    return blocks


def _tiles(rows: int, cols: int, limit: int, *, whole_rows: bool) -> Iterator[tuple[int, int, int]]:
    """Cut a ``rows × cols`` run into (first element, rows, cols) of at most ``limit`` elements or one row each.

    Args:
        whole_rows: a row's cosine is taken of its tile, so that a row must not be cut. Otherwise only sums are, and a
            single row may be cut anywhere.
    """
    if rows == 1 and not whole_rows:
        for start in range(0, cols, limit):
            yield start, 1, min(limit, cols - start)
        return
    height = max(1, limit // cols)
    for first in range(0, rows, height):
        yield first * cols, min(height, rows - first), cols
