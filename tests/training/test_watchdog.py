"""Hangs and lost ranks: the timeout ends them, and each rank has written where it was and its stacks."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from scale_digrap.training.watchdog import Watchdog, lost_rank
from tests.training.launched import Launched


def places(path):
    """The JSON lines of a watchdog's file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def wait_until(condition, timeout=20.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stuck_here(condition):
    wait_until(condition)


def stall_twice(path):
    with Watchdog(path.parents[1], 3, 0.4) as watchdog:
        watchdog.beat(6, "computing")
        wait_until(lambda: places(path) and places(path)[0]["step"] == 6)
        assert "File" not in path.read_text(), "nothing stalls yet"
        watchdog.beat(7, "waiting for data")
        stuck_here(lambda: "stuck_here" in path.read_text())
        (place,) = places(path)
        assert (place["rank"], place["step"], place["doing"], place["pid"]) == (3, 7, "waiting for data", os.getpid())
        assert place["for_s"] >= 0.4
        time.sleep(0.6)
        assert path.read_text().count("in stuck_here") == 1, "once a stall"
        watchdog.beat(8, "computing")
        stuck_here(lambda: path.read_text().count("in stuck_here") == 2)
        raise KeyError("the end")


def test_a_stall_leaves_the_step_and_the_stacks(tmp_path):
    path = tmp_path / "watchdog" / "rank-3.txt"
    with pytest.raises(KeyError):
        stall_twice(path)
    assert [place["step"] for place in places(path)] == [7, 8, 8]
    assert places(path)[-1]["ended"] == "'the end'"


def test_a_run_that_ends_well_leaves_nothing(tmp_path):
    with Watchdog(tmp_path, 0, 5.0) as watchdog:
        assert (tmp_path / "watchdog" / "rank-0.txt").exists()
        watchdog.beat(1, "computing")
    assert not (tmp_path / "watchdog").exists()
    with Watchdog(tmp_path, 0, 0.0):
        assert not (tmp_path / "watchdog").exists()


def test_an_interpreter_that_is_blocked_is_dumped_all_the_same(tmp_path):
    """A call that keeps the interpreter's lock: no other thread of Python can run."""
    code = f"""
import ctypes, pathlib, time
from scale_digrap.training.watchdog import Watchdog
with Watchdog(pathlib.Path({str(tmp_path)!r}), 0, 0.4) as watchdog:
    watchdog.beat(5, "computing")
    time.sleep(0.3)
    ctypes.PyDLL(None).sleep(30)
"""
    assert ctypes.PyDLL is not ctypes.CDLL
    path = tmp_path / "watchdog" / "rank-0.txt"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        wait_until(lambda: path.exists() and "File" in path.read_text(), timeout=90)
        assert process.poll() is None
        process.kill()
    assert places(path)[0]["step"] == 5
    assert 'File "<string>", line 7 in <module>' in path.read_text()


def test_only_a_failed_collective_is_a_lost_rank():
    assert lost_rank(ValueError("Connection closed by peer"), 0, "in step 3") is None
    assert lost_rank(RuntimeError("shapes do not match"), 0, "in step 3") is None
    error = lost_rank(
        RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), 2, "in step 3, computing"
    )
    assert error is not None
    assert str(error).startswith("rank 2 lost contact with another rank (in step 3, computing)")


def fail_in_step_3(rank, dies):
    from scale_digrap.training import loop

    original, calls = loop.answer_loss, iter(range(1, 100))

    def answer_loss(*args):
        if next(calls) == 3 and rank == 1:
            hang_for_ever() if not dies else os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    loop.answer_loss = answer_loss


def hang_for_ever():
    while True:
        time.sleep(1)


def hanging(rank):
    fail_in_step_3(rank, dies=False)


def dying(rank):
    fail_in_step_3(rank, dies=True)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_a_rank_that_hangs_ends_the_others_in_time(checkpoint, shards, tmp_path, engine):
    """ZeRO has process groups of its own, which know nothing of the timeout of the first one."""
    sharding = {"engine": "deepspeed", "zero": {"stage": 2}} if engine == "zero2" else {}
    training = {"steps": 5, "batch_size": 4, "timeout_s": 12, "stall_s": 3, "sync_check_every": 0}
    run = Launched(
        2, checkpoint("llava"), shards, tmp_path / "run", prepare=hanging, training=training, sharding=sharding
    )
    run.processes[0].join(120)
    assert run.processes[0].exitcode == 5, run.output()
    folder = tmp_path / "run" / "watchdog"
    assert "hang_for_ever" in (folder / "rank-1.txt").read_text()
    assert places(folder / "rank-1.txt")[-1]["step"] == 3
    waiting = places(folder / "rank-0.txt")
    assert [place["step"] for place in waiting][-2:] == [3, 3]
    assert "most recent call first" in (folder / "rank-0.txt").read_text()
    assert "timed out" in waiting[-1]["ended"].lower()
    assert "rank 0 lost contact with another rank (in step 3" in run.output()
    assert "Traceback" not in run.output()
    assert run.wait(0) == [5, None]


@pytest.mark.distributed
def test_a_rank_that_dies_ends_the_others_at_once(checkpoint, shards, tmp_path):
    run = Launched(
        2, checkpoint("llava"), shards, tmp_path / "run", prepare=dying, training={"steps": 5, "batch_size": 4}
    )
    assert run.wait() == [5, -signal.SIGKILL], run.output()
    assert "lost contact with another rank (in step 3" in run.output()
    assert {place["step"] for rank in range(2) for place in places(tmp_path / f"run/watchdog/rank-{rank}.txt")} <= {
        0,
        3,
    }
