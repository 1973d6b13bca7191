"""``scale-digrap launch`` on fake hosts: over real ssh with ranks that train, and through a real Slurm."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest

from tests.launch.test_slurm_script import PYTHON
from tests.launch.workload import CONFIG, ROOT, TRAIN_S, outputs, ranks, wait_for_step

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1500)]
LAUNCH = [sys.executable, "-m", "scale_digrap", "launch", str(CONFIG)]


def spec(folder: Path, text: str) -> list[str]:
    path = folder / "launch.yaml"
    path.write_text(text)
    return ["--spec", str(path)]


HOSTS = f"""\
name: by-ssh
nodes: 2
hosts: [node0, node1]
processes_per_node: 1
python: {sys.executable}
restarts: 0
ssh: {{connect_timeout_s: 3}}
environment: {{GREETING: "it's $5"}}
rendezvous: {{last_call_timeout_s: 2, keep_alive_interval_s: 1, keep_alive_attempts: 5}}
"""


def test_hosts_by_ssh_stop_on_ctrl_c_and_go_on(make_cluster, workload, run_dir, tmp_path):
    cluster = make_cluster(2, ssh=True)
    node0, node1 = cluster.hosts
    command = [*LAUNCH, *workload.overrides(run_dir), "--on", "hosts", *spec(tmp_path, HOSTS)]
    node1.unplug()
    refused = node0.run(command, timeout=60, cwd=ROOT)
    assert refused.returncode == 2
    assert "host node1 cannot be reached by ssh" in refused.stdout
    assert not (run_dir / "logs").exists()
    node1.plug()

    first = node0.popen(command, cwd=ROOT)
    wait_for_step(run_dir, 5, [first])
    (remote,) = ranks(node1)
    assert b"GREETING=it's $5" in Path(f"/proc/{remote}/environ").read_bytes().split(b"\0")
    first.signal(signal.SIGINT)
    assert first.wait(TRAIN_S) == 75, outputs([first])
    assert re.search(r"stopped after step \d+ \(SIGTERM\)", first.output())
    assert [ranks(host) for host in cluster.hosts] == [[], []]

    again = node0.popen(command, cwd=ROOT)
    assert again.wait(TRAIN_S) == 0, outputs([again])
    assert f"{run_dir}: done after step" in again.output()
    workload.check(run_dir)


def stage(folder: Path, *runs: Path) -> str:
    """A stand-in for Python that says at once that the runs are done; the launch file that names it."""
    for run in runs:
        (run / "state").mkdir(parents=True)
        for name, value in (("mode", "done"), ("step", "0")):
            (run / "state" / name).write_text(f"{value}\n")
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return f"name: queued\nnodes: 2\npython: {python}\nprocesses_per_node: 1\n"


def test_slurm_is_submitted_and_followed(make_cluster, tmp_path):
    cluster = make_cluster(2, slurm=True)
    run = tmp_path / "run"
    text = stage(tmp_path, run)
    words = [f"run_dir={run}", "--on", "slurm"]
    refused = cluster.control.run([*LAUNCH, *words, *spec(tmp_path, f"{text}slurm: {{partition: none}}")], cwd=ROOT)
    assert refused.returncode == 2
    assert "sbatch refused the job" in refused.stdout
    assert "invalid partition" in refused.stdout.lower()
    command = [*LAUNCH, *words, *spec(tmp_path, f"{text}slurm: {{partition: low}}")]
    done = cluster.control.run(command, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert "submitted as job" in done.stdout
    assert f"{run}: done" in done.stdout
    assert len((run / "state" / "agents").read_text().splitlines()) == 2


def test_an_array_of_seeds_is_one_run_each(make_cluster, tmp_path):
    cluster = make_cluster(2, slurm=True)
    run = tmp_path / "run"
    text = stage(tmp_path, run, *(run / f"seed-{seed}" for seed in (3, 5)))
    words = [f"run_dir={run}", "--on", "slurm"]
    command = [*LAUNCH, *words, *spec(tmp_path, f"{text}slurm: {{partition: low, array_seeds: [3, 5]}}")]
    done = cluster.control.run(command, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert "2 of 2 seeds are done: seed-3, seed-5" in done.stdout
    ports = set()
    for seed in (3, 5):
        agents = (run / f"seed-{seed}" / "state" / "agents").read_text().splitlines()
        assert len(agents) == 2
        assert all(line.endswith(f" run_dir={run}/seed-{seed} training.seed={seed}") for line in agents)
        ports |= {word for line in agents for word in line.split() if word.startswith("--rdzv-endpoint=")}
    assert len(ports) == 2
