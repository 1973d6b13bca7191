"""Runs that a scheduler starts: submit to Slurm or Kubernetes, follow, stop when asked, tell how they ended."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from scale_digrap.launch import run
from scale_digrap.launch.follow import Progress, diagnose, outcome, start_stamp
from scale_digrap.launch.plan import Plan, submit_command
from scale_digrap.launch.spec import LaunchError

_POLL_S = 5.0
_CLIENT_S = 120.0
_ENDED = {"Complete": True, "Completed": True, "Failed": False}
"""Conditions of a Job, JobSet or TrainJob that has ended → whether it did all."""


def submit(plan: Plan, *, follow: bool) -> int:
    """Hand a plan to its scheduler and follow it.

    Returns:
        0 done, or only submitted; 75 stopped with a checkpoint; 1 failed.

    Raises:
        LaunchError: no client of the scheduler here, or it refuses.
    """
    client = submit_command(plan).argv[0]
    if shutil.which(client) is None:
        raise LaunchError(f"--on {plan.place}: there is no {client} here; --dry-run prints what it would be given")
    if plan.place == "kubernetes":
        return _kubernetes(plan, follow)
    return _slurm(plan, follow)


def _client(command: Sequence[str], what: str, *, given: str = "") -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_CLIENT_S, input=given)
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{what}: {command[0]} does not answer within {_CLIENT_S:g} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise LaunchError(f"{what}: {lines[-1] if lines else f'exit status {done.returncode}'}")
    return done.stdout


def _slurm(plan: Plan, follow: bool) -> int:
    plan.logs.mkdir(parents=True, exist_ok=True)  # Slurm does not make the folder of --output, and then loses it
    run.write_files(plan)
    stamp = start_stamp(plan.folder)
    job = _client(submit_command(plan).argv, "sbatch refused the job").strip().split(";")[0]
    print(f"submitted as job {job}; its output: {plan.logs}")
    if not follow:
        return 0
    seeds = plan.spec.slurm.array_seeds
    folders = [plan.workload.run_dir / f"seed-{seed}" for seed in seeds] or [plan.workload.run_dir]
    progress = Progress(folders[0], run.total_steps(plan))
    asked = 0
    with run.Requests().taken() as requests:
        looked = 0.0
        states: list[str] = []
        while True:
            if time.monotonic() - looked >= _POLL_S:
                looked = time.monotonic()
                states = _states(job)
                if not states:
                    break
                progress.update(f"job {job}: {', '.join(sorted(states)).lower()}")
            if requests.count > asked:
                asked = requests.count
                _stop_slurm(plan, job, states, folders, asked)
            time.sleep(0.2)
    progress.close()
    if seeds:
        done = [folder.name for folder in folders if outcome(folder, stamp).kind == "done"]
        print(f"{len(done)} of {len(seeds)} seeds are done: {', '.join(done) or 'none'}")
        if len(done) == len(seeds):
            return 0
        run.tell(diagnose(plan.logs, stamp), {})
        return run.FAILED_STATUS
    return run.report(plan, stamp, {})


def _states(job: str) -> list[str]:
    """States of a job's tasks that have not ended. Slurm forgets jobs some minutes after their end."""
    command = ["squeue", "--noheader", "--format=%T", "--jobs", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_CLIENT_S)
    except subprocess.TimeoutExpired:
        return ["UNKNOWN"]
    if done.returncode and "Invalid job id" not in done.stderr:
        return ["UNKNOWN"]  # the controller is restarting
    return done.stdout.split()


def _stop_slurm(plan: Plan, job: str, states: list[str], folders: list[Path], asked: int) -> None:
    if asked == 1 and plan.workload.command == "train" and "RUNNING" in states:
        print("\nstopping: a checkpoint is written first; Ctrl-C once more cancels the job", file=sys.stderr)
        for folder in folders:
            if folder.is_dir():
                (folder / "STOP").touch()
        return
    print(f"\ncancelling job {job}", file=sys.stderr)
    subprocess.run(["scancel", job], check=False, timeout=_CLIENT_S)


def _kubernetes(plan: Plan, follow: bool) -> int:
    spec = plan.spec.kubernetes
    # Not into run_dir, which need not be reachable from here; a Secret comes first, and only through the pipe.
    manifest = "---\n".join(reversed(plan.files.values()))
    namespace = ["--namespace", spec.namespace] if spec.namespace else []
    kubectl = ["kubectl", *namespace]
    print(_client(submit_command(plan).argv, "kubectl refused the manifest", given=manifest), end="")
    name = f"{spec.kind}/{plan.spec.name}"
    pod = f"{plan.spec.name}-{'0' if spec.kind == 'job' else 'node-0-0'}"
    print(f"watch it: {' '.join(kubectl)} get {name}; its output: pods {pod}-…")
    if not follow:
        return 0
    progress = Progress(plan.workload.run_dir, run.total_steps(plan))  # where the volume is mounted here too
    asked = 0
    ended: tuple[bool, str] | None = None
    with run.Requests().taken() as requests:
        looked = 0.0
        while ended is None:
            if time.monotonic() - looked >= _POLL_S:
                looked = time.monotonic()
                ended = _condition([*kubectl, "get", name, "-o", "json"])
                progress.update(_pod_line(kubectl, plan))
            if requests.count > asked:
                asked = requests.count
                if not _stop_kubernetes(kubectl, name, asked):
                    break
            time.sleep(0.2)
    progress.close()
    if ended is None:
        print(f"{name}: suspended or deleted; kubectl patch … suspend: false goes on from the checkpoint")
        return run.STOPPED_STATUS
    done, words = ended
    if done:
        print(f"{name}: done")
        return 0
    lines = _logs(kubectl, plan, 15)
    for line in lines:
        print(f"  | {line}", file=sys.stderr)
    print(f"scale-digrap: failed: {name}: {words}", file=sys.stderr)
    return run.FAILED_STATUS


def _condition(command: list[str]) -> tuple[bool, str] | None:
    """Whether it did all, and why not; None as long as it runs."""
    for condition in json.loads(_client(command, "kubectl get")).get("status", {}).get("conditions") or []:
        if condition.get("status") == "True" and condition.get("type") in _ENDED:
            words = ": ".join(filter(None, (condition.get("reason"), condition.get("message"))))
            return _ENDED[condition["type"]], words
    return None


def _selector(plan: Plan) -> str:
    name, kind = plan.spec.name, plan.spec.kubernetes.kind
    owner = f"batch.kubernetes.io/job-name={name}" if kind == "job" else f"jobset.sigs.k8s.io/jobset-name={name}"
    return f"{owner},batch.kubernetes.io/job-completion-index=0"


def _logs(kubectl: list[str], plan: Plan, count: int) -> list[str]:
    command = [*kubectl, "logs", "--selector", _selector(plan), f"--tail={count}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_CLIENT_S)
    return done.stdout.splitlines()


def _pod_line(kubectl: list[str], plan: Plan) -> str:
    lines = _logs(kubectl, plan, 1)
    return lines[-1][:150] if lines else "waiting for pods"


def _stop_kubernetes(kubectl: list[str], name: str, asked: int) -> bool:
    """Suspending ends the pods with their grace period; whether to go on watching."""
    if asked == 1:
        print("\nsuspending: a checkpoint is written first; Ctrl-C once more deletes the job", file=sys.stderr)
        patch = ["patch", name, "--type", "merge", "-p", '{"spec": {"suspend": true}}']
        _client([*kubectl, *patch], "kubectl patch")
        return False
    _client([*kubectl, "delete", name], "kubectl delete")
    return False
