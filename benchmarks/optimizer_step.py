"""Time and memory of one optimizer step on FSDP2 shards: DiGraP and its siblings against AdamW and per-parameter code.

    python benchmarks/optimizer_step.py [--ranks 2] [--repeats 15]

All optimizers run in one process group on the same shapes and gradients, round robin, so that the machine's noise meets
all of them; a figure is the minimum over the repeats of the slowest rank. Only the ratios mean something elsewhere. CPU
time is what the rank's process was busy, which a loaded machine disturbs less than wall time.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from scale_digrap import AdamFTP, AdamL2SP, AdamSPD, DiGraP


class PerParameterDiGraP(torch.optim.Optimizer):
    """DiGraP as one would write it first: DTensor operations per parameter, the previous projection stored in fp32."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                s = self.state[p]
                if not s:
                    s.update(anchor=p.detach().clone(), m=torch.zeros_like(p), v=torch.zeros_like(p), t=0)
                    s.update(omega=0.0, a=0.0, b=0.0)
                g, delta = p.grad, p - s["anchor"]
                s["t"] += 1
                t = s["t"]
                d = _total((g * delta).sum())
                n = _total((delta * delta).sum())
                if t > 1:
                    h = _total(nn.functional.cosine_similarity(_rows(g), _rows(s["projection"]), dim=1).sum())
                    s["a"] = 0.9 * s["a"] + 0.1 * h
                    s["b"] = 0.999 * s["b"] + 0.001 * h * h
                    move = (s["a"] / (1 - 0.9**t)) / (math.sqrt(s["b"] / (1 - 0.999**t)) + 1e-8)
                    s["omega"] = min(max(s["omega"] - 0.5 * move, 0.0), 1.0)
                s["projection"] = delta * (d / n if n > 0 else 0.0)
                if d < 0:
                    g = g - s["projection"] * s["omega"]
                s["m"].mul_(0.9).add_(g, alpha=0.1)
                s["v"].mul_(0.999).addcmul_(g, g, value=0.001)
                root = (s["v"] / (1 - 0.999**t)).sqrt().add_(1e-8)
                p.addcdiv_(s["m"], root, value=-group["lr"] / (1 - 0.9**t))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1) if x.dim() > 1 else x.reshape(1, -1)


def _total(x: Tensor) -> float:
    return (x.full_tensor() if isinstance(x, DTensor) else x).item()


def block_shapes(blocks: int, width: int) -> list[tuple[int, ...]]:
    """12 parameters a block, as in a pre-norm transformer layer without fused projections."""
    hidden = 2 * width
    attention = [(width,)] * 4 + [(width, width), (width,)] * 2
    return [*attention, (hidden, width), (hidden,), (width, hidden), (width,)] * blocks


def make_params(shapes: list[tuple[int, ...]], mesh) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(shape, generator=generator).bfloat16().float() for shape in shapes]
    return [nn.Parameter(distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)) for x in full]


def set_grads(params: list[nn.Parameter], start: list[Tensor]) -> None:
    """Noise that leads away from the start, so that every layer conflicts."""
    with torch.no_grad():
        for index, (param, origin) in enumerate(zip(params, start, strict=True)):
            torch.manual_seed(index)
            param.grad = torch.randn_like(param) * 1e-3 - (param - origin)


