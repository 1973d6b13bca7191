"""Evaluations that are killed, stopped, or lose a rank: what is answered stays, and the end is the same file."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from scale_digrap.evaluation.predictions import PredictionFiles, PredictionsError
from scale_digrap.evaluation.records import Record
from tests.evaluation import evaluations
from tests.evaluation.evaluations import overrides, predictions, run_evaluation
from tests.training.launched import LaunchedCommand

WITHIN_S = 45.0
"""From the failure to the end of all ranks, on a busy machine; a rank that hangs waits 1800 s."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    evaluations.make_suites(folder / "suites")
    evaluations.make_base(folder / "base")
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, bytes]:
    """What an evaluation writes that nothing disturbs."""
    run_evaluation(arguments(folder, "whole"))
    return predictions(folder / "whole")


def arguments(folder: Path, out: str, *more: str) -> list[str]:
    return overrides(folder, out, *more, base=f"{{path: {folder / 'base'}}}")


def launch(folder: Path, out: str, *more: str, prepare=None) -> LaunchedCommand:
    config = folder / f"{out}-{time.monotonic_ns()}"
    config.mkdir()
    (config / "config.yaml").write_text("{}")
    return LaunchedCommand(
        2, ["evaluate", str(config / "config.yaml"), *arguments(folder, out, *more)], config, prepare
    )


def answered(folder: Path, out: str) -> list[int]:
    """Indices in the parts, in order, twice where they are there twice."""
    parts = (folder / out / "predictions").rglob("attempt-*.jsonl")
    lines = [line for path in parts for line in path.read_bytes().split(b"\n")]
    return sorted(json.loads(line)["index"] for line in lines if line.endswith(b"}"))


def die_while_writing(rank: int) -> None:
    """SIGKILL in the middle of a line of the second batch."""
    from scale_digrap.evaluation import predictions

    write, calls = os.write, []

    def torn(descriptor: int, data: bytes) -> int:
        if b'"prediction"' not in data[:200]:
            return write(descriptor, data)
        calls.append(1)
        if len(calls) == 2:
            write(descriptor, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(descriptor, data)

    predictions.os.write = torn  # type: ignore[attr-defined]


def fail_in_generation(rank: int) -> None:
    """Rank 1 fails in its third batch."""
    if rank != 1:
        return
    from transformers import GenerationMixin

    generate, calls = GenerationMixin.generate, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("the device has fallen off the bus")
        return generate(*args, **kwargs)

    GenerationMixin.generate = failing  # type: ignore[method-assign]


def take_time(rank: int) -> None:
    """Every batch takes a while, and much longer on rank 1."""
    from scale_digrap.evaluation.predictions import PartWriter

    write = PartWriter.write

    def slow(self, records):
        time.sleep(1.5 if rank == 1 else 0.3)
        write(self, records)

    PartWriter.write = slow  # type: ignore[method-assign]


@pytest.mark.distributed
def test_killed_in_the_middle_of_a_line_and_resumed_on_another_number_of_ranks(dist_pool, folder: Path, whole):
    killed = launch(folder, "killed", prepare=die_while_writing)
    codes = killed.wait()  # a rank that has not died yet may notice that the other has
    assert -signal.SIGKILL in codes, killed.output()
    assert set(codes) <= {-signal.SIGKILL, 5}, killed.output()
    before = answered(folder, "killed")
    assert len(before) == len(set(before)) >= 4
    assert not predictions(folder / "killed").keys() & whole.keys()
    parts = {path: path.read_bytes() for path in (folder / "killed").rglob("attempt-*.jsonl")}
    assert any(not content.endswith(b"\n") for content in parts.values()), "nothing was torn"

    dist_pool(3).run(run_evaluation, arguments(folder, "killed", "batch_size=3"))
    assert predictions(folder / "killed") == whole
    assert not list((folder / "killed").rglob("*.parts"))


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["replicated", "fsdp"])
def test_one_ranks_exception_ends_all_with_that_error(folder: Path, whole, engine: str):
    failed = launch(folder, f"failed-{engine}", f"engine.name={engine}", prepare=fail_in_generation)
    failed.wait_until(lambda: len(answered(folder, f"failed-{engine}")) >= 8)
    began = time.monotonic()
    assert failed.wait() == [5, 5], failed.output()
    assert time.monotonic() - began < WITHIN_S
    output = failed.output()
    told = "failed on rank 1: ValueError: the device has fallen off the bus"
    assert output.count(told) >= 2, output
    assert 'raise ValueError("the device has fallen off the bus")' in output, "the traceback of the rank that failed"
    assert not (folder / f"failed-{engine}" / "DONE").exists()

    kept = len(answered(folder, f"failed-{engine}"))
    assert kept >= 8
    run_evaluation(arguments(folder, f"failed-{engine}", "batch_size=5"))
    assert predictions(folder / f"failed-{engine}") == whole


