"""From a launch file and a command to what is run: scripts with their settings, and the command of each host."""

from __future__ import annotations

import fnmatch
import re
import secrets
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from scale_digrap.launch.exchange import SECRET
from scale_digrap.launch.render import render, shell_word
from scale_digrap.launch.spec import LaunchConfig, LaunchError, check_host
from scale_digrap.launch.workload import Workload
from scale_digrap.runtime.secrets import MASK, is_secret_key, mask
from scale_digrap.runtime.text import TextError, read_text

_LOOKS_SECRET = re.compile(r"^['\"]?(hf_|sk-|gh[opsu]_|github_pat_|glpat-|xox|AKIA|eyJ)\w")
"""Beginnings of well-known tokens, for variables whose name says nothing."""
_FOLDER = "launch"
"""In ``run_dir``: the scripts of the last start."""

ENVIRONMENT_FILE = "environment"
SECRET_FILE = "secret.yaml"
_ALIVE_S = 15


@dataclass(frozen=True)
class Command:
    """What is run, and with which variables besides those that are there."""

    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        return " ".join([*variables, shlex.join(self.argv)])


@dataclass(frozen=True)
class NodeContext:
    """One host of a start."""

    rank: int
    """Its place, from 0."""

    host: str | None
    """Name to reach it by; None: this one."""

    start_id: str
    """Of the start: no other has it."""


@dataclass(frozen=True)
class Plan:
    """All that a start consists of."""

    spec: LaunchConfig
    workload: Workload
    place: str
    launcher: str
    hosts: tuple[str, ...]
    """``--on hosts``: in the order of their ranks; else empty."""

    files: dict[str, str]
    """Name in :attr:`folder` → content. The first is the script or manifest itself."""

    @property
    def folder(self) -> Path:
        """Where the files are written."""
        return self.workload.run_dir / _FOLDER

    @property
    def script(self) -> Path:
        """The script or manifest."""
        return self.folder / next(iter(self.files))

    @property
    def logs(self) -> Path:
        """Where the ranks' output goes."""
        return Path(self.spec.logs) if self.spec.logs else self.workload.run_dir / "logs"

    @property
    def pdsh(self) -> bool:
        """One start reaches all hosts."""
        return self.launcher == "deepspeed" and self.place == "hosts" and self.spec.deepspeed.launcher == "pdsh"


def make_plan(
    spec: LaunchConfig, workload: Workload, place: str, launcher: str, environment: Mapping[str, str]
) -> Plan:
    """Check that the parts fit together, and render.

    Args:
        place: ``local``, ``hosts``, ``slurm`` or ``kubernetes``.
        launcher: ``torchrun`` or ``deepspeed``.
        environment: of this shell; what ``spec.carry`` names goes to other hosts.

    Raises:
        LaunchError: what does not fit, and the fix.
    """
    if place == "local":
        python = sys.executable if spec.python == "python" else spec.python
        spec = replace(spec, nodes="1", hosts=[], hostfile=None, workdir=None, python=python)
    hosts = _hosts(spec) if place == "hosts" else ()
    _check(spec, workload, place, launcher, hosts)
    if workload.command == "quickstart" and spec.processes_per_node != "auto":
        workload = replace(workload, overrides=(*workload.overrides, "--nproc", spec.processes_per_node))
    if hosts:
        spec = replace(spec, hosts=list(hosts), hostfile=None)
    # A configuration that names variables is read again by every rank.
    named = re.findall(r"\$\{oc\.env:\s*([A-Za-z_][A-Za-z0-9_]*)", workload.resolved)
    spec = replace(spec, environment=dict(spec.environment), carry=list(dict.fromkeys([*spec.carry, *named])))
    names = {
        "local": f"{launcher}.sh",
        "hosts": f"{launcher}.sh",
        "slurm": "slurm.sbatch",
        "kubernetes": f"kubernetes/{spec.kubernetes.kind}.yaml",
    }
    name = names[place]
    if launcher == "deepspeed":
        local = replace(spec.deepspeed, launcher="no_ssh") if place == "local" else spec.deepspeed
        spec = replace(spec, deepspeed=local, hostfile=str(workload.run_dir / _FOLDER / "hostfile"))
    # What the hosts of this launch know each other by in the preflight; one that the user has set stays.
    if place == "hosts" or (place in ("slurm", "kubernetes") and spec.preflight):
        spec = replace(spec, environment={SECRET: secrets.token_hex(16), **spec.environment})
    if place in ("local", "hosts"):  # done once, from here
        rendered = replace(spec, preflight=False)
    else:
        rendered = spec
    lines = carried(spec, environment) if place == "hosts" else dict(sorted(spec.environment.items()))
    environment_file = str((workload.run_dir / _FOLDER / ENVIRONMENT_FILE).absolute())
    files = {Path(name).name: render(name, rendered, workload, environment_file if lines else "")}
    plan = Plan(spec, workload, place, launcher, hosts, files)
    if lines and place == "kubernetes":
        files[SECRET_FILE] = render(f"kubernetes/{SECRET_FILE}", rendered, workload)
    elif lines or place == "hosts":
        files[ENVIRONMENT_FILE] = "".join(f"export {key}={shell_word(value)}\n" for key, value in lines.items())
    if launcher == "deepspeed" and spec.processes_per_node != "auto":
        files["hostfile"] = hostfile(plan, {})
    return plan


