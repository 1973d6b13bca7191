"""Time and collectives of one engine step under DeepSpeed ZeRO: DiGraP against AdamW as the client optimizer.

    python benchmarks/zero_step.py [--ranks 2] [--repeats 15] [--stages 1 2 3] [--extensions DIR]

The engines of one table live in one process group, train the same weights on the same gradients, and step round robin,
so that the machine's noise meets all of them. Forward and backward are not timed. A figure is that of the slowest rank;
only the ratios mean something elsewhere. Collectives are counted while ``engine.step()`` runs, as dispatched.

DeepSpeedCPUAdam is compiled first, for a minute or two, in a folder of this run's own; ``--extensions`` keeps it.
"""

from __future__ import annotations

import argparse
import gc
import logging
import math
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import scale_digrap.deepspeed
from scale_digrap import DiGraP

SUB_GROUPS = 8


def block_shapes(width: int) -> list[tuple[int, ...]]:
    """12 parameters, as in a pre-norm transformer layer without fused projections."""
    hidden = 2 * width
    attention = [(width,)] * 4 + [(width, width), (width,)] * 2
    return [*attention, (hidden, width), (hidden,), (width, hidden), (width,)]


class Block(nn.Module):
    """Its loss leads away from the start, with some noise, so that every layer conflicts."""

    def __init__(self, start: list[Tensor], noise: list[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(x.clone()) for x in start)
        self._start, self._noise = start, noise  # shared by all engines

    def forward(self, loss: Tensor) -> Tensor:
        for param, start, noise in zip(self.layers, self._start, self._noise, strict=True):
            drift = param - start
            loss = loss + (drift * noise).sum() - 0.5 * drift.square().sum()
        return loss


class Net(nn.Module):
    def __init__(self, tensors: list[tuple[list[Tensor], list[Tensor]]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(*pair) for pair in tensors)

    def forward(self) -> Tensor:
        loss = torch.zeros(())
        for block in self.blocks:
            loss = block(loss)
        return loss


def make_tensors(blocks: int, width: int) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Start values, exact in bf16, and noise."""
    generator = torch.Generator().manual_seed(0)
    shapes = block_shapes(width)
    return [
        (
            [torch.randn(shape, generator=generator).bfloat16().float() for shape in shapes],
            [torch.randn(shape, generator=generator) * 1e-3 for shape in shapes],
        )
        for _ in range(blocks)
    ]


class CollectiveCounter(TorchDispatchMode):
    """Every operation that torch hands to a process group, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func.name().split("::")
        if space in ("c10d", "_c10d_functional", "c10d_functional") and "wait_tensor" not in name:
            self.counts[name.split(".")[0].strip("_")] += 1
        return func(*args, **(kwargs or {}))


Candidate = tuple[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer], float]


def candidates(cpu_adam: bool) -> Iterator[Candidate]:
    """Name, optimizer of parameter groups, ω of every layer."""
    yield "AdamW fused (torch)", lambda groups: torch.optim.AdamW(groups, 1e-4, weight_decay=0.0, fused=True), 0.0
    if cpu_adam:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        yield "DeepSpeedCPUAdam", lambda groups: DeepSpeedCPUAdam(groups, 1e-4), 0.0
    yield "DiGraP, no layer projected", lambda groups: DiGraP(groups, 1e-4, omega_lr=0.0), 0.0
    yield "DiGraP, every layer projected", lambda groups: DiGraP(groups, 1e-4, omega_lr=0.0), 0.5


class Run:
    """One engine, its times and its collectives."""

    def __init__(self, candidate: Candidate, tensors: Any, stage: int, groups: int, sub_groups: int) -> None:
        self.name, make, omega = candidate
        model = Net(tensors)
        params = list(model.parameters())
        zero: dict[str, Any] = {"stage": stage}
        if stage == 3:
            local = sum(math.ceil(param.numel() / dist.get_world_size()) for param in params)
            zero |= {"sub_group_size": math.ceil(local / sub_groups), "stage3_param_persistence_threshold": 0}
        config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0, "zero_optimization": zero}
        optimizer = make([{"params": params[number::groups]} for number in range(groups)])
        self.engine, *_ = scale_digrap.deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.collectives: Counter[str] = Counter()
        for _ in range(3):
            self.prepare()
            self.engine.step()
        if omega:
            optimizer._packed[optimizer.layer_scalars.index("omega")].fill_(omega)  # type: ignore[attr-defined]
        self._check(optimizer, omega)

    def _check(self, optimizer: torch.optim.Optimizer, omega: float) -> None:
        """What the row's name says is so."""
        self.prepare()
        self.engine.step()
        if isinstance(optimizer, DiGraP):
            stats = optimizer.layer_stats().values()
            assert all(layer.omega == omega and layer.conflict for layer in stats), self.name

    def prepare(self) -> None:
        self.engine.backward(self.engine())

    def measure(self) -> None:
        self.prepare()
        dist.barrier()
        begin, begin_cpu = time.perf_counter(), time.process_time()
        self.engine.step()
        self.cpu.append(time.process_time() - begin_cpu)
        self.wall.append(time.perf_counter() - begin)

    def count(self) -> None:
        self.prepare()
        dist.barrier()
        with CollectiveCounter() as counter:
            self.engine.step()
        self.collectives = counter.counts

    def figures(self) -> Tensor:
        wall = [min(self.wall), statistics.median(self.wall)]
        return torch.tensor([*wall, min(self.cpu), statistics.median(self.cpu)], dtype=torch.float64)


