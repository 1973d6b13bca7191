"""Other hosts, before and beside a run: can each be reached and take part; the preflight; asking a run to stop."""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scale_digrap.launch.exchange import SECRET
from scale_digrap.launch.plan import ENVIRONMENT_FILE, Command, Plan, ssh
from scale_digrap.launch.spec import LaunchError

_NODE = "scale_digrap.launch.node"
SSH_FAILED = 255
"""What ssh ends with when it is not the command's own status."""
_ASK_S = 120.0
_PREFLIGHT_S = 600.0


def ready(plan: Plan) -> dict[str, int]:
    """GPUs of every host, when all can be reached and can take part.

    Raises:
        LaunchError: the first host that cannot, why, and what to do.
    """
    port = plan.spec.port

    def ask(place: int) -> int:
        arguments = ["ready"]
        if place == 0 and (plan.launcher == "deepspeed" or plan.spec.rendezvous.store == "tcp"):
            arguments += ["--port", str(port)]
        done = _on_host(plan, plan.hosts[place], arguments, _ASK_S)
        host = plan.hosts[place]
        words = _last_words(done)
        if done.returncode == SSH_FAILED:
            raise LaunchError(
                f"host {host} cannot be reached by ssh ({words}): `ssh -o BatchMode=yes {host} true` must work from "
                f"here, or take the host out of the launch file"
            )
        if done.returncode:
            raise LaunchError(f"host {host} cannot take part: {words}")
        return int(done.stdout.split()[-1])

    return dict(zip(plan.hosts, _each(ask, len(plan.hosts)), strict=True))


def wait_command(plan: Plan, host: str, start_id: str) -> Command:
    """Ends when no process of the start is left on a host."""
    return ssh(plan.spec, host, _there(plan, Command([plan.spec.python, "-m", _NODE, "wait", start_id])))


def ask_to_stop(plan: Plan, start_id: str, within_s: float) -> None:
    """Ends a start's processes on every host, with a checkpoint where ``within_s`` is above 0."""
    _each(lambda place: _stop_one(plan, plan.hosts[place], start_id, within_s), len(plan.hosts))


def _stop_one(plan: Plan, host: str, start_id: str, within_s: float) -> None:
    done = _on_host(plan, host, ["stop", start_id, "--within", f"{within_s:g}"], within_s + _ASK_S)
    text = done.stdout.strip() or ("" if done.returncode == 0 else f"{host}: {_last_words(done)}")
    if text:
        print(text, file=sys.stderr)


def preflight(plan: Plan) -> int:
    """Run the preflight from here, as many processes as hosts; 0, or 2 where something is wrong.

    Raises:
        LaunchError: on Kubernetes, where nothing runs outside a job.
    """
    workload, spec = plan.workload, plan.spec
    if workload.command != "train":
        raise LaunchError(f"the preflight checks what training needs; --command is {workload.command}")
    if plan.place == "kubernetes":
        raise LaunchError("--check --on kubernetes: set preflight: true, and the pods check each other before training")
    script = [spec.python, "-m", "scale_digrap.launch.preflight"]
    processes = [] if spec.processes_per_node == "auto" else ["--processes", spec.processes_per_node]
    arguments = [workload.config, *workload.overrides]
    if plan.place == "slurm":
        slurm = spec.slurm
        options = [f"--nodes={spec.node_range[1]}", "--ntasks-per-node=1", f"--job-name={spec.name}-check"]
        options += [f"--partition={slurm.partition}"] if slurm.partition != "default" else []
        options += [f"--account={slurm.account}"] if slurm.account else []
        options += [f"--gres=gpu:{slurm.gpus_per_node}"] if slurm.gpus_per_node else []
        options += [option for option in slurm.extra if option.startswith("--")]
        command = ["srun", "--wait=60", *options, *script, *processes, "--scheduler", "slurm", *arguments]
        # srun hands its environment on to every node.
        signed = {SECRET: secrets.token_hex(16), **os.environ, **spec.environment}
        return _worst([subprocess.run(command, env=signed, check=False).returncode])
    if plan.place == "local":
        return _worst([subprocess.run([*script, *processes, *arguments], check=False).returncode])
    names = ",".join(plan.hosts)
    shared = [*processes, "--hosts", names, "--endpoint", f"{plan.hosts[0]}:{spec.port}", "--scheduler", "hosts"]

    def check(place: int) -> int:
        host = plan.hosts[place]
        command = Command([*script, "--rank", str(place), *shared, *arguments])
        try:
            done = _run(ssh(spec, host, _there(plan, command)), _PREFLIGHT_S)
        except subprocess.TimeoutExpired:
            raise LaunchError(f"host {host}: the preflight did not end in {_PREFLIGHT_S:g} s") from None
        if place == 0:  # it speaks for all
            print(done.stdout, end="")
        if done.returncode:
            print(done.stderr, end="", file=sys.stderr)
        return done.returncode

    return _worst(_each(check, len(plan.hosts)))


def _worst(statuses: Sequence[int]) -> int:
    return 2 if any(statuses) else 0


def _on_host(plan: Plan, host: str, arguments: Sequence[str], limit_s: float) -> subprocess.CompletedProcess[str]:
    command = Command([plan.spec.python, "-m", _NODE, *arguments])
    try:
        return _run(ssh(plan.spec, host, _there(plan, command)), limit_s)
    except subprocess.TimeoutExpired:
        raise LaunchError(f"host {host} does not answer within {limit_s:g} s: is its file system there?") from None


def _there(plan: Plan, command: Command) -> str:
    """A command in the folder and with the variables that the run has on another host."""
    environment = plan.folder.absolute() / ENVIRONMENT_FILE
    workdir = plan.spec.workdir or str(Path.cwd())
    file = shlex.quote(str(environment))
    unshared = shlex.quote(f"{environment} is not there: run_dir must be a folder that all hosts share")
    shared = f"{{ [ -r {file} ] || {{ echo {unshared} >&2; exit 1; }}; }}"
    return f"cd {shlex.quote(workdir)} && {shared} && . {file} && {command}"


def _run(command: Command, limit_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command.argv, capture_output=True, text=True, check=False, timeout=limit_s)


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {done.returncode}"


def _each(function: Callable[[int], int | None], count: int) -> list:
    with ThreadPoolExecutor(max_workers=min(32, count)) as pool:
        return list(pool.map(function, range(count)))
