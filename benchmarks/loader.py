"""The training loader against plain webdataset and against loose files; resume, jumps, shuffling, size of the state.

    python benchmarks/loader.py [--repeats 3] [--scale 1.0] [--folder DIR]

All loaders do the same work on the same JPEGs: read, parse JSON, decode to RGB with PIL, (resize,) stack to a uint8
tensor. They take turns in one process, some batches each, so that the machine's noise meets all of them; a cell is the
best of the repeats. CPU time is that of the process and of the loader's own processes, which a loaded machine disturbs
less than wall time. Only the ratios mean something elsewhere.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

from scale_digrap.data.dataset import ShardDataset
from scale_digrap.data.decode import ImageDecoder
from scale_digrap.data.index import index_shards, load_index, scan_shard
from scale_digrap.data.loader import TrainLoader
from scale_digrap.data.plan import Plan

BATCH = 64
CHUNK = 8
LOADERS = ("ours", "loose files", "webdataset")


@dataclass(frozen=True)
class Kind:
    """A data set, and how many of its samples a run is warmed up with and timed on: webdataset's buffer of 1000 samples
    per process must be full before the clock starts."""

    samples: int
    size: tuple[int, int]
    per_shard: int
    warm_up: int
    timed: int


KINDS = {
    "64 px": Kind(12_000, (64, 64), 1000, 2304, 4096),
    "224 px": Kind(6000, (224, 224), 1000, 2304, 2048),
    "640×480 → 224": Kind(1600, (640, 480), 200, 256, 512),
}


def picture(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    """A JPEG of smooth colours with some noise, quality 85."""
    width, height = size
    coarse = rng.integers(0, 256, (max(4, height // 16), max(4, width // 16), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = np.clip(smooth + rng.integers(-12, 13, smooth.shape, dtype=np.int16), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def generate(folder: Path, kind: Kind) -> None:
    """The same samples as shards and as loose files."""
    if (folder / "done").exists():
        return
    rng = np.random.default_rng(0)
    pool = [picture(rng, kind.size) for _ in range(200)]
    (folder / "shards").mkdir(parents=True)
    for start in range(0, kind.samples, kind.per_shard):
        loose = folder / "loose" / f"{start // kind.per_shard:03d}"
        loose.mkdir(parents=True)
        with webdataset.TarWriter(str(folder / "shards" / f"vqa-{start // kind.per_shard:06d}.tar"), mtime=0) as tar:
            for i in range(start, min(kind.samples, start + kind.per_shard)):
                meta = {"question_id": i, "question": f"What colour is object {i}?", "answers": [f"a{i % 7}"] * 10}
                data, text = pool[i % len(pool)], json.dumps(meta).encode()
                tar.write({"__key__": f"{i:08d}", "jpg": data, "json": text})
                (loose / f"{i:08d}.jpg").write_bytes(data)
                (loose / f"{i:08d}.json").write_bytes(text)
    index_shards(sorted((folder / "shards").glob("*.tar"))).save(folder / "shards" / "manifest.json")
    (folder / "done").touch()


# The work that all loaders do


def pixels(image: Image.Image, resize: bool) -> torch.Tensor:
    if resize:
        image = image.resize((224, 224), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image))


def make(data: bytes, text: bytes, resize: bool) -> dict:
    meta = json.loads(text)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return {"image": pixels(image, resize), **{name: meta[name] for name in ("question", "answers", "question_id")}}


def stack(samples: list[dict]) -> dict:
    return {
        "image": torch.stack([sample["image"] for sample in samples]),
        **{name: [sample[name] for sample in samples] for name in ("question", "answers", "question_id")},
    }


class Ours:
    def __init__(self, resize: bool) -> None:
        self.resize = resize

    def __call__(self, samples) -> dict:
        return stack(
            [
                {
                    "image": pixels(sample.image, self.resize),
                    "question": sample.question,
                    "answers": sample.answers,
                    "question_id": sample.question_id,
                }
                for sample in samples
            ]
        )


class Loose(torch.utils.data.Dataset):
    def __init__(self, folder: Path, resize: bool) -> None:
        self.files = sorted(str(path) for path in folder.glob("loose/*/*.jpg"))
        self.resize = resize

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        name = self.files[index]
        with open(name, "rb") as image, open(f"{name[:-3]}json", "rb") as text:
            return make(image.read(), text.read(), self.resize)


def batches(loader: str, folder: Path, workers: int, resize: bool, start: int = 0):
    """An iterator over batches, from sample `start` of the loader's own order on."""
    if loader.startswith("ours"):
        decoder = ImageDecoder(target_size=224 if loader == "ours, image_size=224" else None)
        data = ShardDataset(str(folder / "shards"), decoder=decoder)
        ours = TrainLoader(data, batch_size=BATCH, collate=Ours(resize), workers=workers, seed=7)
        if start:
            ours.load_state_dict({**ours.state_dict(), "consumed": start})
        return iter(ours)
    if loader == "loose files":
        files = Loose(folder, resize)
        return iter(
            torch.utils.data.DataLoader(
                files, batch_size=BATCH, shuffle=True, drop_last=True, collate_fn=stack, num_workers=workers
            )
        )
    urls = sorted(str(path) for path in folder.glob("shards/*.tar"))
    samples = webdataset.WebDataset(urls, shardshuffle=100, seed=7, workersplitter=webdataset.split_by_worker)
    samples = samples.shuffle(1000, seed=7)
    if start:
        samples = samples.slice(start // max(1, workers), 1 << 40)  # before decoding: the cheapest way there is
    samples = samples.map(lambda sample: make(sample["jpg"], sample["json"], resize)).batched(BATCH, collation_fn=stack)
    return iter(webdataset.WebLoader(samples, batch_size=None, num_workers=workers))


# Measuring


def children() -> set[int]:
    found: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        found |= set(map(int, Path(f"/proc/self/task/{task}/children").read_text().split()))
    return found


def cpu_seconds(processes: set[int]) -> float:
    return sum(int(Path(f"/proc/{process}/schedstat").read_text().split()[0]) for process in processes) / 1e9


def alternating(
    loaders: list[str], folder: Path, workers: int, resize: bool, warm_up: int, count: int
) -> list[list[float]]:
    """(samples/s, CPU µs per sample) of each loader, all in this process, a chunk of batches of one after a chunk of
    the other. The speed is that of the best chunk; so is the CPU time without loader processes. With them it is that
    of the whole run, the loader's own processes included."""
    sources, owned = [], []
    for loader in loaders:
        before = children()
        sources.append(batches(loader, folder, workers, resize))
        for _ in range(max(1, warm_up // BATCH)):
            next(sources[-1])
        owned.append(children() - before)
    started = [cpu_seconds(processes) for processes in owned]
    speed, cheapest, busy = ([start for _ in loaders] for start in (0.0, float("inf"), 0.0))
    chunks = max(1, count // BATCH // CHUNK)
    for _ in range(chunks):
        for number, source in enumerate(sources):
            cpu = time.process_time()
            for _ in range(2 * workers):
                next(source)  # what has been loaded ahead does not count
            began, own = time.perf_counter(), time.process_time()
            for _ in range(CHUNK):
                next(source)
            speed[number] = max(speed[number], CHUNK * BATCH / (time.perf_counter() - began))
            cheapest[number] = min(cheapest[number], (time.process_time() - own) / (CHUNK * BATCH) * 1e6)
            busy[number] += time.process_time() - cpu
            time.sleep(0.5 if workers else 0)  # until what it loads ahead is there
    if workers:
        done = chunks * (CHUNK + 2 * workers) * BATCH
        for number, processes in enumerate(owned):
            cheapest[number] = (busy[number] + cpu_seconds(processes) - started[number]) / done * 1e6
    return [list(pair) for pair in zip(speed, cheapest, strict=True)]


def first_batch(loader: str, folder: Path, workers: int, start: int) -> list[list[float]]:
    """Seconds from nothing to the first batch at sample `start`, construction and loader processes included."""
    began = time.perf_counter()
    next(batches(loader, folder, workers, False, start))
    return [[time.perf_counter() - began]]


def measure(**job) -> list[list[float]]:
    """Run one measurement in a fresh process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--one", json.dumps(job)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def one(job: dict) -> list[list[float]]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    what = job.pop("what")
    job["folder"] = Path(job["folder"])
    return {"alternating": alternating, "first_batch": first_batch}[what](**job)


# What needs no process of its own


def jump() -> float:
    """Milliseconds to sample 77 777 777 of 100 M in 10 000 shards, from nothing."""
    times = []
    for seed in range(5):
        began = time.perf_counter()
        Plan(np.full(10_000, 10_000), seed=seed, window=16).at(77_777_777)
        times.append(time.perf_counter() - began)
    return min(times) * 1e3


def shuffle_quality() -> list[tuple[str, float]]:
    """Distinct classes per batch of 64, on 20 shards of 1000 samples sorted by 50 classes."""
    from webdataset.filters import _shuffle

    def distinct(order: list[int]) -> float:
        rows = (np.array(order[: len(order) // BATCH * BATCH]) * 50 // 20_000).reshape(-1, BATCH)
        return float(np.mean([len(set(row)) for row in rows.tolist()]))

    results = [("a full permutation", distinct(np.random.default_rng(0).permutation(20_000).tolist()))]
    for size in (1000, 5000):
        shards = list(_shuffle(iter(range(20)), 100, 100, random.Random(1)))
        stream = (i for shard in shards for i in range(shard * 1000, shard * 1000 + 1000))
        results.append((f"webdataset shuffle({size})", distinct(list(_shuffle(stream, size, 100, random.Random(1))))))
    for window in (5, 10, 16, 20):
        plan = Plan([1000] * 20, seed=7, window=window)
        pairs = (plan.at(position) for position in range(20_000))
        results.append((f"ours, window={window}", distinct([shard * 1000 + number for shard, number in pairs])))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="samples timed per cell, relative to the default")
    parser.add_argument("--folder", type=Path, default=None, help="keep the generated data here")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(json.loads(options.one))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        root = options.folder or Path(temporary)
        report(root, options.repeats, options.scale)


def report(root: Path, repeats: int, scale: float) -> None:
    versions = f"torch {torch.__version__}, webdataset {webdataset.__version__}, Pillow {Image.__version__}"
    print(f"{os.cpu_count()} cores, {versions}")
    print(f"batches of {BATCH}; minimum CPU and maximum speed of {repeats} runs\n")
    heads = f"{'samples/s':>10}{'CPU µs/sample':>15}{'CPU / ours':>12}{'time / ours':>13}"
    print(f"{'':16}{'workers':>8}  {'loader':22}{heads}")
    for title, kind in KINDS.items():
        folder = root / title.replace(" ", "")
        generate(folder, kind)
        resize = kind.size == (640, 480)
        loaders = (*LOADERS, "ours, image_size=224") if resize else LOADERS
        for workers in (0, 2):
            job = {"what": "alternating", "loaders": list(loaders), "folder": str(folder), "workers": workers}
            job |= {"resize": resize, "warm_up": kind.warm_up, "count": int(kind.timed * scale)}
            runs = [measure(**job) for _ in range(repeats)]
            columns = zip(loaders, zip(*runs, strict=True), strict=True)
            best = {key: (max(c[0] for c in cells), min(c[1] for c in cells)) for key, cells in columns}
            speed, cost = best["ours"]
            for loader in loaders:
                own_speed, own_cost = best[loader]
                print(
                    f"{title:16}{workers:>8}  {loader:22}{own_speed:>10.0f}{own_cost:>15.0f}{own_cost / cost:>12.2f}"
                    f"{speed / own_speed:>13.2f}",
                    flush=True,
                )
    print("\nfirst batch after a restart at sample 10 000 (64 px), milliseconds, construction included")
    folder = root / "64px"
    for workers in (0, 2):
        for loader in ("ours", "webdataset"):
            job = {"what": "first_batch", "loader": loader, "folder": str(folder), "workers": workers, "start": 9984}
            best_time = min(measure(**job)[0][0] for _ in range(repeats))
            print(f"  {loader:12} {workers} workers {best_time * 1e3:>9.0f}", flush=True)
    print(f"\njump to sample 77 777 777 of 100 M in 10 000 shards, window 16: {jump():.1f} ms")
    loader = TrainLoader(str(folder / "shards"), batch_size=BATCH, collate=list)
    print(f"state: {len(json.dumps(loader.state_dict()))} bytes")
    shard = folder / "shards" / "vqa-000000.tar"
    began = time.perf_counter()
    scan_shard(shard)
    scanned = time.perf_counter() - began
    began = time.perf_counter()
    load_index(shard)
    opened = time.perf_counter() - began
    print(f"index: {scanned / 1000 * 1e6:.0f} µs per sample to make, {opened * 1e6:.0f} µs per shard to open")
    print("\ndistinct classes per batch of 64 on class-sorted shards (20 × 1000 samples, 50 classes)")
    for name, value in shuffle_quality():
        print(f"  {name:28}{value:>6.1f}")


if __name__ == "__main__":
    main()