def measure(title: str, tensors: Any, stage: int, groups: int, sub_groups: int, repeats: int, cpu_adam: bool) -> None:
    runs = [Run(candidate, tensors, stage, groups, sub_groups) for candidate in candidates(cpu_adam)]
    for _ in range(repeats):
        for run in runs:
            run.measure()
    for run in runs:
        run.count()
    times = torch.stack([run.figures() for run in runs])
    dist.all_reduce(times, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        report(title, runs, times)
    for run in runs:
        run.engine.destroy()
    del runs
    gc.collect()


def report(title: str, runs: list[Run], times: Tensor) -> None:
    base, ratios = runs[0], (times / times[0]).tolist()
    print(f"\n{title}")
    print("                                 wall, min         median   CPU, min")
    print("client optimizer                  ms/step  x fused  x fused  x fused  collectives  more than AdamW")
    for run, row, ratio in zip(runs, times.tolist(), ratios, strict=True):
        more = run.collectives - base.collectives
        extra = ", ".join(f"{count} {name}" for name, count in sorted(more.items())) or "-"
        print(
            f"{run.name:32s}{row[0] * 1e3:9.1f}{ratio[0]:9.2f}{ratio[1]:9.2f}{ratio[2]:9.2f}"
            f"{run.collectives.total():13d}  {extra}"
        )
    rows = [k for k, run in enumerate(runs) if run.name.startswith("DiGraP")]
    one = all((runs[k].collectives - base.collectives).total() == 1 for k in rows)
    fast = [max(ratios[k][0], ratios[k][1]) <= 3.0 for k in rows]
    print(
        f"exactly one more collective: {'yes' if one else 'NO'}; at most 3 x fused AdamW (minimum and median): "
        + ", ".join(
            f"{'yes' if ok else 'NO'} ({runs[k].name.split(', ')[1]})" for k, ok in zip(rows, fast, strict=True)
        ),
        flush=True,
    )


def main_rank(rank: int, args: argparse.Namespace, store: str, cpu_adam: bool) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(args.ranks))
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    scale_digrap.deepspeed.skip_cpu_communication_op()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    deepspeed.init_distributed(dist_backend="gloo")
    for blocks, width, repeats in ((25, 64, args.repeats), (25, 384, max(args.repeats // 2, 5))):
        tensors = make_tensors(blocks, width)
        total = sum(x.numel() for start, _ in tensors for x in start)
        size = f"{blocks * 12} tensors, {total / 1e6:.2f} M parameters, {args.ranks} ranks, {repeats} repeats"
        for stage in args.stages:
            measure(f"ZeRO-{stage}, one group: {size}", tensors, stage, 1, 1, repeats, cpu_adam)
            measure(f"ZeRO-{stage}, four groups: {size}", tensors, stage, 4, 1, repeats, cpu_adam)
            if stage == 3:
                title = f"ZeRO-3, one group in {SUB_GROUPS} or more sub-groups: {size}"
                measure(title, tensors, stage, 1, SUB_GROUPS, repeats, cpu_adam)
    dist.destroy_process_group()


def build_cpu_adam() -> bool:
    """Whether DeepSpeed's own Adam can be compiled here; says why not."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    begin = time.perf_counter()
    try:
        CPUAdamBuilder().load(verbose=False)
    except Exception as error:
        print(f"without DeepSpeedCPUAdam: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
        return False
    print(f"DeepSpeedCPUAdam is ready ({time.perf_counter() - begin:.0f} s)", flush=True)
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--stages", type=int, nargs="+", choices=(1, 2, 3), default=(1, 2, 3))
    parser.add_argument("--extensions", help="folder of compiled DeepSpeed operators to use and keep")
    args = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCH_EXTENSIONS_DIR"] = args.extensions or f"{folder}/extensions"
        mp.spawn(main_rank, (args, f"{folder}/store", build_cpu_adam()), nprocs=args.ranks)
