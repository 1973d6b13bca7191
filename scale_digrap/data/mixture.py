"""Several data sets in one stream, in exact proportions, with random access.

The stream is cut into blocks. How many draws of each data set a block holds follows from the weights by rounding the
totals up to the block's end, so that after any number of blocks every data set is within one draw of its share; their
order within the block is permuted. The k-th draw of a data set is position k of its own plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from scale_digrap.data.errors import DataError
from scale_digrap.data.plan import Plan

EPOCHS = ("all", "first")


@dataclass
class Mixture:
    """What :func:`mix` describes: data sets by name, their weights, and how an epoch of the mixture ends.

    Attributes:
        sources: data sets, or shard patterns.
        weights: share of each in the stream; they are divided by their sum.
        block: turns in a block; the proportions hold in every block. Every share must be at least 1 / block.
        epoch: ``all``: an epoch of the mixture ends when every data set has been seen whole once; ``first``: when the
            first one has. The stream itself goes on without end, each data set epoch after epoch.
    """

    sources: dict[str, Any]
    weights: dict[str, float]
    block: int = 1000
    epoch: str = "all"

    def shares(self) -> list[Fraction]:
        """The weights as exact fractions that add up to 1.

        Raises:
            DataError: a weight that is not positive or smaller than a block can show.
        """
        if not self.sources or self.sources.keys() != self.weights.keys():
            raise DataError(f"a mixture needs a weight for each of its data sets, got {self.weights}")
        if self.block < 1 or self.epoch not in EPOCHS:
            raise DataError(f"mixture: block must be ≥ 1 and epoch one of {EPOCHS}, got {self.block}, {self.epoch!r}")
        fractions = []
        for name in self.sources:
            weight = self.weights[name]
            if not (isinstance(weight, (int, float)) and 0 < weight < float("inf")):
                raise DataError(f"mixture: the weight of {name!r} must be a positive number, got {weight!r}")
            fractions.append(Fraction(weight).limit_denominator(10**9))
        total = sum(fractions)
        shares = [fraction / total for fraction in fractions]
        for name, share in zip(self.sources, shares, strict=True):
            if share * self.block < 1:
                raise DataError(
                    f"mixture: {name!r} has a share of {float(share):.2g}, less than one draw in a block of "
                    f"{self.block}: raise the weight or the block"
                )
        return shares


def mix(
    sources: Mapping[Any, float] | Sequence[tuple[Any, float]],
    *,
    names: Sequence[str] | None = None,
    block: int = 1000,
    epoch: str = "all",
) -> Mixture:
    """A weighted mixture of data sets or shard patterns, for ``TrainLoader``.

    Args:
        sources: ``{data set: weight}`` or pairs of them.
        names: of the data sets, for reports; numbers by default.
        block, epoch: see :class:`Mixture`.
    """
    pairs = list(sources.items() if isinstance(sources, Mapping) else sources)
    names = [str(number) for number in range(len(pairs))] if names is None else list(names)
    if len(set(names)) != len(pairs):
        raise DataError(f"a mixture of {len(pairs)} data sets needs as many different names, got {names}")
    return Mixture(
        {name: source for name, (source, _) in zip(names, pairs, strict=True)},
        {name: weight for name, (_, weight) in zip(names, pairs, strict=True)},
        block,
        epoch,
    )


@dataclass
class Stream:
    """Position → (data set, shard, sample): one plan, or several that take turns.

    Attributes:
        plans: of the data sets.
        shares: of the data sets in the stream, exact, adding up to 1.
        block: turns in a block. A turn is ``lanes`` positions, so that lanes keep their residues.
        epoch: see :class:`Mixture`.
    """

    plans: list[Plan]
    shares: list[Fraction] = field(default_factory=lambda: [Fraction(1)])
    block: int = 1000
    epoch: str = "all"
    seed: int = 0
    lanes: int = 1
    _block: tuple[int, list[int], list[int]] | None = field(default=None, repr=False)

    def at(self, position: int) -> tuple[int, int, int]:
        """(data set, shard, sample in the shard)."""
        source, own = self.draw(position)
        return (source, *self.plans[source].at(own))

    def draw(self, position: int) -> tuple[int, int]:
        """(data set, position in its own stream)."""
        if len(self.plans) == 1:
            return 0, position
        turn, lane = divmod(position, self.lanes)
        block, slot = divmod(turn, self.block)
        sources, draws = self._turns(block)
        return sources[slot], draws[slot] * self.lanes + lane

    def drawn(self, position: int) -> list[int]:
        """How many samples each data set has given before a position."""
        if len(self.plans) == 1:
            return [position]
        turn, lane = divmod(position, self.lanes)
        block, slot = divmod(turn, self.block)
        sources, _ = self._turns(block)
        counts = [n * self.lanes for n in self._totals(block)]
        for source in sources[:slot]:
            counts[source] += self.lanes
        counts[sources[slot]] += lane
        return counts

    def __len__(self) -> int:
        """Positions in an epoch of the mixture."""
        if len(self.plans) == 1:
            return self.plans[0].samples
        ends = [self._end(source, plan.samples) for source, plan in enumerate(self.plans)]
        return max(ends) if self.epoch == "all" else min(ends)

    def _end(self, source: int, samples: int) -> int:
        """Positions until a data set has given so many samples."""
        return _smallest(lambda position: self.drawn(position)[source] >= samples)

    def _totals(self, block: int) -> list[int]:
        """Turns of each data set before a block: largest remainders, which never take a turn back from a data set
        whose share is at least one turn a block."""
        turns = block * self.block
        exact = [share * turns for share in self.shares]
        counts = [int(value) for value in exact]
        missing = turns - sum(counts)
        by_remainder = sorted(range(len(exact)), key=lambda source: (counts[source] - exact[source], source))
        for source in by_remainder[:missing]:
            counts[source] += 1
        return counts

    def _turns(self, block: int) -> tuple[list[int], list[int]]:
        """Data set and number of its draw, for every turn of a block."""
        if self._block is None or self._block[0] != block:
            before, after = self._totals(block), self._totals(block + 1)
            counts = [b - a for a, b in zip(before, after, strict=True)]
            rng = np.random.default_rng([self.seed & 0xFFFFFFFFFFFFFFFF, block])
            sources = rng.permutation(np.repeat(np.arange(len(counts)), counts))
            draws = np.empty(self.block, dtype=np.int64)
            for source, count in enumerate(counts):
                draws[sources == source] = before[source] + np.arange(count)
            self._block = (block, sources.tolist(), draws.tolist())
        return self._block[1], self._block[2]


def _smallest(holds: Callable[[int], bool]) -> int:
    """The smallest n ≥ 0 for which a condition holds that, once true, stays true."""
    high = 1
    while not holds(high):
        high *= 2
    low = 0
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
