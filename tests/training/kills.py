"""Runs that are killed at random points and resumed, many side by side, and the table of what became of them.

``python -m tests.training.kills --summarise FILE`` prints the table of a report that ``--kill-report FILE`` has made.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scale_digrap.runtime.logs import scan_log
from scale_digrap.training import manifest
from tests.training.killed_run import (
    AT_RESUME,
    AT_THE_END,
    IN_A_SAVE,
    IN_STEPS,
    MOMENT,
    ON_RANK_0,
    POINTS,
    Kill,
    RunError,
    leftovers,
    start,
)

STEPS = 5
WORLD = 2
ENGINES: dict[str, dict[str, Any]] = {
    "fsdp2": {},
    "zero1": {"engine": "deepspeed", "zero": {"stage": 1}},
    "zero3": {"engine": "deepspeed", "zero": {"stage": 3}},
}
RESTARTED, LOST, WRONG, FAILED, HUNG, NOT_REACHED = (
    "restarted", "lost", "silently wrong", "did not resume", "hung", "not reached",
)  # fmt: skip
"""Besides ``step K``: went on from there, with the uninterrupted run's losses, samples and parameters bit by bit."""


def survived(outcome: str) -> bool:
    """Whether nothing was lost: the run went on after its newest checkpoint, or anew where there was none yet."""
    return outcome.startswith("step ") or outcome == RESTARTED


@dataclass(frozen=True)
class Whole:
    """The uninterrupted run of an engine: what each rank reports, and how long it took."""

    ranks: list[dict[str, Any]]
    seconds: float


@dataclass(frozen=True)
class Row:
    """One kill and what became of it."""

    seed: int
    engine: str
    point: str
    call: int
    rank: int | None
    background: bool
    outcome: str
    seconds: float
    detail: str = ""
    commit: str = ""


