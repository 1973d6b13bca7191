"""``scale-digrap launch``: what is refused, what --dry-run shows, and schedulers with stand-ins for their clients."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scale_digrap.cli import main
from scale_digrap.launch import follow, queue
from tests.launch.golden_files import CONFIG, ROOT, SHIPPED

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
EXAMPLE = str(SHIPPED / "launch.example.yaml")


@pytest.fixture
def launch(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)

    def call(*arguments: str, spec: str | None = None, config: str | None = CONFIG) -> tuple[int, str, str]:
        if spec is not None:
            path = tmp_path / "spec.yaml"
            path.write_text(spec)
            arguments = ("--spec", str(path), *arguments)
        status = main(["launch", *([config] if config else []), *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.mark.parametrize(
    ("arguments", "spec", "words"),
    [
        (["optimizer.lrr=1"], "", "did you mean 'optimizer.lr'"),
        (["training.epochs=null"], "", "exactly one of training.steps and training.epochs"),
        (["--on", "hosts"], "", "the launch file names none"),
        (["--on", "hosts"], "hosts: [a, b]", "nodes: 1, but 2 hosts are named (a, b)"),
        (["--on", "hosts"], "nodes: 2\nhosts: [a, b]", "run_dir=runs/paligemma-vqav2-lora is a relative path"),
        (["--on", "hosts"], "hostfile: /no/such", "cannot read /no/such"),
        (["--on", "hosts"], "hosts: [a]\nworkdir: /elsewhere", "run_dir=runs/paligemma-vqav2-lora is a relative path"),
        (["--on", "slurm"], "nodes: 1", "slurm.partition is missing"),
        (["--on", "slurm", "--with", "deepspeed"], "slurm: {partition: a}", "use --with torchrun"),
        (["--on", "kubernetes", "--with", "deepspeed"], "", "use --with torchrun"),
        (["--on", "hosts", "--with", "deepspeed", "run_dir=/s"], 'nodes: "1:2"\nhosts: [a, b]', "cannot lose a host"),
        (["--on", "kubernetes", "run_dir=/s"], "workdir: /s", "kubernetes.image is missing"),
        (["--on", "kubernetes", "run_dir=/s"], "kubernetes: {image: x}", "set workdir to a folder"),
        (
            ["--on", "kubernetes", "run_dir=/elsewhere/r"],
            "workdir: /s\nkubernetes: {image: x, volumes: [{claim: c, path: /s}]}",
            "run_dir=/elsewhere/r lies in none of kubernetes.volumes (/s)",
        ),
        (["--submit-only"], "", "--submit-only is for slurm and kubernetes"),
        (["--check", "--on", "kubernetes"], "nodes: 1", "is a relative path"),
    ],
)
def test_what_is_refused_is_one_line(launch, arguments, spec, words):
    status, _, error = launch(*arguments, spec=spec)
    assert status == 2
    assert words in error
    assert len(error.strip().splitlines()) == 1


def test_a_port_in_use_is_refused(launch, tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        spec = f"rendezvous: {{port: {port}}}"
        status, _, error = launch(f"run_dir={tmp_path}/run", "--with", "deepspeed", spec=spec)
    assert status == 2
    assert f"port {port} is in use" in error
    assert "set rendezvous.port to a free one" in error
    assert not (tmp_path / "run").exists()


def test_what_is_refused_without_a_configuration(launch):
    assert "name the configuration" in launch(config=None)[2]
    assert "does not exist" in launch(config="no/such.yaml")[2]
    status, _, error = launch("--command", "quickstart", "--with", "deepspeed", config=None)
    assert (status, "starts its own ranks on one host" in error) == (2, True)


@pytest.mark.parametrize(
    ("place", "file"), [("slurm", "slurm.sbatch"), ("hosts", "torchrun.sh"), ("kubernetes", "job.yaml")]
)
def test_dry_run_prints_what_is_shipped(launch, place, file):
    config = CONFIG
    arguments = ["run_dir=/shared/runs/vqav2-lora", "--spec", EXAMPLE, "--on", place, "--dry-run"]
    if place == "kubernetes":
        config = str(ROOT / CONFIG)
    status, out, _ = launch(*arguments, config=config)
    assert status == 0
    shipped = next(SHIPPED.rglob(file)).read_text()
    file_of_variables = "ENVIRONMENT_FILE:-/shared/runs/vqav2-lora/launch/environment}"
    shipped = shipped.replace("ENVIRONMENT_FILE:-}", file_of_variables)
    assert shipped.replace(f"CONFIG={CONFIG}", f"CONFIG={config}") in out
    assert not Path("/shared").exists()


def test_dry_run_shows_commands_and_keeps_secrets(launch, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "secret too")
    monkeypatch.setenv("HF_HOME", "/shared/hf home")
    monkeypatch.setenv("NOT_CARRIED", "1")
    arguments = ["run_dir=/shared/r", "--spec", EXAMPLE, "--on", "hosts", "--dry-run"]
    out = launch(*arguments)[1]
    commands = out[out.index("# ===== commands") :].splitlines()[1:]
    assert len(commands) == 2
    for host, command in zip(("node0", "node1"), commands, strict=True):
        assert command.startswith("ssh -n -o BatchMode=yes -o ConnectTimeout=10 ")
        assert f" {host} 'cd {ROOT} && . /shared/r/launch/environment && " in command
        assert "bash /shared/r/launch/torchrun.sh" in command
    environment = out[out.index("launch/environment") : out.index("# ===== commands")]
    assert "export HF_TOKEN=***" in environment
    assert "export WANDB_API_KEY=***" in environment
    assert "export HF_HOME='/shared/hf home'" in environment
    assert "secret" not in out
    assert "NOT_CARRIED" not in out
    out = launch(*arguments, "--with", "deepspeed")[1]
    assert out.splitlines()[-1].endswith("HOST0=node0 bash /shared/r/launch/deepspeed.sh")


def test_a_launch_file_beside_the_configuration_is_found(launch, tmp_path):
    config = tmp_path / "own.yaml"
    config.write_text((ROOT / CONFIG).read_text())
    (tmp_path / "launch.yaml").write_text("name: found-it\nslurm: {partition: p, array_seeds: [3, 4]}")
    out = launch("--on", "slurm", "--dry-run", config=str(config))[1]
    assert "#SBATCH --job-name=found-it" in out
    assert "#SBATCH --array=0-1" in out


def test_the_quick_start_and_evaluation_take_the_same_way(launch):
    spec = "processes_per_node: 4\nslurm: {partition: p}"
    options = ("--command", "quickstart", "--on", "slurm", "--dry-run", "--", "--seeds", "3", "--output", "/q")
    status, out, _ = launch(*options, spec=spec, config=None)
    assert status == 0
    assert "OVERRIDES=(--seeds 3 --output /q --nproc 4)" in out
    assert "#SBATCH --output=/q/logs/%x.%j.out" in out
    config = next((ROOT / "configs").glob("evaluate*.yaml"))
    out = launch("out=/e", "--command", "evaluate", "--on", "slurm", "--dry-run", spec=spec, config=str(config))[1]
    assert "COMMAND=${COMMAND:-evaluate}" in out
    assert "#SBATCH --output=/e/logs/%x.%j.out" in out


def test_help_and_dry_run_import_no_torch():
    code = f"""
