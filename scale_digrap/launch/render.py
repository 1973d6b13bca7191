"""Scripts and manifests, rendered from a launch file: what runs, and what is shipped in ``launch/`` to be edited.

The templates are the scripts themselves, with the values of their settings left out.
"""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from scale_digrap.launch.spec import LaunchConfig
from scale_digrap.launch.workload import Workload
from scale_digrap.runtime.text import has_surrogates, unfit

TEMPLATES = Path(__file__).parent / "templates"
KINDS = ("job", "jobset", "trainjob")


def render(name: str, spec: LaunchConfig, workload: Workload, environment_file: str = "") -> str:
    """One of the templates, filled in. Values of ``spec.environment`` are in none of them but ``secret.yaml``.

    Args:
        name: ``torchrun.sh``, ``deepspeed.sh``, ``slurm.sbatch``, ``kubernetes/{job,jobset,trainjob}.yaml`` or
            ``kubernetes/secret.yaml``.
        environment_file: what the scripts read variables from, a file with lines ``export NAME=value``.
    """
    filled = {**values(spec, workload), "environment_file": environment_file}
    return _environment().get_template(name).render(filled) + "\n"


def values(spec: LaunchConfig, workload: Workload) -> dict[str, Any]:
    """What the templates are filled in with."""
    host0 = spec.hosts[0] if spec.hosts else ""
    return {
        "name": spec.name,
        "command": workload.command,
        "config": workload.config,
        "overrides": list(workload.overrides),
        "run_dir": str(workload.run_dir),
        "nodes": spec.nodes,
        "processes": spec.processes_per_node,
        "host0": host0,
        "port": spec.port,
        "rendezvous_dir": spec.rendezvous.folder or "",
        "rendezvous_conf": rendezvous_conf(spec),
        "restarts": spec.restarts,
        "stop_within_s": spec.stop_within_s,
        "preflight": spec.preflight,
        "python": spec.python,
        "workdir": spec.workdir or ".",
        "logs": spec.logs or "",
        "environment": dict(sorted(spec.environment.items())),
        "carry": sorted({*spec.carry, *spec.environment}),
        "launcher": spec.deepspeed.launcher,
        "hostfile": spec.hostfile or "launch/hostfile",
        "ssh_options": spec.ssh.options,
        "slurm": _slurm(spec, workload),
        "kubernetes": _kubernetes(spec),
    }


def rendezvous_conf(spec: LaunchConfig) -> str:
    """torchrun's ``--rdzv-conf``: a host that is gone is noticed within keep_alive_interval x attempts."""
    rendezvous = spec.rendezvous
    settings = {
        "join_timeout": rendezvous.join_timeout_s,
        "last_call_timeout": rendezvous.last_call_timeout_s,
        "keep_alive_interval": rendezvous.keep_alive_interval_s,
        "keep_alive_max_attempt": rendezvous.keep_alive_attempts,
        "close_timeout": rendezvous.close_timeout_s,
        "read_timeout": rendezvous.read_timeout_s,
    }
    return ",".join(f"{name}={value}" for name, value in settings.items())


def _slurm(spec: LaunchConfig, workload: Workload) -> dict[str, Any]:
    slurm = spec.slurm
    folder = Path(spec.logs) if spec.logs else workload.run_dir / "logs"
    container = [f"--container-image={slurm.container}"] if slurm.container else []
    if slurm.container_mounts:
        container.append(f"--container-mounts={','.join(slurm.container_mounts)}")
    return {
        **vars(slurm),
        "partition": None if slurm.partition == "default" else slurm.partition,
        "output": str(folder / ("%x.%A_%a.out" if slurm.array_seeds else "%x.%j.out")),
        "srun": container,
    }


def _kubernetes(spec: LaunchConfig) -> dict[str, Any]:
    kubernetes = spec.kubernetes
    limits = {"nvidia.com/gpu": str(kubernetes.gpus)} if kubernetes.gpus else {}
    limits |= {"cpu": kubernetes.cpu} if kubernetes.cpu else {}
    limits |= {"memory": kubernetes.memory} if kubernetes.memory else {}
    return {
        **vars(kubernetes),
        "pods": spec.node_range[1],
        "limits": limits,
        "stop_s": max(5, min(spec.stop_within_s, kubernetes.grace_s - 15)),
        "processes": kubernetes.gpus or 2 if spec.processes_per_node == "auto" else int(spec.processes_per_node),
    }


_SBATCH_PLAIN = re.compile(r"[A-Za-z0-9_./:%=@+,^~\[\]-]+")
_KUBELET = re.compile(r"\$(?=\([^()\s]+\))|\$(?=\$)|(?<=\$)\$")
"""Of a command, the kubelet replaces ``$(NAME)``, and makes ``$`` of ``$$``."""


def shell_word(text: str) -> str:
    """Text as one word of bash on one line, whatever is in it."""
    if unfit(text) is None:
        return shlex.quote(text)
    data = text.encode("utf-8", "surrogateescape" if has_surrogates(text) else "strict")
    return "$'" + "".join(chr(one) if chr(one).isalnum() and one < 128 else f"\\x{one:02x}" for one in data) + "'"


def sbatch_word(value: Any) -> str:
    """A value on a line ``#SBATCH``, which sbatch reads with quotes and backslashes of its own."""
    text = str(value)
    if _SBATCH_PLAIN.fullmatch(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _sbatch_option(text: str) -> str:
    """``--name=value``, ``--name value`` or ``-n value``: the value may hold spaces."""
    name, _, value = text.partition(" ")
    return sbatch_word(text) if "=" in name or not value else f"{sbatch_word(name)} {sbatch_word(value.strip())}"


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        comment_start_string="<#",  # "{#" is how bash counts
        comment_end_string="#>",
    )
    environment.filters["sh"] = lambda value: shell_word(str(value)) if str(value) else ""
    environment.filters["word"] = lambda value: shell_word(str(value))
    environment.filters["sbatch"] = sbatch_word
    environment.filters["sbatch_option"] = _sbatch_option
    environment.filters["yaml"] = lambda value: json.dumps(value, ensure_ascii=False)  # JSON is YAML, quoting and all
    environment.filters["kubelet"] = lambda value: _KUBELET.sub(lambda found: found[0] * 2, value)
    return environment
