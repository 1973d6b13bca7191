"""launch/slurm.sbatch on a real Slurm, with a stand-in for Python: seconds, and every way through the script.

tests/launch/test_slurm_cluster.py has the same with ranks that train.
"""

from __future__ import annotations

from pathlib import Path

from tests.launch.cluster import Cluster, wait_until
from tests.launch.workload import CONFIG, ROOT

PYTHON = """\
#!/bin/bash
# Answers for scale_digrap.launch.node, and stands in for torchrun: what $state/mode says, until a signal comes.
for word in "$@"; do case $word in run_dir=*) run=${word#run_dir=};; esac; done
case "$*" in
  *"launch.node config"*) echo "$run" ;;
  *"launch.node step"*) cat "$4/state/step" ;;
  *torch.distributed.run*)
    stopped() {
      cat "$run/state/step.next" >"$run/state/step"
      echo "{\\"reason\\": \\"$1\\"}" >"$run/STOPPED"
      exit 1  # as torchrun does
    }
    trap 'stopped SIGUSR2' USR2
    trap 'stopped SIGTERM' TERM
    this="try ${SLURM_RESTART_COUNT:-0} $(hostname) gpu $CUDA_VISIBLE_DEVICES logs $PET_LOG_DIR"
    echo "$this: $*" >>"$run/state/agents"
    case $(cat "$run/state/mode") in
      done) echo '{}' >"$run/DONE" ;;
      idle) stopped "SIGTERM" ;;
      file) stopped "the file STOP" ;;
      fail) exit 3 ;;
      wait) while :; do sleep 0.1; done ;;
    esac ;;
esac
"""


class Job:
    """A submitted slurm.sbatch and the files through which the stand-in is told what to do."""

    def __init__(self, cluster: Cluster, folder: Path, mode: str, **settings: str) -> None:
        self.run_dir, self.slurm = folder / "run", cluster.slurm
        (self.run_dir / "state").mkdir(parents=True)
        self.tell(mode)
        self.tell("0", "step")
        self.tell("0", "step.next")
        python = folder / "python"
        python.write_text(PYTHON)
        python.chmod(0o755)
        self.id = self.slurm.submit(
            ROOT / "launch" / "slurm.sbatch",
            str(CONFIG),
            f"run_dir={self.run_dir}",
            options=["--partition=low", "--gres=gpu:1", "--cpus-per-task=1", f"--output={self.run_dir}/out"],
            PYTHON=str(python),
            PROCESSES="1",
            WORKDIR=str(ROOT),
            **settings,
        )

    def tell(self, value: str, name: str = "mode") -> None:
        (self.run_dir / "state" / name).write_text(value + "\n")

    def agents(self, number: int) -> list[str]:
        path = self.run_dir / "state" / "agents"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(f"try {number} ")]

    def wait_for_agents(self, number: int) -> None:
        wait_until(lambda: len(self.agents(number)) == 2, 60, self.story)

    def wait_for(self, *states: str) -> str:
        return wait_until(lambda: (state := self.slurm.state(self.id)) in states and state, 60, self.story)

    def requeued(self, number: int) -> None:
        wait_until(lambda: self.slurm.job(self.id)["Restarts"] == str(number), 60, self.story)
        self.slurm.run_again(self.id)

    def output(self) -> str:
        return (self.run_dir / "out").read_text()

    def story(self) -> str:
        return f"{self.output() if (self.run_dir / 'out').exists() else 'no output'}\n{self.slurm.log()}"


def test_a_signal_before_the_time_limit_requeues_and_the_next_try_is_done(make_cluster, tmp_path):
    job = Job(make_cluster(2, slurm=True), tmp_path, "wait")
    job.wait_for_agents(0)
    job.tell("8", "step.next")
    job.tell("done")
    job.slurm("scancel", "--batch", "--signal=USR2", str(job.id))
    job.requeued(1)
    assert job.wait_for("COMPLETED", "FAILED") == "COMPLETED", job.story()
    for number in (0, 1):
        lines = sorted(job.agents(number))
        assert [line.split(" gpu ")[0] for line in lines] == [f"try {number} node0", f"try {number} node1"]
        for line, host in zip(lines, ("node0", "node1"), strict=True):
            assert f" gpu 0 logs {job.run_dir}/logs/{job.id}.{number}/{host}: " in line
            assert f"--rdzv-endpoint=node0:{20000 + job.id % 10000} --rdzv-id={job.id}.{number} " in line
            assert "--nnodes=2 --nproc-per-node=1 " in line
            assert line.endswith(f"-m scale_digrap train {CONFIG} run_dir={job.run_dir}")
    assert "try 1: train" in job.output()
    assert "from step 8" in job.output()


def test_tries_without_a_newer_checkpoint_are_given_up_and_failures_not_repeated(make_cluster, tmp_path):
    cluster = make_cluster(2, slurm=True)
    fails = Job(cluster, tmp_path / "fails", "fail")  # side by side: it takes a while to be sure that nothing comes
    job = Job(cluster, tmp_path / "idle", "idle", MAX_IDLE_TRIES="2")
    job.requeued(1)
    job.requeued(2)
    assert job.wait_for("COMPLETED", "FAILED") == "FAILED", job.story()
    assert "no checkpoint newer than step 0 in 2 tries: given up" in job.output()
    assert job.agents(1)
    assert not job.agents(2)

    assert fails.wait_for("COMPLETED", "FAILED") == "FAILED", fails.story()
    assert cluster.slurm.job(fails.id)["Restarts"] == "0"
    assert "neither DONE nor STOPPED was written: it failed" in fails.output()


def test_a_run_that_was_stopped_for_good_is_not_requeued(make_cluster, tmp_path):
    job = Job(make_cluster(2, slurm=True), tmp_path, "file")
    assert job.wait_for("COMPLETED", "FAILED") == "FAILED", job.story()
    fields = job.slurm.job(job.id)
    assert (fields["Restarts"], fields["ExitCode"]) == ("0", "75:0")
    assert "stopped for good" in job.output()
