"""What scripts ask on a node: processes of a start by their environment, the newest checkpoint, a free port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from scale_digrap.launch import node
from tests.launch.golden_files import ROOT

CONFIG = str(ROOT / "configs" / "quickstart.yaml")


def sleeper(token: str, *, rank: str | None = None, code: str = "", argument: str = "x") -> subprocess.Popen[bytes]:
    program = f"import signal, sys, time\n{code}\nprint('up', flush=True)\ntime.sleep(60)"
    env = {**os.environ, node.TOKEN: token, **({"RANK": rank} if rank is not None else {})}
    process = subprocess.Popen([sys.executable, "-c", program, argument], env=env, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


@pytest.fixture
def started():
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_only_a_starts_own_processes_are_ended(started):
    mine, longer, other = sleeper("job.1"), sleeper("job.12"), sleeper("another")
    started += [mine, longer, other]
    assert [process.pid for process in node.processes("job.1")] == [mine.pid]
    # By another process, as in a script: it is no descendant of what it ends.
    command = [sys.executable, "-m", "scale_digrap.launch.node", "stop", "job.1", "--within", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, node.TOKEN: "job.1"})
    assert done.returncode == 0, done.stderr
    assert mine.wait(5) == -signal.SIGTERM
    assert "1 processes ended, 0 killed" in done.stdout
    assert longer.poll() is other.poll() is None


def test_ranks_are_asked_and_launchers_left_until_they_are_late(started):
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    rank = sleeper("job.2", rank="0")
    launcher = sleeper("job.2", code="signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))")
    started += [rank, launcher]
    ended, killed = node.stop("job.2", 1.0)
    assert rank.wait(5) == -signal.SIGTERM
    assert launcher.wait(5) == -signal.SIGKILL  # SIGTERM was not sent to it
    assert (ended, killed) == (1, 1)

    agent = sleeper(
        "job.3", code="signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))", argument="torch.distributed.run"
    )
    under = sleeper("job.3", rank="0", code=deaf)
    started += [agent, under]
    node.stop("job.3", 1.0)
    assert agent.wait(5) == 9  # torchrun is the one that is asked
    assert under.wait(5) == -signal.SIGKILL

    at_once = sleeper("job.4", rank="0", code=deaf)
    started.append(at_once)
    began = time.monotonic()
    node.stop("job.4", 0)
    assert at_once.wait(5) == -signal.SIGKILL
    assert time.monotonic() - began < 5


def test_the_newest_step_is_that_of_a_committed_checkpoint(tmp_path):
    assert node.newest_step(tmp_path) == 0
    for name in ("step-4", "step-12", "step-20.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert node.newest_step(tmp_path) == 12
    answers = tmp_path / "evaluation" / "predictions" / "zero-shot" / "id.jsonl"
    answers.parent.mkdir(parents=True)
    answers.write_text("{}\n")
    assert node.newest_step(tmp_path / "evaluation") == 3


def test_a_port_in_use_is_named(capsys):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert node.main(["ready", "--port", str(port)]) == 2
        error = capsys.readouterr().err
        assert f"port {port} is in use" in error
        assert error.count("\n") == 1
    assert node.main(["ready", "--port", str(port)]) == 0
    assert capsys.readouterr().out.strip().isdigit()


def test_configurations_are_checked_and_resolved(tmp_path, capsys):
    to = tmp_path / "config.yaml"
    assert node.main(["config", "--to", str(to), "train", "--", CONFIG, "run_dir=/x y", "optimizer.lr=0.5"]) == 0
    assert capsys.readouterr().out == "/x y\n"
    assert node.main(["config", "train", "--", str(to)]) == 0
    assert capsys.readouterr().out == "/x y\n"
    assert node.main(["config", "quickstart", "--", "", "--smoke", "--output", "/q"]) == 0
    assert capsys.readouterr().out == "/q\n"
    for wrong, words in (
        (["optimizer.lrr=1"], "optimizer.lr"),
        (["training.steps=null"], "exactly one of training.steps"),
    ):
        assert node.main(["config", "train", "--", CONFIG, *wrong]) == 2
        assert words in capsys.readouterr().err
