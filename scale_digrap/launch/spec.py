"""The launch file: where and how a run is started, beside the configuration that says what is trained.

Dataclasses of which :mod:`scale_digrap.settings` makes the schema.
"""

import dataclasses
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from scale_digrap.errors import ScaleDigrapError
from scale_digrap.runtime.text import printable, unfit
from scale_digrap.settings import PathText, read_structured, read_yaml, suggest

PLACES = ("local", "hosts", "slurm", "kubernetes")
LAUNCHERS = ("torchrun", "deepspeed")
_PORTS = (1024, 65535)
_FIRST_PORT, _PORT_COUNT = 20000, 10000  # below the range that outgoing connections are given (32768 on Linux)


class LaunchError(ScaleDigrapError):
    """A launch that cannot work: says which setting or host, and what to do."""


@dataclass(kw_only=True)
class RendezvousConfig:
    """Where torchrun's agents meet, and how soon they notice that one is gone."""

    store: str = "tcp"
    """``tcp``: on the first host, whose death ends the job; ``file``: in a shared folder, which survives it."""

    folder: Optional[PathText] = None  # noqa: UP045
    """With ``file``: a folder that all hosts share, on a file system with working locks."""

    port: Optional[int] = None  # noqa: UP045
    """On the first host; None: 20000 to 29999, from the job's name or its Slurm id."""

    join_timeout_s: int = 600
    """Longest wait for the other hosts."""

    last_call_timeout_s: int = 15
    """With ``nodes: min:max``: wait so long for more hosts than the least."""

    keep_alive_interval_s: int = 5
    """A host that misses ``keep_alive_attempts`` of these is gone."""

    keep_alive_attempts: int = 3
    """See ``keep_alive_interval_s``."""

    close_timeout_s: int = 30
    """Longest wait when the job ends."""

    read_timeout_s: int = 60
    """Longest wait for an answer of the store."""


@dataclass(kw_only=True)
class SshConfig:
    """``--on hosts``."""

    options: list[str] = field(default_factory=list)
    """Options of ssh, for example ``["-p", "2222", "-i", "key"]``. It is never asked for a password."""

    connect_timeout_s: int = 10
    """A host that does not answer in this time is an error, before anything is started."""


@dataclass(kw_only=True)
class DeepspeedConfig:
    """``--with deepspeed``."""

    launcher: str = "pdsh"
    """``pdsh``: one start on the first host reaches all; ``no_ssh``: one start on every host."""


@dataclass(kw_only=True)
class SlurmConfig:
    """``--on slurm``."""

    partition: Optional[str] = None  # noqa: UP045
    """Must be given; ``default`` takes the cluster's own."""

    account: Optional[str] = None  # noqa: UP045
    """Where the cluster asks for one."""

    time: str = "24:00:00"
    """Time limit of one try, as Slurm writes it; the job requeues itself when it is near."""

    gpus_per_node: int = 0
    """0 asks for none."""

    cpus_per_task: Optional[int] = None  # noqa: UP045
    """Cores for all processes of a node together."""

    signal: str = "USR2"
    """``USR1`` or ``USR2``: what asks for a checkpoint when the time limit is near."""

    signal_before_s: int = 120
    """So long before the time limit; Slurm may be a minute early."""

    max_requeues_without_progress: int = 3
    """Give up after so many tries in a row that brought no newer checkpoint."""

    array_seeds: list[int] = field(default_factory=list)
    """One task for each of these values of ``training.seed``, each in a folder of its own."""

    extra: list[str] = field(default_factory=list)
    """More options of sbatch, for example ``["--constraint=a100"]``."""

    container: Optional[str] = None  # noqa: UP045
    """Image for Pyxis/Enroot."""

    container_mounts: list[str] = field(default_factory=list)
    """``SOURCE:TARGET`` for Pyxis."""


@dataclass(kw_only=True)
class VolumeConfig:
    """A folder of a pod."""

    claim: str = ""
    """A PersistentVolumeClaim, ReadWriteMany: the hosts share it."""

    path: str = ""
    """Where it is mounted."""