def hostfile(plan: Plan, gpus: Mapping[str, int]) -> str:
    """A line ``NAME slots=N`` per host; ``auto`` is one process per GPU, or 2.

    Args:
        gpus: of each host; needed for ``auto``.
    """
    wanted = plan.spec.processes_per_node
    names = plan.hosts or ("localhost",)
    return "".join(f"{name} slots={gpus.get(name) or 2 if wanted == 'auto' else wanted}\n" for name in names)


def node_command(plan: Plan, node: NodeContext) -> Command:
    """The command of one host: the script, with what differs between hosts and starts."""
    spec = plan.spec
    env = {"START_ID": node.start_id, "RUN_ID": node.start_id}
    if plan.launcher == "deepspeed":
        env["NODE_RANK"] = str(node.rank)
        env["HOST0"] = plan.hosts[0] if plan.hosts else "127.0.0.1"
        env.pop("RUN_ID")
    script = Command(["bash", str(plan.script.absolute())], env)
    if node.host is None:
        return script
    workdir = spec.workdir or str(Path.cwd())
    log = plan.logs.absolute() / f"launch.{node.host}.log"
    # Into a file that the hosts share, not through ssh: the run outlives the connection.
    remote = (
        f"cd {shlex.quote(workdir)} && . {shlex.quote(str((plan.folder / ENVIRONMENT_FILE).absolute()))} && "
        f"{script} >{shlex.quote(str(log))} 2>&1 </dev/null"
    )
    return ssh(spec, node.host, remote)


def ssh(spec: LaunchConfig, host: str, remote: str) -> Command:
    """A command on another host, without any question about passwords or keys."""
    settings = (
        "BatchMode=yes",
        f"ConnectTimeout={spec.ssh.connect_timeout_s}",
        f"ServerAliveInterval={_ALIVE_S}",  # a host that is switched off does not end a connection
        "ServerAliveCountMax=3",
    )
    options = [word for setting in settings for word in ("-o", setting)]
    return Command(["ssh", "-n", *options, *spec.ssh.options, "--", host, remote])


def submit_command(plan: Plan) -> Command:
    """What hands the script to Slurm, or the manifest, on its standard input, to Kubernetes."""
    if plan.place == "slurm":
        return Command(["sbatch", "--parsable", str(plan.script)])
    namespace = ["--namespace", plan.spec.kubernetes.namespace] if plan.spec.kubernetes.namespace else []
    return Command(["kubectl", *namespace, "apply", "-f", "-"])