import sys
from scale_digrap.cli import main
try:
    main(["launch", "--help"])
except SystemExit:
    pass
main(["launch", {QUICKSTART!r}, "--dry-run"])
import scale_digrap.launch.run, scale_digrap.launch.queue
sys.exit(3 if "torch" in sys.modules or "transformers" in sys.modules else 0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--dry-run" in result.stdout


class Clients:
    """Stand-ins for a scheduler's clients: shell scripts that note how they were called."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder / "clients"
        self.folder.mkdir()
        monkeypatch.setenv("PATH", f"{self.folder}:{os.environ['PATH']}")
        monkeypatch.setattr(queue, "_POLL_S", 0.05)
        monkeypatch.setattr(follow, "SETTLE_S", 0)

    def add(self, name: str, script: str) -> None:
        path = self.folder / name
        path.write_text(f'#!/bin/bash\ncd {self.folder}\necho "{name} $*" >>calls\n{script}\n')
        path.chmod(0o755)

    @property
    def calls(self) -> str:
        return (self.folder / "calls").read_text()


@pytest.fixture
def clients(tmp_path, monkeypatch) -> Clients:
    return Clients(tmp_path, monkeypatch)


SLURM = "slurm: {partition: gpu}"


def test_slurm_is_followed_to_its_end(launch, clients, tmp_path):
    run = tmp_path / "run"
    # Two looks at the queue, then it is empty and the marker is there.
    clients.add("sbatch", "echo '77;cluster'")
    clients.add(
        "squeue",
        f"""[ $(grep -c squeue calls) -gt 2 ] || {{ echo RUNNING; exit; }}
echo '{{"step": 9}}' >{run}/DONE""",
    )
    status, out, _ = launch(f"run_dir={run}", "--on", "slurm", spec=SLURM)
    assert status == 0
    assert "submitted as job 77" in out
    assert "done after step 9" in out
    assert f"sbatch --parsable {run}/launch/slurm.sbatch" in clients.calls
    assert (run / "logs").is_dir()  # Slurm would not make it, and lose the output


def test_a_job_that_leaves_the_queue_without_a_word_has_failed(launch, clients, tmp_path):
    run = tmp_path / "run"
    clients.add("sbatch", f"echo 'scale-digrap: error: no GPU' >{run}/logs/x.78.out; echo 78")
    clients.add("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    status, _, error = launch(f"run_dir={run}", "--on", "slurm", spec=SLURM)
    assert status == 1
    assert f"failed: error: no GPU; its log: {run}/logs/x.78.out" in error


def test_slurm_says_why_it_refuses(launch, clients, tmp_path):
    clients.add("sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    status, _, error = launch(f"run_dir={tmp_path}/run", "--on", "slurm", spec=SLURM)
    assert status == 2
    assert "sbatch refused the job: sbatch: error: invalid partition specified: gpu" in error


def test_ctrl_c_asks_a_running_job_to_stop(launch, clients, tmp_path):
    run = tmp_path / "run"
    clients.add("sbatch", "echo 79")
    clients.add(
        "squeue",
        # Ctrl-C comes while the job is being followed, however slow the machine is.
        f"""[ -e {run}/STOP ] || {{
  [ -e {tmp_path}/asked ] || kill -INT {os.getpid()}
  >{tmp_path}/asked; echo RUNNING; exit
}}
echo '{{"step": 4, "reason": "the file STOP"}}' >{run}/STOPPED""",
    )
    status, out, error = launch(f"run_dir={run}", "--on", "slurm", spec=SLURM)
    assert status == 75
    assert "stopping: a checkpoint is written first" in error
    assert "stopped after step 4 (the file STOP)" in out


KUBERNETES = "name: job1\nworkdir: /s\nkubernetes: {namespace: ns, image: x, volumes: [{claim: c, path: /s}]}"


def test_kubernetes_is_applied_and_followed(launch, clients, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Two looks at the job, then it is what the file says.
    clients.add(
        "kubectl",
        """case "$*" in
*" apply -f -") cat >applied.yaml; echo created ;;
*" logs "*) echo "step 3" ;;
*" get "*) [ $(grep -c ' get ' calls) -gt 2 ] && cat conditions || echo '{"status": {}}' ;;
esac""",
    )
    conditions = clients.folder / "conditions"
    conditions.write_text('{"status": {"conditions": [{"type": "Complete", "status": "True"}]}}')
    arguments = ("run_dir=/s/r", "--on", "kubernetes")
    config = str(ROOT / CONFIG)
    status, out, error = launch(*arguments, spec=KUBERNETES, config=config)
    assert (status, "job/job1: done" in out, "step 3" in error) == (0, True, True)
    assert "kubectl --namespace ns get job/job1 -o json" in clients.calls
    assert "backoffLimitPerIndex" in (clients.folder / "applied.yaml").read_text()

    failed = '{"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": "exit code 2"}'
    conditions.write_text(f'{{"status": {{"conditions": [{failed}]}}}}')
    (clients.folder / "calls").unlink()
    status, _, error = launch(*arguments, spec=KUBERNETES, config=config)
    assert status == 1
    assert "failed: job/job1: PodFailurePolicy: exit code 2" in error


def test_without_a_client_the_dry_run_is_named(launch, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    status, _, error = launch(f"run_dir={tmp_path}", "--on", "slurm", spec=SLURM)
    assert status == 2
    assert "there is no sbatch here; --dry-run prints" in error