def sections(engine: str, background: bool = False, world: int = WORLD) -> dict[str, Any]:
    """The configuration of the run that is killed."""
    return {
        "training": {"steps": STEPS, "batch_size": 4 // world},
        "optimizer": {"name": "digrap", "lr": 1e-3, "omega_lr": 0.05},
        "checkpoint": {"every": 1, "keep": 2, "save_final": False, "resume": "auto", "background": background},
        "log": {"layers_every": 1, "progress": False},
        "sharding": ENGINES[engine],
    }


def uninterrupted(engine: str, model: str, shards: str, folder: Path) -> Whole:
    """The run that nobody kills."""
    began = time.monotonic()
    ranks = start(WORLD, model, shards, folder, sections(engine))
    assert ranks is not None
    return Whole(ranks, time.monotonic() - began)


def draw(seed: int, whole: Mapping[str, Whole]) -> tuple[Kill, str, bool]:
    """A kill, an engine, and whether checkpoints are written in the background; the same for the same seed.

    A moment is drawn as a fraction of the uninterrupted run and rounded to milliseconds.
    """
    chance = random.Random(seed)
    engine = chance.choice(list(ENGINES))
    background = chance.random() < 0.4
    stage = chance.choices((IN_STEPS, IN_A_SAVE, AT_RESUME, AT_THE_END, {MOMENT: 1}), (4, 9, 4, 2, 5))[0]
    point = chance.choice(list(stage))
    rank = 0 if point in ON_RANK_0 else chance.choice([0, 1, None])
    if point == MOMENT:
        return Kill(MOMENT, round(1000 * chance.uniform(0.05, 0.95) * whole[engine].seconds), rank), engine, background
    calls = stage[point] if rank != 1 else min(stage[point], STEPS)  # rank 1 writes one file per save
    return Kill(point, chance.randint(1, calls), rank), engine, background


def survive(
    kill: Kill, engine: str, background: bool, model: str, shards: str, folder: Path, whole: Whole
) -> tuple[str, str]:
    """Kill a run, resume it, compare; returns the outcome, and what is wrong where something is."""
    arguments = (model, shards, folder, sections(engine, background))
    try:
        # Die first in a step, then again while loading.
        if kill.point in AT_RESUME and start(WORLD, *arguments, kill=Kill("forward", 4)) is not None:
            return NOT_REACHED, "the first of two kills"
        if start(WORLD, *arguments, kill=kill) is not None:
            return NOT_REACHED, ""
        before = manifest.checkpoints(folder / "checkpoints")
        # What is committed is whole, whenever the run died.
        torn = [f"{path.name}: {manifest.problems(path)[0]}" for _, path in before if manifest.problems(path)]
        if torn:
            return LOST, f"committed, but not whole: {torn[0]}"
        again = start(WORLD, *arguments)
    except TimeoutError as error:
        return HUNG, str(error)
    except RunError as error:
        return FAILED, str(error)
    assert again is not None
    taken = len(again[0]["keys"])
    resumed, newest = STEPS - taken, before[-1][0] if before else 0
    wrong = next(_differences(again, whole.ranks, taken), None)
    if wrong is not None:
        return WRONG, f"went on after step {resumed}: {wrong}"
    if resumed != newest:
        # Nothing that was committed is trained again: at most what came after the last checkpoint is lost.
        return LOST, f"went on after step {resumed}, the newest checkpoint was that of step {newest}"
    missing = next(_missing(folder, whole.ranks[0]["loss"]), None)
    if missing is not None:
        return LOST, f"went on after step {resumed}: {missing}"
    return f"step {resumed}" if resumed else RESTARTED, ""


def _differences(again: list[dict[str, Any]], whole: list[dict[str, Any]], taken: int) -> Iterator[str]:
    for rank, (mine, expected) in enumerate(zip(again, whole, strict=True)):
        if mine["loss"] != expected["loss"]:
            yield f"rank {rank}: losses {mine['loss']}, of the uninterrupted run {expected['loss']}"
        if mine["keys"] != expected["keys"][STEPS - taken :]:
            yield f"rank {rank}: other samples than without the kill"
        for name, value in expected["parameters"].items():
            if not np.array_equal(mine["parameters"][name], value):
                yield f"rank {rank}: {name} is off by {np.abs(mine['parameters'][name] - value).max():.1e}"


def _missing(folder: Path, losses: list[float]) -> Iterator[str]:
    """What a finished run has in its folder, and this one has not."""
    if names := leftovers(folder / "checkpoints"):
        yield f"left behind: {', '.join(names)}"
    steps = [step for step, _ in manifest.checkpoints(folder / "checkpoints")]
    if steps != [STEPS - 1, STEPS]:
        yield f"checkpoints of steps {steps}"
    every_step = list(range(1, STEPS + 1))
    for name in ("log.jsonl", "layers.jsonl"):
        log = scan_log(folder / name)
        if [line["step"] for line in log.records] != every_step or log.odd:
            yield f"{name} has steps {[line['step'] for line in log.records]}, and {log.odd} odd lines"
        if name == "log.jsonl" and [line["loss"] for line in log.records] != losses:
            yield f"{name} has the losses {[line['loss'] for line in log.records]}"
    for name, key in (("DONE", "step"), ("summary.json", "steps")):
        if not (folder / name).is_file() or json.loads((folder / name).read_text())[key] != STEPS:
            yield f"{name} is not that of step {STEPS}"


def matrix(
    seeds: Iterable[int],
    model: str,
    shards: str,
    folder: Path,
    whole: Mapping[str, Whole],
    *,
    jobs: int | None = None,
    budget: float | None = None,
    report: Path | None = None,
) -> list[Row]:
    """Kill, resume and compare once per seed, several side by side.

    Args:
        seeds: see :func:`draw`; those that the report has already are left out.
        model, shards: what is trained on what.
        folder: for the runs; that of a run that survives is deleted.
        whole: of every engine, see :func:`uninterrupted`.
        jobs: kills at a time; by default the number of cores.
        budget: seconds; nothing new is begun after that.
        report: a file to which rows are appended as they come, a JSON object per line.

    Returns:
        This call's rows, in order of the seeds.
    """
    known = {row.seed for row in read_report(report)} if report is not None and report.is_file() else set()
    ends = None if budget is None else time.monotonic() + budget
    lock = threading.Lock()
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()

    def one(seed: int) -> Row | None:
        began = time.monotonic()
        if ends is not None and began >= ends:
            return None
        kill, engine, background = draw(seed, whole)
        place = folder / f"kill-{seed}"
        outcome, detail = survive(kill, engine, background, model, shards, place, whole[engine])
        seconds = round(time.monotonic() - began, 1)
        row = Row(seed, engine, kill.point, kill.call, kill.rank, background, outcome, seconds, detail, commit)
        if survived(outcome) or outcome == NOT_REACHED:
            shutil.rmtree(place, ignore_errors=True)
        if report is not None:
            with lock, open(report, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
        return row

    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        rows = list(pool.map(one, [seed for seed in seeds if seed not in known]))
    return [row for row in rows if row is not None]


def read_report(path: Path) -> list[Row]:
    """The rows of a report, by seed; a line that a kill of this program has torn is left out."""
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = Row(**json.loads(line))
        except (ValueError, TypeError):
            continue
        rows[row.seed] = row
    return [rows[seed] for seed in sorted(rows)]


def summarise(rows: Iterable[Row]) -> str:
    """Points × engines with the outcomes of each, the totals, and a line for every kill that was not survived."""
    rows = list(rows)
    order = [*POINTS, MOMENT]
    outcomes = sorted({row.outcome for row in rows}, key=lambda name: (not survived(name), name))

    def told(found: Counter[str]) -> str:
        return ", ".join(f"{name} ×{found[name]}" if found[name] > 1 else name for name in outcomes if found[name])

    def cell(matches: Callable[[Row], bool]) -> str:
        return told(Counter(row.outcome for row in rows if matches(row)))

    table = [["killed at", *ENGINES]]
    for point in order:
        if any(row.point == point for row in rows):
            cells = [cell(lambda row, p=point, e=engine: (row.point, row.engine) == (p, e)) for engine in ENGINES]  # type: ignore[misc]
            table.append([point, *cells])
    table.append(["all", *(str(sum(row.engine == engine for row in rows)) for engine in ENGINES)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip() for line in table]
    good = sum(survived(row.outcome) for row in rows)
    counts = Counter("step K" if row.outcome.startswith("step ") else row.outcome for row in rows)
    commits = Counter(row.commit for row in rows)
    lines += [
        "",
        f"{len(rows)} kills, {good} survived, {counts[NOT_REACHED]} not reached, "
        f"{len(rows) - good - counts[NOT_REACHED]} not survived; {sum(row.background for row in rows)} with a "
        f"background writer; {sum(row.seconds for row in rows) / 60:.0f} minutes of runs",
        "outcomes: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()),
        "commits: " + ", ".join(f"{name or '?'} {count}" for name, count in commits.most_common()),
    ]
    drawn = {row.point for row in rows}
    if len(drawn) < len(order):
        lines.append("points that no seed has drawn: " + ", ".join(point for point in order if point not in drawn))
    lines += [
        f"seed {row.seed}: {row.engine}, {row.point} (call {row.call}, rank {row.rank}, background {row.background}): "
        f"{row.outcome}: {row.detail}"
        for row in rows
        if not survived(row.outcome) and row.outcome != NOT_REACHED
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the table of a report."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--summarise", type=Path, required=True, metavar="FILE", help="what --kill-report has written")
    print(summarise(read_report(parser.parse_args().summarise)))


if __name__ == "__main__":
    main()
