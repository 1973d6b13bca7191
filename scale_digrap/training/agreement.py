"""Do the replicas still agree? A checksum of what must be the same on several ranks, compared now and then.

Replicas drift apart silently: a flipped bit in one GPU's memory, another version of the weights on one host, a
collective that skipped a rank. The values travel in the loop's sum over the ranks, every rank in places of its own, so
that the sum is a gathering and costs no collective.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from scale_digrap.data.loader import TrainLoader
from scale_digrap.optim.anchored import AnchoredOptimizer
from scale_digrap.sharding import zero3
from scale_digrap.sharding.dtensor import local, sharded_dims
from scale_digrap.training.engine import Engine, TrainingError

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHECKED = ("sharded parameters", "parameters", "omega and its moments", "learning rate", "position in the data")


class DivergenceError(TrainingError):
    """Ranks that must hold the same values do not."""

    exit_status = 4


class ReplicaCheck:
    """Compares the ranks every ``every`` steps, and in the first one.

    Compared are, to the bit: parameters that are whole on every rank (ZeRO stages 0 to 2, a frozen base); under HSDP
    the shards of those ranks that hold the same ones; ω and every other number that DiGraP keeps per layer; the
    learning rate; how many samples have been drawn. FSDP2's and ZeRO-3's shards are each on one rank only.

    Args:
        engine: this rank among all.
        model: whose parameters.
        optimizer: whose numbers per layer and learning rate.
        loader: whose position.
        every: steps between two checks; 0 never checks.
        first: the first step of this process.
    """

    def __init__(
        self, engine: Engine, model: nn.Module, optimizer: Optimizer, loader: TrainLoader, *, every: int, first: int
    ) -> None:
        self._engine, self._model, self._optimizer, self._loader = engine, model, optimizer, loader
        self._every, self._first = every, first
        self._agreed: int | None = None

    def due(self, step: int) -> bool:
        """Whether a step begins with a check."""
        return self._engine.world_size > 1 and self._every > 0 and (step == self._first or step % self._every == 0)

    def values(self, step: int) -> list[float]:
        """What this rank adds to the sum: ``[ranks × 6]`` with its own row filled; empty unless due."""
        if not self.due(step):
            return []
        row = self._row()
        values = [0.0] * (self._engine.world_size * len(row))
        values[self._engine.rank * len(row) : (self._engine.rank + 1) * len(row)] = row
        return values

    def check(self, step: int, values: Sequence[float]) -> None:
        """Compare the rows of all ranks.

        Raises:
            DivergenceError: on all ranks, naming those that differ from the majority.
        """
        if not values:
            return
        width = len(values) // self._engine.world_size
        rows = [values[start : start + width] for start in range(0, len(values), width)]
        for column, title in enumerate(_CHECKED, start=1):
            groups: dict[float, dict[float, list[int]]] = defaultdict(lambda: defaultdict(list))
            for rank, row in enumerate(rows):
                # only shards with the same place in the mesh are copies of each other
                groups[row[0] if column == 1 else 0.0][row[column]].append(rank)
            for found in groups.values():
                if len(found) > 1:
                    raise DivergenceError(self._difference(step, title, list(found.values())))
        self._agreed = step - 1

    @torch.no_grad()
    def _row(self) -> list[float]:
        whole: list[torch.Tensor] = []
        shards: list[torch.Tensor] = []
        places = set()
        for parameter in self._model.parameters():
            if zero3.is_partitioned(parameter):
                continue
            if isinstance(parameter, DTensor):
                places.add(_place(parameter))
                shards.append(local(parameter))
            else:
                whole.append(parameter)
        return [
            _number(json.dumps(sorted(places)).encode()),
            _checksum(shards),
            _checksum(whole),
            self._layers(),
            _number(json.dumps([group["lr"] for group in self._optimizer.param_groups]).encode()),
            float(self._loader.consumed),
        ]

    def _layers(self) -> float:
        if not isinstance(self._optimizer, AnchoredOptimizer):
            return 0.0
        return _number(json.dumps(self._optimizer.layer_state(), sort_keys=True).encode())

    def _difference(self, step: int, title: str, parties: list[list[int]]) -> str:
        parties.sort(key=len)
        *odd, most = parties
        if len(most) > sum(map(len, odd)):
            named = sorted(rank for party in odd for rank in party)
            verb = "differs" if len(named) == 1 else "differ"
            who = f"{_ranks(named)} {verb} from the other {len(most)} in {title}"
        else:
            who = f"{' and '.join(map(_ranks, parties))} hold different {title}, and no side is the majority"
        if self._agreed is None:
            return f"before step {step}, {who}: see that all hosts have the same model files, data and software"
        return (
            f"before step {step}, {who}: a faulty device or host. After step {self._agreed} they still agreed: leave "
            f"the host out, and set checkpoint.resume to a checkpoint that is not younger than that"
        )


def _place(parameter: DTensor) -> str:
    """Which shard of a parameter is here, the same text on all ranks that hold a copy of it."""
    coordinate = list(parameter.device_mesh.get_coordinate() or ())
    return " ".join(f"{dim}:{parameter.placements[dim]}@{coordinate[dim]}" for dim in sharded_dims(parameter))


def _checksum(tensors: Sequence[torch.Tensor]) -> float:
    """A checksum of the bits: any single change shows, a swap of two tensors too."""
    if not tensors:
        return 0.0
    device = tensors[0].device
    sums = [
        tensor.detach().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64).to(device)
        if tensor.numel()
        else torch.zeros((), dtype=torch.int64, device=device)
        for tensor in tensors
    ]
    return _number(torch.stack(sums).cpu().numpy().tobytes())


def _number(data: bytes) -> float:
    """48 bits of a hash: exact in float64, and so in a sum with zeros."""
    return float(int.from_bytes(hashlib.blake2b(data, digest_size=6).digest(), "little"))


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
