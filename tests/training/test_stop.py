"""Runs that are asked to stop: by signals, a file, a time limit; what they leave, and that they go on as if never
stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from scale_digrap.config import ConfigError, config_from_dict
from scale_digrap.duration import seconds
from scale_digrap.errors import RunStopped
from scale_digrap.training import manifest
from scale_digrap.training.metrics import read_log
from scale_digrap.training.stop import StopRequests
from tests.training import runs
from tests.training.launched import Launched

ENGINES = {"fsdp2": {}, "zero2": {"engine": "deepspeed", "zero": {"stage": 2}}}
STEPS = 8


def slow(rank, delay=0.3):
    """A step takes as long as it takes to send a signal into it."""
    from scale_digrap.training import loop

    original = loop.answer_loss

    def answer_loss(*args):
        time.sleep(delay)
        return original(*args)

    loop.answer_loss = answer_loss


def sections(engine, **training):
    return {
        "training": {"steps": STEPS, "batch_size": 4, **training},
        "optimizer": {"name": "digrap", "lr": 1e-3},
        "checkpoint": {"save_final": False, "resume": "auto"},
        "data": {"workers": 1},
        "sharding": ENGINES[engine],
    }


def losses(folder):
    return {line["step"]: line["loss"] for line in read_log(folder / "log.jsonl")}


@pytest.mark.parametrize(
    ("text", "expected"), [("3h50m", 13800), ("90m", 5400), ("1d12h", 129600), ("45s", 45), (" 2h ", 7200)]
)
def test_durations(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "3600", "h", "3h50", "-1h", "1h 5m", "0s", "1.5h"])
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match="write for example 3h50m"):
        seconds(text)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"max_time": "soon"}, r"training\.max_time: 'soon'"),
        ({"stop_signals": ["SIGKILL"]}, r"stop_signals must be among SIGTERM.*'SIGKILL'"),
        ({"stall_s": 60, "timeout_s": 60}, r"stall_s=60 must be below training\.timeout_s=60"),
    ],
)
def test_settings_that_cannot_work(training, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict({"training": training})


def requests(folder, **training):
    return StopRequests(config_from_dict({"run_dir": str(folder), "training": training}))


def test_a_signal_is_a_vote_and_nothing_else(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    with requests(tmp_path) as stop:
        assert not any(stop.votes(0))
        for _ in range(2):  # from the launcher and from the scheduler
            os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.votes(1) == stop.votes(0) == [0, 1, 0, 0, 0]
        assert stop.reason([0, 0, 0, 0, 0]) is None
        assert stop.reason([0, 2, 0, 0, 1]) == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_signal_that_came_too_late_is_not_swallowed(tmp_path):
    seen = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
    try:
        with requests(tmp_path):
            os.kill(os.getpid(), signal.SIGUSR2)
            assert not seen
        assert seen == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_loader_process_survives_what_stops_its_rank(tmp_path):
    with requests(tmp_path) as stop:
        child = os.fork()
        if child == 0:
            time.sleep(0.5)
            os._exit(7 if not any(stop.votes(1)) else 8)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_the_clock_and_the_file_are_rank_0s(tmp_path):
    (tmp_path / "STOP").touch()
    stop = requests(tmp_path, max_time="1s", stop_signals=["SIGTERM"])
    assert stop.votes(1) == [0, 0, 0]
    assert stop.votes(0) == [0, 1, 0]
    time.sleep(1.05)
    assert stop.votes(0) == [0, 1, 1]
    assert stop.votes(1) == [0, 0, 0]
    assert stop.reasons[1:] == ["the file STOP", "training.max_time=1s"]


def test_a_launcher_that_restarts_is_not_given_a_failure(tmp_path, monkeypatch):
    arguments = {"step": 3, "reason": "SIGTERM", "checkpoint": None}
    assert requests(tmp_path).stopped(1, **arguments).exit_status == RunStopped.exit_status == 75
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert requests(tmp_path).stopped(1, **arguments).exit_status == 0
    assert not (tmp_path / "STOPPED").exists(), "rank 0's to write"


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_stopped_runs_go_on_as_if_they_had_not(checkpoint, shards, tmp_path, engine):
    model = checkpoint("llava")
    whole = Launched(2, model, shards, tmp_path / "whole", **sections(engine))
    assert whole.wait() == [0, 0], whole.output()
    assert json.loads((tmp_path / "whole" / "DONE").read_text())["step"] == STEPS
    # None by its schedule: the checkpoint of a stop is made for it.
    assert not (tmp_path / "whole" / "checkpoints").exists()

    folder, reached = tmp_path / "run", 0
    for reason in ("SIGTERM", "the file STOP"):
        run = Launched(2, model, shards, folder, prepare=slow, **sections(engine))
        run.wait_for_step(reached + 1)
        assert not (folder / "STOPPED").exists(), "from the time before"
        if reason == "SIGTERM":
            for _ in range(2):
                run.kill(1, signal.SIGTERM)
            run.kill_children(0, signal.SIGTERM)  # a launcher's signal is for loader processes, too
        else:
            (folder / "STOP").touch()
        assert run.wait() == [75, 75], run.output()
        marker = json.loads((folder / "STOPPED").read_text())
        assert marker["reason"] == reason
        assert reached < marker["step"] < STEPS
        reached = marker["step"]
        assert max(losses(folder)) == reached, "the step was finished, and none begun after it"
        assert marker["checkpoint"] == f"step-{reached}"
        assert manifest.problems(folder / "checkpoints" / marker["checkpoint"]) == []
        assert not (folder / "DONE").exists()
        assert not (folder / "STOP").exists()
        assert not (folder / "watchdog").exists()
        assert run.output().count("stopped after step") == 1, "one rank tells it"
        assert "Traceback" not in run.output()
    last = Launched(2, model, shards, folder, **sections(engine))
    assert last.wait() == [0, 0], last.output()
    assert (folder / "DONE").exists()
    assert not (folder / "STOPPED").exists()
    assert losses(folder) == losses(tmp_path / "whole")


@pytest.mark.distributed
def test_the_time_limit_and_a_stop_in_the_last_step(checkpoint, shards, tmp_path):
    model, folder = checkpoint("llava"), tmp_path / "run"
    run = Launched(2, model, shards, folder, prepare=partial(slow, delay=1.0), **sections("fsdp2", max_time="1s"))
    assert run.wait() == [75, 75], run.output()
    marker = json.loads((folder / "STOPPED").read_text())
    assert marker["reason"] == "training.max_time=1s"
    assert marker["step"] <= 2
    # A signal in the last step: what is left to do is left for the next time.
    more = sections("fsdp2", steps=marker["step"] + 1)
    run = Launched(2, model, shards, folder, prepare=partial(slow, delay=3.0), **more)
    deadline = time.monotonic() + 60
    while not (folder / "log.jsonl").exists() or "going on after step" not in run.output():
        assert time.monotonic() < deadline, run.output()
        time.sleep(0.05)
    time.sleep(1.5)
    run.kill(0, signal.SIGUSR2)
    assert run.wait() == [75, 75], run.output()
    assert json.loads((folder / "STOPPED").read_text())["step"] == marker["step"] + 1
    run = Launched(2, model, shards, folder, **more)
    assert run.wait() == [0, 0], run.output()
    assert json.loads((folder / "DONE").read_text())["step"] == marker["step"] + 1


@pytest.mark.distributed
@pytest.mark.slow
def test_under_torchrun_the_marker_tells_what_the_exit_code_does_not(checkpoint, shards, tmp_path):
    from scale_digrap.config import save_config

    save_config(
        runs.config(checkpoint("llava"), shards, tmp_path / "run", **sections("fsdp2", steps=500)), tmp_path / "c.yaml"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", "-m", "scale_digrap", "train"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [*command, str(tmp_path / "c.yaml")], env=environment, cwd=root, stderr=subprocess.PIPE, text=True
    ) as launcher:
        log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 150
        while not log.exists() or len(read_log(log)) < 3:
            assert time.monotonic() < deadline
            assert launcher.poll() is None
            time.sleep(0.1)
        launcher.send_signal(signal.SIGTERM)
        _, told = launcher.communicate(timeout=90)
    assert launcher.returncode != 0
    marker = json.loads((tmp_path / "run" / "STOPPED").read_text())
    assert marker["reason"] == "SIGTERM"
    assert manifest.problems(tmp_path / "run" / "checkpoints" / f"step-{marker['step']}") == []
    assert told.count("stopped after step") == 1
