"""launch/slurm.sbatch on a real Slurm: signal, pre-emption and loss of a node end in a requeue, and at last in DONE."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch.cluster import wait_until
from tests.launch.workload import CONFIG, QUICK_RENDEZVOUS, ROOT, STEPS, TRAIN_S, steps_done

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1500)]

OPTIONS = ["--partition=low", "--gres=gpu:1", "--cpus-per-task=1", "--nodes=2", "--time=60"]


def submit(cluster, workload, run_dir: Path) -> int:
    run_dir.mkdir()
    return cluster.slurm.submit(
        ROOT / "launch" / "slurm.sbatch",
        str(CONFIG),
        *workload.overrides(run_dir),
        options=[*OPTIONS, f"--output={run_dir}/job.out"],
        PROCESSES="1",
        RESTARTS="0",
        RDZV_CONF=QUICK_RENDEZVOUS,
        WORKDIR=str(ROOT),
    )


def story(cluster, run_dir: Path) -> str:
    out = run_dir / "job.out"
    return f"{out.read_text()[-6000:] if out.exists() else 'no output'}\n{cluster.slurm.log()}"


def wait_for_step(cluster, run_dir: Path, job: int, step: int) -> None:
    def there() -> bool:
        done = steps_done(run_dir) >= step
        assert done or cluster.slurm.state(job) not in ("FAILED", "COMPLETED"), story(cluster, run_dir)
        return done

    wait_until(there, TRAIN_S, lambda: story(cluster, run_dir))


def wait_for_try(cluster, run_dir: Path, job: int, number: int) -> None:
    """Until the job was requeued, and let it run at once."""
    wait_until(lambda: int(cluster.slurm.job(job)["Restarts"]) >= number, TRAIN_S, lambda: story(cluster, run_dir))
    cluster.slurm.run_again(job, TRAIN_S)


def finish(cluster, workload, run_dir: Path, job: int, tries: int) -> None:
    wait_until(
        lambda: cluster.slurm.state(job) not in ("PENDING", "RUNNING", "COMPLETING"),
        TRAIN_S,
        lambda: story(cluster, run_dir),
    )
    assert cluster.slurm.state(job) == "COMPLETED", story(cluster, run_dir)
    workload.check(run_dir)
    done = json.loads((run_dir / "DONE").read_text())
    assert (done["slurm_job_id"], done["slurm_restart_count"]) == (str(job), str(tries))


def test_a_signal_and_a_pre_emption_each_requeue_the_job_which_goes_on(make_cluster, workload, run_dir):
    cluster = make_cluster(2, slurm=True)
    slurm = cluster.slurm
    job = submit(cluster, workload, run_dir)
    wait_for_step(cluster, run_dir, job, 2)
    # What --signal=B:USR2@120 sends when the time limit is near: to the script alone.
    slurm("scancel", "--batch", "--signal=USR2", str(job))
    wait_for_try(cluster, run_dir, job, 1)
    stopped_at = steps_done(run_dir)
    assert 2 <= stopped_at < STEPS, "nothing was left to go on with: the test shows nothing"

    wait_for_step(cluster, run_dir, job, stopped_at + 2)
    urgent = run_dir / "urgent.sh"
    urgent.write_text("#!/bin/bash\nsleep 1\n")
    other = slurm.submit(urgent, options=["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"])
    wait_for_try(cluster, run_dir, job, 2)
    assert slurm.state(other) == "COMPLETED"
    finish(cluster, workload, run_dir, job, 2)
    assert "handed on to the ranks" in (run_dir / "job.out").read_text()


def test_a_node_that_loses_its_power_requeues_the_job_which_goes_on(make_cluster, workload, run_dir):
    cluster = make_cluster(2, slurm=True)
    job = submit(cluster, workload, run_dir)
    wait_for_step(cluster, run_dir, job, 5)
    cluster[1].power_off()
    wait_until(
        lambda: cluster.slurm.state(job) == "PENDING" and cluster.slurm.node_state(cluster[1]).startswith("DOWN"),
        120,
        lambda: story(cluster, run_dir),
    )
    cluster[1].power_on()
    cluster.slurm.start_node(cluster[1])
    wait_for_try(cluster, run_dir, job, 1)
    finish(cluster, workload, run_dir, job, 1)
