"""`scale-digrap evaluate`'s runner against a plain `model.generate` loop, on one rank and on two.

    python benchmarks/evaluation.py [--repeats 9] [--questions 384] [--batch-size 32] [--model PATH] [--device cpu]

The plain loop is what one would write: read the samples, collate, `generate`, decode, score, keep in a list. The runner
does the same and proves that every question came once, writes each batch to disk before the next, counts for the
progress bar and listens for the other ranks. Both have the same model, samples, batches and settings. They take turns
batch by batch in one process, so that the machine's noise meets both; a ratio is the median over neighbouring batches.
What comes once a suite (its folder, merging, reading the result) is timed apart. CPU time is that of the process with
all its threads, which a busy machine disturbs less than wall time. Two ranks each have a whole model
(`engine.name=replicated`) and share the questions. Predictions are compared.
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
from collections.abc import Callable, Iterator
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


def plain_loop(model, collator, dataset, metric: str, settings: dict, batch_size: int, device) -> Iterator[list[str]]:
    """The loop that the runner is measured against; gives the answers of a batch at a time."""
    score = scorer(metric)
    kept = []
    for start in range(0, len(dataset), batch_size):
        with torch.no_grad():
            samples = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
            inputs = {name: value.to(device) for name, value in collator.generate(samples).items()}
            tokens = model.generate(**inputs, **settings, pad_token_id=collator.pad_id)
            texts = collator.decode(tokens, inputs["input_ids"].shape[1])
            kept += [(text, score(text, s.answers)) for text, s in zip(texts, samples, strict=True)]
        yield texts


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

    def ours(world: int, repeat: int, after_batch: Callable[[], None] | None = None) -> list[str]:
        files = PredictionFiles(Path(folder) / f"{world}-{repeat}", "suite")
        if rank == 0:
            files.begin({})
        if world > 1:
            dist.barrier()
        task = Task(suite, dataset, files, 1, np.arange(len(dataset)))
        answer(
            model, collator, [task], signals=lambda lockstep: Signals(rank, world, lockstep=lockstep),
            dp_rank=rank, dp_world_size=world, device=device, batch_size=arguments.batch_size, generation=settings,
            progress=None if after_batch is None else lambda *_: after_batch(),
        )  # fmt: skip
        if rank:
            return []
        files.merge(len(dataset))
        return [record.prediction for record in read_predictions(files.merged)]

    def by_turns(repeat: int) -> dict:
        """Batches of the runner, and after each the same one of the plain loop."""
        pairs, answers = [], []
        batches = plain_loop(model, collator, dataset, suite.metric, settings, arguments.batch_size, device)
        mark = [time.perf_counter(), time.process_time()]

        def after_batch() -> None:
            runner = (time.perf_counter() - mark[0], time.process_time() - mark[1])
            pairs.append((runner, timed(lambda: answers.extend(next(batches)))))
            mark[:] = time.perf_counter(), time.process_time()

        wall, cpu = timed(lambda: answers.append(ours(1, repeat, after_batch)))
        assert answers.pop() == answers, "the runner and the plain loop answer differently"
        once = []
        for column, total in enumerate((wall, cpu)):
            first, *rest = [runner[column] for runner, _ in pairs]  # the first one's time holds part of what comes once
            once.append(total - sum(part[column] for pair in pairs for part in pair) + first - statistics.median(rest))
        return {"pairs": pairs[1:], "once": once}

    rows = []
    for repeat in range(-1, arguments.repeats):
        row = by_turns(repeat) if rank == 0 else {}
        dist.barrier()
        if rank == 0:
            row["one"] = timed(lambda repeat=repeat: ours(1, repeat + 10_000))
        dist.barrier()
        wall, cpu = timed(lambda repeat=repeat: ours(2, repeat))
        shared = torch.tensor([wall, cpu], dtype=torch.float64)
        both = [torch.empty_like(shared) for _ in range(2)]
        dist.all_gather(both, shared)
        row["two"] = (max(float(b[0]) for b in both), sum(float(b[1]) for b in both))
        if repeat >= 0:  # the one before warms up
            rows.append(row)
        dist.barrier()
    if rank == 0:
        results.put(rows)
    dist.destroy_process_group()


def spread(values: list[float]) -> str:
    low, _, high = statistics.quantiles(values, n=4)
    return f"{statistics.median(values):.3f} (quartiles {low:.2f}, {high:.2f}; {len(values)} pairs)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
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
    pairs = [pair for row in rows for pair in row["pairs"]]
    size = arguments.batch_size
    print(f"{'':24}{'samples/s':>10}{'CPU ms/sample':>15}")
    for title, turn in (("plain loop", 1), ("runner, one rank", 0)):
        wall, cpu = (statistics.median(pair[turn][column] for pair in pairs) for column in range(2))
        print(f"{title:24}{size / wall:10.1f}{1000 * cpu / size:15.2f}")
    wall, cpu = (1000 * statistics.median(row["once"][column] for row in rows) for column in range(2))
    print(f"once a suite: {wall:.0f} ms, {cpu:.0f} ms of CPU")
    for column, kind, target in ((0, "wall", ", target 0.97"), (1, "CPU", "")):
        ratios = [pair[1][column] / pair[0][column] for pair in pairs]
        print(f"speed of the runner / plain loop, one rank, {kind + ':':5} {spread(ratios)}{target}")
    wall = [row["one"][0] / (2 * row["two"][0]) for row in rows]
    cpu = [row["one"][1] / row["two"][1] for row in rows]
    print(f"parallel efficiency from one rank to two, wall:   {spread(wall)}")
    print(f"CPU time of one rank / of two together:           {spread(cpu)}")


if __name__ == "__main__":
    main()