def peak_temporaries(optimizer: torch.optim.Optimizer) -> int:
    """Most bytes that one step allocates at once, and the buffers that DiGraP keeps from step to step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    live = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    workspace = getattr(optimizer, "_workspace", None)
    kept = sum(buffer.nbytes for buffer in workspace._buffers.values()) if workspace else 0
    return peak + kept


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    seen: dict[int, int] = {}
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                local = value.to_local() if isinstance(value, DTensor) else value
                seen[local.untyped_storage().data_ptr()] = local.numel() * local.element_size()
    return sum(seen.values())


Candidate = tuple[str, Callable[[list], torch.optim.Optimizer], Callable[[torch.optim.Optimizer], None]]


def candidates() -> list[Candidate]:
    def nothing(optimizer: torch.optim.Optimizer) -> None:
        pass

    def project_all(optimizer: torch.optim.Optimizer) -> None:
        for state in optimizer.state.values():
            state["omega"].fill_(0.5)

    adamw = torch.optim.AdamW
    return [
        ("AdamW fused", lambda p: adamw(p, 1e-4, weight_decay=0.0, fused=True), nothing),
        ("AdamW foreach", lambda p: adamw(p, 1e-4, weight_decay=0.0, foreach=True), nothing),
        ("AdamW for-loop", lambda p: adamw(p, 1e-4, weight_decay=0.0, foreach=False), nothing),
        ("DiGraP, no layer projected", lambda p: DiGraP(p, 1e-4), nothing),
        ("DiGraP, every layer projected", lambda p: DiGraP(p, 1e-4, omega_lr=0.0), project_all),
        ("DiGraP, LoRA (zero anchor)", lambda p: DiGraP(p, 1e-4, anchor="zero"), nothing),
        ("AdamFTP", lambda p: AdamFTP(p, 1e-4), nothing),
        ("AdamSPD", lambda p: AdamSPD(p, 1e-4), nothing),
        ("AdamL2SP", lambda p: AdamL2SP(p, 1e-4), nothing),
        ("DiGraP per parameter (DTensor)", lambda p: PerParameterDiGraP(p, 1e-4), nothing),
    ]


def measure(title: str, shapes: list[tuple[int, ...]], repeats: int) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    runs = []
    for name, make, prepare in candidates():
        params = make_params(shapes, mesh)
        start = [param.detach().clone() for param in params]
        optimizer = make(params)
        for _ in range(3):  # ω is learned from the third step on
            set_grads(params, start)
            optimizer.step()
        prepare(optimizer)
        runs.append([name, optimizer, math.inf, math.inf])
    slow = [run for run in runs if "per parameter" in run[0]]
    for repeat in range(repeats):
        for run in runs:
            if run in slow and repeat >= 3:
                continue
            dist.barrier()
            begin, begin_cpu = time.perf_counter(), time.process_time()
            run[1].step()
            run[3] = min(run[3], time.process_time() - begin_cpu)
            run[2] = min(run[2], time.perf_counter() - begin)
    peaks = [peak_temporaries(run[1]) for run in runs]
    times = torch.tensor([[run[2], run[3]] for run in runs])
    dist.all_reduce(times, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        total = sum(math.prod(shape) for shape in shapes)
        here = sum(p.to_local().numel() for p in runs[0][1].param_groups[0]["params"])
        wall, cpu = times.T.tolist()
        print(f"\n{title}: {len(shapes)} tensors, {total / 1e6:.2f} M parameters, {dist.get_world_size()} ranks")
        print("                                     wall              CPU          bytes per parameter of the rank")
        print("optimizer                            ms/step  x fused  ms/step  x fused  state  over AdamW  temporary")
        adamw_state = state_bytes(runs[0][1]) / here
        for (name, optimizer, *_), peak, seconds, busy in zip(runs, peaks, wall, cpu, strict=True):
            state = state_bytes(optimizer) / here
            print(
                f"{name:35s}{seconds * 1e3:9.1f}{seconds / wall[0]:9.2f}{busy * 1e3:9.1f}{busy / cpu[0]:9.2f}"
                f"{state:7.2f}{state - adamw_state:12.2f}{peak / here:11.2f}"
            )
        none, every = wall[3] / wall[0], wall[4] / wall[0]
        print(
            f"DiGraP takes {none:.2f} x fused AdamW where no layer is projected, {every:.2f} x where all are;\n"
            f"the per-parameter version takes {wall[-1] / wall[3]:.1f} x and {wall[-1] / wall[4]:.1f} x as long as that"
        )


def main_rank(rank: int, world_size: int, store: str, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    measure("many small tensors", block_shapes(25, 64), repeats)
    measure("large set", block_shapes(25, 512), max(repeats // 2, 4))
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(main_rank, (args.ranks, f"{folder}/store", args.repeats), nprocs=args.ranks)