def carried(spec: LaunchConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of this shell that ``spec.carry`` names, and those of ``spec.environment``."""
    found = {
        name: value
        for name, value in environment.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in spec.carry) and re.fullmatch(r"[A-Za-z_]\w*", name)
    }
    return dict(sorted({**found, **spec.environment}.items()))


def masked(name: str, text: str) -> str:
    """A file of a plan as it may be shown: without the values of secret variables, and the passwords of URLs.

    Args:
        name: of the file.
        text: its content.
    """
    if name not in (ENVIRONMENT_FILE, SECRET_FILE):
        return mask(text)
    shown = []
    for line in text.splitlines():
        found = re.fullmatch(r"(?P<start>export |  \")(?P<name>\w+)(?P<middle>=|\": )(?P<value>.*)", line)
        if found and (is_secret_key(found["name"]) or _LOOKS_SECRET.match(found["value"])):
            line = f"{found['start']}{found['name']}{found['middle']}{MASK}"
        shown.append(mask(line))
    return "".join(f"{line}\n" for line in shown)


def _hosts(spec: LaunchConfig) -> tuple[str, ...]:
    hosts = spec.hosts or (_read_hostfile(Path(spec.hostfile)) if spec.hostfile else [])
    if not hosts:
        raise LaunchError("--on hosts: the launch file names none: give hosts: [node0, node1] or hostfile: PATH")
    least, most = spec.node_range
    if not least <= len(hosts) <= most:
        raise LaunchError(
            f"nodes: {spec.nodes}, but {len(hosts)} hosts are named ({', '.join(hosts)}): make them agree"
        )
    return tuple(hosts)


def _read_hostfile(path: Path) -> list[str]:
    try:
        lines = read_text(path, 1 << 20).splitlines()
    except TextError as error:
        raise LaunchError(f"hostfile: {error}") from None
    names = [line.split()[0] for line in lines if line.strip() and not line.lstrip().startswith("#")]
    for name in names:
        check_host(name, f"hostfile {path}")
    return names


def _check(spec: LaunchConfig, workload: Workload, place: str, launcher: str, hosts: Sequence[str]) -> None:
    least, most = spec.node_range
    if launcher == "deepspeed":
        if place in ("slurm", "kubernetes"):
            raise LaunchError(
                f"--with deepspeed --on {place}: the deepspeed launcher needs ssh between hosts (its slurm launcher "
                f"starts ranks without RANK, and needs mpi4py); use --with torchrun, which runs ZeRO as well"
            )
        if place == "hosts" and spec.deepspeed.launcher == "pdsh" and any(" " in word for word in spec.ssh.options):
            raise LaunchError("ssh.options: pdsh cannot carry an option with spaces: put it into ~/.ssh/config")
        if least != most:
            raise LaunchError(
                f"nodes: {spec.nodes} with the deepspeed launcher, which cannot lose a host: use torchrun"
            )
        if spec.rendezvous.store == "file":
            raise LaunchError("rendezvous.store: file is torchrun's; the deepspeed launcher has no rendezvous")
    if workload.command == "quickstart":
        if most > 1 or launcher == "deepspeed" or place == "kubernetes":
            raise LaunchError(
                "the quick-start starts its own ranks on one host: nodes: 1, --with torchrun, not --on kubernetes"
            )
    elif not Path(workload.config).is_absolute() and place == "kubernetes" and not spec.workdir:
        raise LaunchError(
            f"--on kubernetes: {workload.config} is a relative path: set workdir to a folder of the image or a volume"
        )
    if (most > 1 or place == "kubernetes" or spec.workdir) and not workload.run_dir.is_absolute():
        key = "out" if workload.command == "evaluate" else "run_dir"
        raise LaunchError(
            f"{key}={workload.run_dir} is a relative path, which need not be one folder for all hosts: write an "
            f"absolute path on a file system that they share"
        )
    if place == "slurm":
        if spec.slurm.partition is None:
            raise LaunchError("slurm.partition is missing: name one of `sinfo -s`, or default for the cluster's own")
        if spec.slurm.array_seeds and workload.command != "train":
            raise LaunchError("slurm.array_seeds is for --command train")
    if place == "kubernetes":
        kubernetes = spec.kubernetes
        if not kubernetes.image:
            raise LaunchError("kubernetes.image is missing: name an image with this package in it")
        if not any(workload.run_dir.is_relative_to(volume.path) for volume in kubernetes.volumes):
            paths = ", ".join(volume.path for volume in kubernetes.volumes) or "none"
            raise LaunchError(
                f"run_dir={workload.run_dir} lies in none of kubernetes.volumes ({paths}): it would go with the pod"
            )
