"""Checkpoints of FSDP2 shards against plain ``torch.distributed.checkpoint`` of the same state.

    python benchmarks/checkpoint.py [--ranks 2] [--blocks 16] [--repeats 5] [--dir DIR]

Both write and read weights, moments and anchors of one model to one disk, in turn, in one process group. Plain is
``save``, ``async_save`` and ``load`` of a dictionary of these DTensors and nothing else: no optimizer scalars, no
checksums, no commit. Ours is the trainer's ``Checkpointer``: SHA-256 of every file after writing and again before
loading, and the steps to a durable rename. A figure is the minimum over the repeats of the slowest rank; only the
ratios mean something elsewhere. Files are read back from the page cache, where checksums cost the most beside the
reading. CPU time is what the rank's process was busy, which a loaded machine disturbs less than wall time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from scale_digrap import DiGraP
from scale_digrap.config import Config, config_from_dict
from scale_digrap.models.loading import LoadedModel
from scale_digrap.sharding.dtensor import local
from scale_digrap.training.checkpoint import Checkpointer
from scale_digrap.training.fsdp import FsdpEngine

WIDTH = 512


class Block(nn.Module):
    """The matrices of a transformer block without its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)


class Position:
    """What a checkpoint asks of a loader."""

    consumed = 0

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consumed = state["consumed"]


def build(blocks: int) -> tuple[nn.Module, DiGraP]:
    """A sharded model with bf16-exact weights, and DiGraP after two steps: every kind of state is there."""
    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(blocks)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    for block in model:
        fully_shard(block)
    fully_shard(model)
    optimizer = DiGraP(model.named_parameters(), lr=1e-3)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


class Plain:
    """``torch.distributed.checkpoint`` with the least that it can be given."""

    def __init__(self, model: nn.Module, optimizer: DiGraP, folder: Path) -> None:
        self.folder = folder
        self.state: dict[str, Any] = {f"param.{name}": p.detach() for name, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            state = optimizer.state[parameter]
            self.state |= {f"{key}.{name}": state[key] for key in ("exp_avg", "exp_avg_sq", "anchor")}
        # The collectives of the background must not mix with others.
        self.group = dist.new_group(backend="gloo")

    def save(self) -> None:
        dcp.save(self.state, checkpoint_id=self.folder)

    def load(self) -> None:
        dcp.load(self.state, checkpoint_id=self.folder)

    def start(self) -> Any:
        return dcp.async_save(self.state, checkpoint_id=self.folder, process_group=self.group)


def checkpointer(config: Config, engine: FsdpEngine, model: nn.Module, optimizer: DiGraP) -> Checkpointer:
    loaded = LoadedModel(model=model, processor=None, collator=None)  # type: ignore[arg-type]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return Checkpointer(
        config,
        engine=engine,
        loaded=loaded,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=Position(),  # type: ignore[arg-type]
    )


def configuration(folder: Path, *, background: bool) -> Config:
    return config_from_dict(
        {
            "run_dir": str(folder),
            "checkpoint": {"every": 1, "keep": 1, "background": background},
            "training": {"steps": 1, "device": "cpu"},
        }
    )


Seconds = tuple[float, float]
"""Wall and CPU time."""


def measure(action: Callable[[], Any]) -> tuple[Seconds, Any]:
    """Times of the slowest rank, with what the disk still has to do for others out of the way."""
    os.sync()
    dist.barrier()
    began, began_cpu = time.perf_counter(), time.process_time()
    result = action()
    took = torch.tensor([time.perf_counter() - began, time.process_time() - began_cpu])
    dist.all_reduce(took, dist.ReduceOp.MAX)
    wall, cpu = took.tolist()
    return (wall, cpu), result


def measure_load(load: Callable[[], Any], tensors: list[Tensor]) -> Seconds:
    """Time a load into tensors that are spoiled before it and compared after it."""
    expected = [tensor.clone() for tensor in tensors]
    with torch.no_grad():
        for tensor in tensors:
            tensor.zero_()
    took, _ = measure(load)
    for tensor, before in zip(tensors, expected, strict=True):
        assert torch.equal(tensor, before), "a tensor came back with other values"
    return took


def main_rank(rank: int, world_size: int, folder: str, blocks: int, repeats: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    model, optimizer = build(blocks)
    base = Path(folder)
    plain = Plain(model, optimizer, base / "plain")
    engine = FsdpEngine(configuration(base / "sync", background=False))
    sync = checkpointer(configuration(base / "sync", background=False), engine, model, optimizer)
    background = checkpointer(configuration(base / "background", background=True), engine, model, optimizer)
    tensors = [local(tensor) for tensor in plain.state.values()]
    best: dict[str, Seconds] = {}

    def note(name: str, took: Seconds) -> None:
        wall, cpu = best.get(name, took)
        best[name] = (min(wall, took[0]), min(cpu, took[1]))

    for step in range(1, repeats + 1):
        if rank == 0:
            shutil.rmtree(base / "plain", ignore_errors=True)
        note("plain save", measure(plain.save)[0])
        note("save", measure(lambda step=step: sync.save(step))[0])
        note("plain load", measure_load(plain.load, tensors))
        note("load", measure_load(sync.resume, tensors))
        if rank == 0:
            shutil.rmtree(base / "plain", ignore_errors=True)
        stall, future = measure(plain.start)
        note("plain async stall", stall)
        future.result()
        stall, _ = measure(lambda step=step: background.save(step))
        note("background stall, first" if step == 1 else "background stall", stall)
        rest, _ = measure(background.close)
        note("background, until it is durable", (stall[0] + rest[0], stall[1] + rest[1]))
    report(best, base, sum(parameter.numel() for parameter in model.parameters()), repeats)
    dist.destroy_process_group()


def report(best: dict[str, Seconds], base: Path, parameters: int, repeats: int) -> None:
    if dist.get_rank() != 0:
        return
    size = sum(path.stat().st_size for path in (base / "sync" / "checkpoints").rglob("*") if path.is_file())
    print(
        f"{parameters / 1e6:.1f} M parameters, {size / 1e6:.0f} MB per checkpoint, {dist.get_world_size()} gloo ranks, "
        f"minimum of {repeats}, torch {torch.__version__}"
    )
    print(f"  {'':34s}{'wall ms':>10s}{'CPU ms':>10s}")
    for name, (wall, cpu) in best.items():
        print(f"  {name:34s}{wall * 1e3:10.0f}{cpu * 1e3:10.0f}")
    print(f"  {'':34s}{'wall':>10s}{'CPU':>10s}   to reach (wall)")
    for ours, theirs, goal in (
        ("load", "plain load", 1.15),
        ("save", "plain save", 1.25),
        ("background stall", "save", 0.15),
        ("plain async stall", "plain save", None),
    ):
        wall, cpu = (mine / other for mine, other in zip(best[ours], best[theirs], strict=True))
        verdict = "" if goal is None else f"   {goal:.2f} {'met' if wall <= goal else 'MISSED'}"
        print(f"  {f'{ours} / {theirs}':34s}{wall:10.2f}{cpu:10.2f}{verdict}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dir", help="a folder on the disk to measure (default: the system's temporary folder)")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats: at least 2, because the first save in the background is counted apart")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory(dir=args.dir) as place:
        mp.spawn(main_rank, (args.ranks, place, args.blocks, args.repeats), nprocs=args.ranks)
