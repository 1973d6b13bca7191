"""Checkpoints of FSDP2 shards against plain ``torch.distributed.checkpoint`` of the same state.

    python benchmarks/checkpoint.py [--ranks 2] [--blocks 16] [--repeats 5] [--dir DIR]

Both write and read weights, moments and anchors of one model to one disk, in turn, in one process group. Plain is
``get_model_state_dict`` and ``get_optimizer_state_dict`` with ``save``, ``async_save`` and ``load``: no checksums, no
commit. Ours is the trainer's ``Checkpointer``: SHA-256 of every file after writing and again before loading, and the
steps to a durable rename. A figure is the minimum over the repeats of the slowest rank; only the ratios mean something
elsewhere. Files are read back from the page cache, where checksums cost the most beside the reading.
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
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
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
    """``torch.distributed.checkpoint`` as its tutorial has it."""

    def __init__(self, model: nn.Module, optimizer: DiGraP, folder: Path) -> None:
        self.model, self.optimizer, self.folder = model, optimizer, folder
        # Both make their collectives of a save over gloo; the background needs a group of its own.
        self.group = dist.new_group(backend="gloo")

    def state(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }

    def save(self) -> None:
        dcp.save(self.state(), checkpoint_id=self.folder)

    def load(self) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=self.folder)
        set_model_state_dict(self.model, state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])

    def start(self) -> Any:
        return dcp.async_save(self.state(), checkpoint_id=self.folder, process_group=self.group)


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


def seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    """Of the slowest rank, with what the disk still has to do for others out of the way."""
    os.sync()
    dist.barrier()
    began = time.perf_counter()
    result = action()
    took = torch.tensor(time.perf_counter() - began)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item(), result


def values(model: nn.Module, optimizer: DiGraP) -> list[Tensor]:
    """This rank's piece of everything that was saved."""
    tensors = [local(parameter.detach()) for parameter in model.parameters()]
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        tensors += [local(state[key]) for key in ("exp_avg", "exp_avg_sq", "anchor")]
    return tensors


def check_loaded(load: Callable[[], Any], model: nn.Module, optimizer: DiGraP) -> float:
    """Time a load, into weights and moments that were spoiled before it and are compared after it."""
    expected = [tensor.clone() for tensor in values(model, optimizer)]
    with torch.no_grad():
        for tensor in values(model, optimizer):
            tensor.zero_()
    took, _ = seconds(load)
    for tensor, before in zip(values(model, optimizer), expected, strict=True):
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
    best: dict[str, float] = {}

    def note(name: str, took: float) -> None:
        best[name] = min(best.get(name, took), took)

    for step in range(1, repeats + 1):
        if rank == 0:
            shutil.rmtree(base / "plain", ignore_errors=True)
        note("plain save", seconds(plain.save)[0])
        note("plain load", check_loaded(plain.load, model, optimizer))
        if rank == 0:
            shutil.rmtree(base / "plain", ignore_errors=True)
        stall, future = seconds(plain.start)
        note("plain async stall", stall)
        future.result()

        note("save", seconds(lambda step=step: sync.save(step))[0])
        note("load", check_loaded(sync.resume, model, optimizer))
        took, _ = seconds(lambda step=step: background.save(step))
        if step == 1:
            best["background stall, first"] = took
        else:
            note("background stall", took)
        note("background, until it is durable", took + seconds(background.close)[0])
    report(best, base, model, repeats)
    dist.destroy_process_group()


def report(best: dict[str, float], base: Path, model: nn.Module, repeats: int) -> None:
    if dist.get_rank() != 0:
        return
    size = sum(path.stat().st_size for path in (base / "sync" / "checkpoints").rglob("*") if path.is_file())
    total = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{total / 1e6:.1f} M parameters, {size / 1e6:.0f} MB per checkpoint, {dist.get_world_size()} gloo ranks, "
        f"minimum of {repeats}, torch {torch.__version__}"
    )
    for name, took in best.items():
        print(f"  {name:34s}{took * 1e3:9.0f} ms")
    for name, ratio, goal in (
        ("load / plain load", best["load"] / best["plain load"], 1.15),
        ("save / plain save", best["save"] / best["plain save"], 1.25),
        ("background stall / save", best["background stall"] / best["save"], 0.15),
    ):
        print(f"  {name:34s}{ratio:9.2f}   (goal: at most {goal:.2f}) {'met' if ratio <= goal else 'MISSED'}")
    print(f"  {'plain async stall / plain save':34s}{best['plain async stall'] / best['plain save']:9.2f}")


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
