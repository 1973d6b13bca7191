"""A real Slurm on the hosts of a test cluster: munged and slurmctld on ``control``, a slurmd on every other host.

Plain processes without systemd, everything under the cluster's folder. What the settings are for is said where it is
not Slurm's everyday use.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tests.launch.cluster import Host, wait_until

if TYPE_CHECKING:
    from tests.launch.cluster import Cluster

_CONF = """\
ClusterName=tests
SlurmctldHost=control({address})
SlurmctldPort=6817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
# Without cgroups, which the hosts do not have.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
# The hosts may have fewer cores than the nodes are said to have.
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
# Short, so that a lost node is seen soon.
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
KillWait=10
MinJobAge=600
MessageTimeout=10
TCPTimeout=3
GresTypes=gpu
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Slurm:
    """Partitions ``low`` (the default) and ``high``, which preempts it by requeueing.

    Args:
        cluster: its hosts; ``control`` is among them.
        gpus: fake GPUs of every node.
        grace_s: how long a preempted job has after its SIGTERM.

    Raises:
        AssertionError: the nodes do not come up.
    """

    def __init__(self, cluster: Cluster, *, gpus: int = 2, grace_s: int = 30) -> None:
        self._cluster = cluster
        self._folder = folder = cluster.folder / "slurm"
        (folder / "state").mkdir(parents=True)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        nodes = []
        for host in cluster.hosts:
            (folder / f"spool.{host.name}").mkdir()
            nodes.append(
                f"NodeName={host.name} NodeAddr={host.address} NodeHostname={host.name} CPUs=2 RealMemory=4000 "
                f"Gres=gpu:{gpus} State=UNKNOWN"
            )
        self.conf = folder / "slurm.conf"
        self.conf.write_text(
            _CONF.format(address=cluster.control.address, folder=folder, nodes="\n".join(nodes), grace=grace_s)
        )
        for k in range(gpus):  # a device file each, or Slurm counts none: /dev/null by another name
            os.mknod(folder / f"gpu{k}", 0o20666, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{gpus - 1}]\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # it would look for them otherwise, and fail
        control = cluster.control
        munged = ["munged", "--force", f"--key-file={key}", f"--socket={folder}/munge.sock"]
        munged += [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
        environment = {"SLURM_CONF": str(self.conf)}
        control.run(munged, check=True)
        control.run(["slurmctld", "-c"], environment, check=True)
        for host in cluster.hosts:
            self.start_node(host)
        wait_until(self._all_idle, 60, self.log)

    def reset(self) -> None:
        """No jobs, and all nodes idle, after the hosts were powered on anew."""
        self("scancel", "--full", "--user=root")
        for host in self._cluster.hosts:
            self.start_node(host)
        wait_until(lambda: not self("squeue", "--noheader").strip(), 60, self.log)
        wait_until(self._all_idle, 60, self.log)

    def start_node(self, host: Host) -> None:
        """Start slurmd, on a host that has just been powered on."""
        host.run(["slurmd", "-N", host.name], {"SLURM_CONF": str(self.conf)}, check=True)

    def __call__(self, *argv: str, env: Mapping[str, str] | None = None, timeout: float = 60.0) -> str:
        """What a client command prints; it must succeed. Run on ``control``."""
        environment = {"SLURM_CONF": str(self.conf), **(env or {})}
        return self._cluster.control.run(argv, environment, timeout, check=True).stdout

    def submit(self, script: Path, *arguments: str, options: Sequence[str] = (), **env: str) -> int:
        """``sbatch``; returns the job's id."""
        return int(self("sbatch", "--parsable", *options, str(script), *arguments, env=env).split(";")[0])

    def state(self, job: int) -> str:
        """``PENDING``, ``RUNNING``, ``COMPLETED``, …"""
        return self.job(job)["JobState"]

    def job(self, job: int) -> dict[str, str]:
        """The fields of ``scontrol show job``."""
        return dict(re.findall(r"(\w[\w:/]*)=(\S*)", self("scontrol", "show", "job", str(job))))

    def node_state(self, host: Host) -> str:
        """``IDLE``, ``ALLOCATED``, ``DOWN``, …"""
        fields = dict(re.findall(r"(\w+)=(\S*)", self("scontrol", "show", "node", host.name)))
        return fields["State"]

    def run_again(self, job: int, timeout: float = 60.0) -> None:
        """Wait until a job that is requeued runs again; not the two minutes that Slurm makes it wait."""

        def running() -> bool:
            if self.state(job) != "PENDING":
                return True
            # May fail: the job may have begun, and even ended, meanwhile.
            self._cluster.control.run(["scontrol", "update", f"JobId={job}", "StartTime=now"])
            return False

        wait_until(lambda: self.state(job) == "PENDING", timeout, self.log)
        time.sleep(2)  # a node refuses a job that it was told to forget in the same second
        wait_until(running, timeout, self.log)

    def log(self) -> str:
        """What the daemons say and where the jobs are, for a test that fails."""
        logs = [f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self._folder.glob("*.log"))]
        return "Slurm:\n" + self("squeue", "--long") + self("sinfo", "--long", "--Node") + "\n".join(logs)

    def _all_idle(self) -> bool:
        states = self("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T").split()
        return len(states) == len(self._cluster.hosts) and set(states) == {"idle"}
