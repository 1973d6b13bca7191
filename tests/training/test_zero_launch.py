"""DeepSpeed from the command line: under its own launcher and torchrun, beside a stale lock, in the quick-start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scale_digrap.evaluation.results import MethodRun
from tests.training import runs

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1300)]

REPOSITORY = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
TORCHRUN += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
DEEPSPEED = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_addr", "127.0.0.1", "--module"]


def run(*command, timeout=400, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", **environment}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, cwd=REPOSITORY)


def test_launchers_and_a_stale_lock(checkpoint, shards, tmp_path):
    """A build that was killed leaves a lock on which every later one would wait for ever: nothing is built."""
    builds = tmp_path / "builds"
    for name in ("deepspeed_shm_comm", "utils", "cpu_adam", "fused_adam"):
        (builds / name).mkdir(parents=True)
        (builds / name / "lock").touch()
    losses = []
    for name, launcher in (("torchrun", [*TORCHRUN, "-m"]), ("deepspeed", DEEPSPEED), ("alone", ["-m"])):
        batch_size = 8 if name == "alone" else 4
        arguments = [f"run_dir={tmp_path / name}", f"model.path={checkpoint('llava')}", f"data.train=[{shards}]"]
        arguments += ["training.steps=2", f"training.batch_size={batch_size}", "training.device=cpu"]
        arguments += ["sharding.engine=deepspeed", "sharding.zero.stage=2"]
        config = tmp_path / "empty.yaml"
        config.write_text("{}\n")
        port = ["--master_port", str(29600 + os.getpid() % 300)] if name == "deepspeed" else []
        command = [*launcher[:-1], *port, launcher[-1], "scale_digrap", "train", config, *arguments]
        done = run(*command, TORCH_EXTENSIONS_DIR=str(builds))
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("Run finished") == 1
        assert "Traceback" not in done.stderr
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["ranks"] == (1 if name == "alone" else 2)
        assert summary["stored_anchors"] > 10
        assert {"deepspeed.json", "final", "config.yaml"} <= set(runs.read_dir(tmp_path / name))
        losses.append(summary["loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert sorted(path.name for path in builds.glob("*/*")) == ["lock"] * 4


def test_quickstart_under_zero_3_runs_to_its_end(tmp_path):
    common = ["-m", "scale_digrap", "quickstart", "--smoke", "--nproc", "2", "--methods", "full-digrap"]
    command = [*common, "--engine", "deepspeed", "--stage", "3", "--output", tmp_path]
    done = run(*command, COLUMNS="160")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ZeRO-3" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert set(json.loads((tmp_path / "results.json").read_text())["table"]) == {
        "zero-shot",
        "full-digrap",
        "full-digrap-wise",
    }
    (folder,) = (tmp_path / "runs").glob("*/results")
    digrap = MethodRun.load(MethodRun.path(folder, "full-digrap", 0))
    assert digrap.telemetry
    assert max(layer["relative_drift"] or 0 for layer in digrap.drift.values()) > 1e-4
    wrong = run("-m", "scale_digrap", "quickstart", "--smoke", "--stage", "2", "--output", tmp_path / "x")
    assert wrong.returncode == 2
    assert "--stage 2" in wrong.stderr
    assert "--engine deepspeed" in wrong.stderr
