"""The launch script starts the real thing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scale_digrap.quickstart import data

ROOT = Path(__file__).resolve().parents[1]


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHON": sys.executable, "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""} | environment
    command = ["bash", str(ROOT / "launch" / "torchrun.sh"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_trains_on_two_ranks(tmp_path: Path):
    pytest.importorskip("easy_vqa")
    built = data.build(tmp_path / "data", train_samples=64, suite_samples=16)
    done = launch(
        str(ROOT / "configs" / "quickstart.yaml"),
        f"run_dir={tmp_path / 'run'}",
        f"data.train=[{built.train[0]}]",
        "training.steps=2",
        "training.batch_size=4",
        "schedule.warmup_steps=1",
        PROCESSES="2",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(step["loss"] > 0 for step in steps)


def test_bad_calls_are_refused_before_anything_starts():
    missing = launch("no/such.yaml")
    assert missing.returncode == 2
    assert "no file no/such.yaml" in missing.stderr
    lonely = launch(str(ROOT / "configs" / "quickstart.yaml"), NODES="2", HOST0="")
    assert lonely.returncode == 2
    assert "HOST0 is not set" in lonely.stderr