@dataclass(kw_only=True)
class KubernetesConfig:
    """``--on kubernetes``."""

    kind: str = "job"
    """``job`` (Indexed Job and headless Service, no operator), ``jobset`` or ``trainjob`` (Kubeflow Trainer)."""

    namespace: Optional[str] = None  # noqa: UP045
    """None: that of kubectl's context."""

    image: str = ""
    """An image with this package in it. Must be given."""

    gpus: int = 8
    """``nvidia.com/gpu`` of each pod; 0 asks for none."""

    cpu: Optional[str] = None  # noqa: UP045
    """Cores of each pod, such as ``"32"``."""

    memory: Optional[str] = None  # noqa: UP045
    """Memory of each pod, such as ``500Gi``."""

    shm: str = "16Gi"
    """Size of /dev/shm, which loader processes and NCCL use; the default of 64 MiB is too small."""

    volumes: list[VolumeConfig] = field(default_factory=list)
    """Folders that the pods share; ``run_dir`` lies in one of them."""

    grace_s: int = 120
    """Seconds between SIGTERM and SIGKILL of a pod: a step and a checkpoint must fit."""

    retries: int = 6
    """Failed pods that are replaced, per node; drained and pre-empted ones do not count."""

    runtime: str = "torch-distributed"
    """``trainjob``: name of the ClusterTrainingRuntime."""

    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels that a node must have."""

    service_account: Optional[str] = None  # noqa: UP045
    """Of the pods."""


@dataclass(kw_only=True)
class LaunchConfig:
    """All of it."""

    name: str = "scale-digrap"
    """Of the job: lower-case letters, digits and ``-``. Rendezvous id, port and Kubernetes' names come from it."""

    nodes: str = "1"
    """Hosts that take part; ``2:4`` (torchrun) goes on with as few as 2 and takes in up to 4."""

    processes_per_node: str = "auto"
    """``auto``: one per GPU, 2 on a host without GPUs."""

    hosts: list[str] = field(default_factory=list)
    """``--on hosts``: their names or addresses. The first is where all meet."""

    hostfile: Optional[PathText] = None  # noqa: UP045
    """In place of ``hosts``: a file with a line ``NAME slots=N`` for each."""

    python: PathText = "python"
    """The interpreter on the nodes."""

    workdir: Optional[PathText] = None  # noqa: UP045
    """Folder to work in on the nodes; None: the one that the launch is started in."""

    environment: dict[str, str] = field(default_factory=dict)
    """Variables for every process on every node."""

    carry: list[str] = field(
        default_factory=lambda: [
            "PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_*", "PYTHON*", "OMP_*", "MKL_*", "TORCH*", "NCCL_*",
            "GLOO_*", "UCX_*", "FI_*", "CUDA_HOME", "DS_*", "HF_*", "TRANSFORMERS_*", "TOKENIZERS_*", "WANDB_*",
            "AWS_*", "GOOGLE_*", "*_proxy", "SCALE_DIGRAP_*",
        ]
    )  # fmt: skip
    """``--on hosts``: variables of the shell that launches which go to every host, as patterns."""

    restarts: int = 3
    """torchrun: how often all ranks are started again when one fails or a host comes or goes."""

    stop_within_s: int = 90
    """Seconds for a checkpoint between a request to stop and the end by force."""

    rendezvous: RendezvousConfig = field(default_factory=RendezvousConfig)
    logs: Optional[PathText] = None  # noqa: UP045
    """Folder of the ranks' output; None: ``run_dir/logs``."""

    preflight: bool = False
    """Compare the nodes (``--check``) before each start."""

    ssh: SshConfig = field(default_factory=SshConfig)
    deepspeed: DeepspeedConfig = field(default_factory=DeepspeedConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)

    @property
    def node_range(self) -> tuple[int, int]:
        """Least and most nodes."""
        least, _, most = self.nodes.partition(":")
        return int(least), int(most or least)

    @property
    def port(self) -> int:
        """Of the rendezvous."""
        return self.rendezvous.port or job_port(self.name)


CHOICES: dict[str, tuple[str, ...]] = {
    "rendezvous.store": ("tcp", "file"),
    "deepspeed.launcher": ("pdsh", "no_ssh"),
    "slurm.signal": ("USR1", "USR2"),
    "kubernetes.kind": ("job", "jobset", "trainjob"),
}
BROKEN_LAUNCHERS: dict[str, str] = {
    "ssh": "deepspeed has no such launcher",
    "slurm": "it starts scripts without RANK or MASTER_ADDR, and needs mpi4py and a Slurm with PMI",
    "openmpi": "it needs mpi4py, ignores master address and port, and binds each rank to one core",
    "mpich": "it returns 0 when a rank has failed",
    "impi": "it needs Intel MPI and mpi4py, and nothing here is tested with it",
    "mvapich": "it needs MVAPICH2 and mpi4py, and nothing here is tested with it",
}


def job_port(name: str) -> int:
    """A port from 20000 to 29999, the same for a name on every host."""
    return _FIRST_PORT + zlib.crc32(name.encode()) % _PORT_COUNT


def load_spec(path: str | Path | None) -> LaunchConfig:
    """Read and check a launch file; None gives the defaults.

    Raises:
        ConfigError: unreadable file, unknown or mistyped key, wrong type.
        LaunchError: a value that cannot work.
    """
    spec: LaunchConfig = read_structured({} if path is None else read_yaml(path), LaunchConfig)
    validate_spec(spec)
    return spec