@pytest.mark.distributed
@pytest.mark.parametrize(("engine", "rank"), [("fsdp", 1), ("replicated", 0)])
def test_a_signal_to_one_rank_stops_all_after_their_batch(folder: Path, whole, engine: str, rank: int):
    """Also where rank 0, whose process holds the store, is through with its batch long before the other."""
    out = f"stopped-{engine}"
    stopped = launch(folder, out, f"engine.name={engine}", "batch_size=2", prepare=take_time)
    stopped.wait_until(lambda: len(answered(folder, out)) >= 4)
    stopped.kill(rank, signal.SIGTERM)
    assert stopped.wait() == [75, 75], stopped.output()
    assert "the same command goes on from there" in stopped.output()
    assert json.loads((folder / out / "STOPPED").read_text())["reason"] == "SIGTERM"
    there = answered(folder, out)
    assert 4 <= len(there) < sum(evaluations.COUNTS.values())
    run_evaluation(arguments(folder, out))
    assert predictions(folder / out) == whole
    assert not (folder / out / "STOPPED").exists()
    assert (folder / out / "DONE").exists()


def test_files_of_predictions(tmp_path: Path):
    files = PredictionFiles(tmp_path, "id")
    settings = {"checkpoint": {"sha256": "a"}, "alpha": 1.0}
    assert not files.check(settings)
    records = [(i, Record(f"q{i}", "answer\n\u2028\ud800", ["a"], 0.1 * i)) for i in range(6)]
    attempt = files.begin(settings)
    writer = files.writer(attempt, 0)
    writer.write([records[4], records[1]])
    writer.close()
    with open(writer.path, "ab") as file:
        file.write(b'{"index": 2, "question_id": "q2", "pre')
    assert files.check(settings)
    done, torn = files.done()
    assert done.tolist() == [1, 4]
    assert done.dtype == np.int64
    assert torn == 1
    with pytest.raises(PredictionsError, match=r'checkpoint.sha256: "a" → "b"'):
        files.check({"checkpoint": {"sha256": "b"}, "alpha": 1.0})
    with pytest.raises(PredictionsError, match="2 of 6 answers"):
        files.merge(6)
    assert files.begin(settings) == attempt + 1
    second = files.writer(attempt + 1, 1)
    second.write([records[i] for i in (5, 0, 3, 2)])
    second.close()
    files.merge(6)
    assert not files.parts.exists()
    assert [json.loads(line)["index"] for line in files.merged.read_text().splitlines()] == list(range(6))
    third = PredictionFiles(tmp_path, "twice")
    for attempt_, prediction in ((third.begin(settings), "x"), (2, "y")):
        writer = third.writer(attempt_, 0)
        writer.write([(0, Record("q", prediction, ["a"], 1.0))])
        writer.close()
    with pytest.raises(PredictionsError, match="two different answers to question 0"):
        third.merge(1)
