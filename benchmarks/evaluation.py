"""`scale-digrap evaluate`'s runner against a plain `model.generate` loop, on one rank and on two.

    python benchmarks/evaluation.py [--repeats 7] [--questions 384] [--batch-size 32] [--model PATH] [--device cpu]

The plain loop is what one would write: read the samples, collate, `generate`, decode, score, keep in a list. The runner
does the same and proves that every question came once, writes each batch to disk before the next, counts for the
progress bar and listens for the other ranks. Both have the same model, samples, batches and settings, and take turns in
one process; a ratio is the median over the repeats of neighbouring turns. CPU time is that of the process with all its
threads, which a busy machine disturbs less than wall time. Two ranks each have a whole model (`engine.name=replicated`)
and share the questions. Predictions are compared.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing as mp
import os
import socket
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from scale_digrap.config import ModelConfig
from scale_digrap.data.dataset import ShardDataset
from scale_digrap.evaluation.predictions import PredictionFiles
from scale_digrap.evaluation.records import read_predictions
from scale_digrap.evaluation.runner import Task, answer, generation_settings
from scale_digrap.evaluation.scorers import scorer
from scale_digrap.evaluation.signals import Signals
from scale_digrap.evaluation.suites import Suite
from scale_digrap.models.loading import load_model

QUESTIONS = ["what color is the shape?", "is there a circle?", "what shape is it?", "how many shapes are there?"]


def write_shards(folder: Path, count: int) -> str:
    """Questions on pictures of 64×64 with the quick-start's vocabulary."""
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "suite.tar", "w") as tar:
        for i in range(count):
            picture = io.BytesIO()
            coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((64, 64)).save(picture, "PNG")
            meta = {"question": QUESTIONS[i % 4], "answers": ["circle", "yes", "red"] * 3 + ["2"], "question_id": i}
            for extension, data in (("png", picture.getvalue()), ("json", json.dumps(meta).encode())):
                info = tarfile.TarInfo(f"{i:06d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(folder / "suite.tar")


def plain_loop(model, collator, dataset, metric: str, settings: dict, batch_size: int, device) -> list[str]:
    """The loop that the runner is measured against."""
    score = scorer(metric)
    kept = []
    with torch.no_grad():
        for start in range(0, len(dataset), batch_size):
            samples = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
            inputs = {name: value.to(device) for name, value in collator.generate(samples).items()}
            tokens = model.generate(**inputs, **settings, pad_token_id=collator.pad_id)
            texts = collator.decode(tokens, inputs["input_ids"].shape[1])
            kept += [(text, score(text, s.answers)) for text, s in zip(texts, samples, strict=True)]
    return [text for text, _ in kept]


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """(wall, CPU) seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def work(rank: int, port: int, folder: str, arguments: argparse.Namespace, results) -> None:
    """One of two ranks; rank 1 waits while rank 0 measures alone."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device, rank) if arguments.device == "cuda" else torch.device("cpu")
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    loaded = load_model(ModelConfig(path=arguments.model, prompt="{question}"))
    model, collator = loaded.model.to(device).eval(), loaded.collator
    dataset = ShardDataset(f"{folder}/suite.tar")
    suite = Suite(name="suite", group="id", shift="none", shards=(f"{folder}/suite.tar",))
    settings = generation_settings({"max_new_tokens": arguments.max_new_tokens})

    def ours(world: int, repeat: int) -> list[str]:
        files = PredictionFiles(Path(folder) / f"{world}-{repeat}", "suite")
        if rank == 0:
            files.begin({})
        if world > 1:
            dist.barrier()
        task = Task(suite, dataset, files, 1, np.arange(len(dataset)))
        answer(
            model, collator, [task], signals=lambda lockstep: Signals(rank, world, lockstep=lockstep),
            dp_rank=rank, dp_world_size=world, device=device, batch_size=arguments.batch_size, generation=settings,
        )  # fmt: skip
        if rank:
            return []
        files.merge(len(dataset))
        return [record.prediction for record in read_predictions(files.merged)]

    def plain() -> list[str]:
        return plain_loop(model, collator, dataset, suite.metric, settings, arguments.batch_size, device)

    if rank == 0:
        assert plain() == ours(1, -1), "the runner and the plain loop answer differently"
    rows = []
    for repeat in range(arguments.repeats):
        row = {}
        if rank == 0:
            turns = [("plain", plain), ("runner", lambda repeat=repeat: ours(1, repeat))]
            for name, turn in turns if repeat % 2 else turns[::-1]:
                row[name] = timed(turn)
        dist.barrier()
        wall, cpu = timed(lambda repeat=repeat: ours(2, repeat))
        shared = torch.tensor([wall, cpu], dtype=torch.float64)
        both = [torch.empty_like(shared) for _ in range(2)]
        dist.all_gather(both, shared)
        row["two"] = (max(float(b[0]) for b in both), sum(float(b[1]) for b in both))
        rows.append(row)
        dist.barrier()
    if rank == 0:
        results.put(rows)
    dist.destroy_process_group()


def median(rows: list[dict], name: str, column: int) -> float:
    return statistics.median(row[name][column] for row in rows)


def ratio(rows: list[dict], over: str, under: str, column: int) -> str:
    values = sorted(row[over][column] / row[under][column] for row in rows)
    return f"{statistics.median(values):.3f} ({values[0]:.2f} to {values[-1]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--questions", type=int, default=384)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="per rank")
    parser.add_argument("--model", default="builtin:tiny-vlm")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), arguments.questions)
        ShardDataset(f"{folder}/suite.tar")  # writes the index
        ranks = [context.Process(target=work, args=(r, port, folder, arguments, results)) for r in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit("a rank failed")
        rows = results.get()
    n = arguments.questions
    print(
        f"{arguments.model}, {n} questions, batches of {arguments.batch_size}, {arguments.max_new_tokens} new tokens, "
        f"{arguments.repeats} repeats, {os.cpu_count()} cores, {arguments.threads} thread per rank, {arguments.device}"
    )
    print(f"{'':24}{'samples/s':>10}{'CPU ms/sample':>15}")
    for name, title in (("plain", "plain loop"), ("runner", "runner, one rank"), ("two", "runner, two ranks")):
        print(f"{title:24}{n / median(rows, name, 0):10.1f}{1000 * median(rows, name, 1) / n:15.2f}")
    print("median ratios of neighbouring turns (smallest to largest):")
    print(f"  speed of the runner / plain loop, one rank, wall: {ratio(rows, 'plain', 'runner', 0)}, target 0.97")
    print(f"  speed of the runner / plain loop, one rank, CPU:  {ratio(rows, 'plain', 'runner', 1)}")
    halves = [{"one": row["runner"], "two": (2 * row["two"][0], row["two"][1])} for row in rows]
    print(f"  parallel efficiency from one rank to two, wall:   {ratio(halves, 'one', 'two', 0)}")
    print(f"  CPU time of one rank / of two together:           {ratio(halves, 'one', 'two', 1)}")


if __name__ == "__main__":
    main()