def validate_spec(spec: LaunchConfig) -> None:
    """Check what is wrong wherever the run is started.

    Raises:
        LaunchError: naming the first key that is wrong.
    """
    _check_text(spec, "")
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?", spec.name):
        raise LaunchError(
            f"name must be lower-case letters, digits and '-', begin with a letter and have at most 52 characters, got "
            f"{spec.name!r}"
        )
    if not re.fullmatch(r"[1-9][0-9]*(:[1-9][0-9]*)?", spec.nodes) or spec.node_range[0] > spec.node_range[1]:
        raise LaunchError(f"nodes must be a number, or min:max such as 2:4, got {spec.nodes!r}")
    if not re.fullmatch(r"auto|[1-9][0-9]*", spec.processes_per_node):
        raise LaunchError(f"processes_per_node must be auto or a number above 0, got {spec.processes_per_node!r}")
    launcher = spec.deepspeed.launcher
    if launcher in BROKEN_LAUNCHERS:
        raise LaunchError(
            f"deepspeed.launcher={launcher} cannot be used: {BROKEN_LAUNCHERS[launcher]}. Use pdsh or no_ssh, or "
            f"--with torchrun, which runs ZeRO as well"
        )
    for key, choices in CHOICES.items():
        value = _get(spec, key)
        if value not in choices:
            raise LaunchError(f"{key} must be one of {', '.join(choices)}; got {value!r}{suggest(value, choices)}")
    for key, low in _LEAST.items():
        value = _get(spec, key)
        if value is not None and value < low:
            raise LaunchError(f"{key} must be at least {low}, got {value}")
    port = spec.rendezvous.port
    if port is not None and not _PORTS[0] <= port <= _PORTS[1]:
        raise LaunchError(f"rendezvous.port must be from {_PORTS[0]} to {_PORTS[1]}, got {port}")
    if (spec.rendezvous.store == "file") != (spec.rendezvous.folder is not None):
        raise LaunchError("rendezvous.folder goes with store: file, and only with it: name a shared folder")
    if spec.hosts and spec.hostfile:
        raise LaunchError("hosts and hostfile are both given: remove one of them")
    if len(set(spec.hosts)) != len(spec.hosts):
        raise LaunchError(f"hosts names one host twice: {', '.join(spec.hosts)}")
    for host in spec.hosts:
        check_host(host, "hosts")
    for key in spec.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise LaunchError(f"environment: {key!r} is no name of a variable")
    if not re.fullmatch(r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}", spec.slurm.time):
        raise LaunchError(f"slurm.time must be as Slurm writes it, such as 24:00:00 or 2-0, got {spec.slurm.time!r}")
    for option in spec.slurm.extra:
        if not option.startswith("-"):
            raise LaunchError(f"slurm.extra: {option!r} is no option of sbatch: write for example --constraint=a100")
    for volume in spec.kubernetes.volumes:
        if not volume.claim or not volume.path.startswith("/"):
            raise LaunchError(
                f"kubernetes.volumes: each needs claim (a PersistentVolumeClaim) and path (absolute), got "
                f"claim={volume.claim!r}, path={volume.path!r}"
            )


def check_host(name: str, where: str) -> None:
    """Raises:
    LaunchError: neither a name nor an address of a host; one that begins with ``-`` would be an option of ssh."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._:%@-]{0,254}", name):
        raise LaunchError(f"{where}: {printable(repr(name)[1:-1])!r} is not the name or the address of a host")


def _check_text(value: Any, path: str) -> None:
    """Refuse control characters in every string: they would be lines of scripts and manifests.

    Raises:
        LaunchError: the first key with one.
    """
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, str) and (what := unfit(value)) is not None:
        hint = ": put the value into a file" if path.startswith("environment.") else ": remove it"
        raise LaunchError(f"{path} holds {what}, which no script can carry{hint}")
    if isinstance(value, dict):
        for name, item in value.items():
            if unfit(str(name)) is not None:
                raise LaunchError(f"{path}: {str(name)!r} is not a name: it holds {unfit(str(name))}")
            _check_text(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check_text(item, f"{path}[{number}]")


_LEAST = {
    "restarts": 0,
    "stop_within_s": 1,
    "rendezvous.join_timeout_s": 1,
    "rendezvous.last_call_timeout_s": 1,
    "rendezvous.keep_alive_interval_s": 1,
    "rendezvous.keep_alive_attempts": 1,
    "rendezvous.close_timeout_s": 1,
    "rendezvous.read_timeout_s": 1,
    "ssh.connect_timeout_s": 1,
    "slurm.gpus_per_node": 0,
    "slurm.cpus_per_task": 1,
    "slurm.signal_before_s": 1,
    "slurm.max_requeues_without_progress": 1,
    "kubernetes.gpus": 0,
    "kubernetes.grace_s": 10,
    "kubernetes.retries": 0,
}


def _get(spec: LaunchConfig, key: str) -> Any:
    value: Any = spec
    for part in key.split("."):
        value = getattr(value, part)
    return value
