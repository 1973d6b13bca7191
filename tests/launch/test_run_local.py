"""``scale-digrap launch`` with ranks that train the quick-start's model: torchrun here, pdsh over a stand-in for ssh.

Fake hosts with a real sshd are in ``test_deepspeed_cluster.py``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scale_digrap.quickstart import data
from tests.launch.golden_files import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
SSH = """\
#!/bin/bash
# Runs what ssh would run on another host, in a fresh environment as there.
while [[ $1 == -* ]]; do
  case $1 in -o | -p | -l | -i) shift 2 ;; *) shift ;; esac
done
shift  # the host
exec env -i HOME="$HOME" PATH=/usr/bin:/bin bash -c "$*"
"""


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    pytest.importorskip("easy_vqa")
    return data.build(tmp_path_factory.mktemp("data"), train_samples=64, suite_samples=16).train[0]


def launch(
    shard: Path, run: Path, *words: str, steps: int, spec: str, path: str | None = None
) -> subprocess.Popen[str]:
    run.mkdir()
    (run.parent / "spec.yaml").write_text(spec)
    overrides = [
        f"run_dir={run}",
        f"data.train=[{shard}]",
        f"training.steps={steps}",
        "training.batch_size=4",
        "schedule.warmup_steps=1",
        "model.prompt='{question} $HOME'",
    ]
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    env |= {"PATH": f"{path}:{env['PATH']}"} if path else {}
    command = [
        sys.executable,
        "-m",
        "scale_digrap",
        "launch",
        QUICKSTART,
        *overrides,
        "--spec",
        str(run.parent / "spec.yaml"),
    ]
    return subprocess.Popen(
        [*command, *words], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )


def losses(run: Path) -> dict[int, float]:
    lines = (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").exists() else []
    return {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}


def test_torchrun_here_stops_with_a_checkpoint_on_ctrl_c(shard, tmp_path):
    run = tmp_path / "run"
    process = launch(shard, run, steps=2000, spec="name: stop-me\nenvironment: {OMP_NUM_THREADS: '1'}")
    until = time.monotonic() + 200
    while len(losses(run)) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 75, out + err
    stopped = json.loads((run / "STOPPED").read_text())
    assert f"stopped after step {stopped['step']} (SIGTERM)" in out
    assert (run / "checkpoints" / f"step-{stopped['step']}").is_dir()
    assert f"step {stopped['step']}/2000  loss" in err
    for rank in (0, 1):
        assert list((run / "logs" / os.uname().nodename).glob(f"stop-me.*/attempt_0/{rank}/stderr.log"))


def test_deepspeed_over_pdsh_trains_on_two_hosts(shard, tmp_path):
    if shutil.which("pdsh") is None:
        pytest.skip("pdsh is not installed")
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(SSH)
    ssh.chmod(0o755)
    run = tmp_path / "run"
    spec = f"name: two\nnodes: 2\nprocesses_per_node: 1\nhosts: [localhost, 127.0.0.1]\npython: {sys.executable}\n"
    spec += "environment: {HF_AWKWARD: 'a $HOME \"b\" 100%'}\n"
    words = ("--on", "hosts", "--with", "deepspeed", "sharding.engine=deepspeed", "sharding.zero.stage=2")
    process = launch(shard, run, *words, steps=2, spec=spec, path=str(ssh.parent))
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, out + err
    assert "done after step 2" in out
    assert sorted(losses(run)) == [1, 2]
    assert json.loads((run / "summary.json").read_text())["ranks"] == 2
    assert "$HOME" in (run / "config.yaml").read_text()
    assert len(list((run / "logs" / "ranks").glob("*_rank[01].log"))) == 2
    assert (run / "logs" / "deepspeed_env").stat().st_mode & 0o077 == 0
