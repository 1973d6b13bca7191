"""Hosts for launch tests: network namespaces on one machine, with real names, addresses, links and power switches.

A host is a set of NET, UTS, MOUNT, PID and IPC namespaces around one init process. All hosts hang on a bridge in a
namespace of its own, so that nothing is added to the machine's network and no host can reach beyond it. Its own
/etc/hosts, /etc/ssh, /run and /dev/shm are mounts that only it sees; the file system is otherwise the machine's, which
makes it the cluster's shared one. Every namespace lives as long as a process that reads a pipe of ours: when the test
process ends, even by SIGKILL, all hosts and everything that runs on them end with it, and nothing is left to remove.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.launch import etc

NETWORK = "10.77.0"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SLURM_TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
_FIRST = 10

_INIT = r"""
set -e
hostname "$1"
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
for name in hosts resolv.conf nsswitch.conf; do
  if [ -e "/etc/$name" ]; then mount --bind "$2/$name" "/etc/$name"; fi
done
if [ -d "$2/ssh" ]; then
  mount --bind "$2/ssh" /etc/ssh
  mkdir /run/sshd
  /usr/sbin/sshd </dev/null >/run/sshd.log 2>&1
fi
echo ready
read -r _ || true
"""


class ClusterError(RuntimeError):
    """A host that cannot be made or does not come up."""


@functools.cache
def unavailable() -> str | None:
    """Why this machine cannot make hosts, whatever is installed on it; None where it can."""
    if os.geteuid() != 0:
        return "hosts out of namespaces can be made by root only"
    if shutil.which("unshare") is None:
        return "hosts out of namespaces need Linux and util-linux"
    devices = "ip link add br0 type bridge && ip link add v0 type veth peer name v1 && " if shutil.which("ip") else ""
    probe = f"{devices}mount -t sysfs sysfs /sys && mount -t tmpfs tmpfs /run"
    command = ["unshare", "--net", "--uts", "--pid", "--ipc", "--mount", "--fork", "sh", "-c", probe]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if done.returncode:
        return f"this machine makes no namespaces: {' '.join(done.stderr.split()) or f'status {done.returncode}'}"
    return None


def missing_tools(*, ssh: bool = False, slurm: bool = False) -> list[str]:
    """What `make cluster-tools` would install and is not there."""
    wanted = ["ip", "tc", "nsenter", *(["sshd", "ssh", "pdsh"] if ssh else []), *(SLURM_TOOLS if slurm else [])]
    return [tool for tool in wanted if shutil.which(tool, path=SYSTEM_PATH) is None]


class _Held:
    """Namespaces that exist while a shell in them waits for the end of its input."""

    def __init__(self, command: Sequence[str], *, forks: bool = False) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            _, said = self._process.communicate(timeout=30)
            raise ClusterError(f"{' '.join(command[:6])} …: exit status {self._process.returncode}: {said.strip()}")
        self.pid = _only_child(self._process.pid) if forks else self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        """Kill the shell, at once and for good; the kernel kills what lives in a PID namespace of its own."""
        for pid in (getattr(self, "pid", None), self._process.pid):
            if pid is not None and self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _only_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


class Running:
    """A command on a host; what it prints goes to a file."""

    def __init__(self, host: Host, process: subprocess.Popen[bytes], log: Path) -> None:
        self.host, self.log, self._process = host, log, process
        self._inner: int | None = None

    @property
    def pid(self) -> int:
        """The command's process as the machine counts; nsenter, which started it, passes no signals on."""
        if self._inner is None:
            self._inner = wait_until(lambda: _first_child(self._process.pid), 10, "the command to start")
        return self._inner

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.poll()

    def signal(self, number: int) -> None:
        """Send a signal to the command itself."""
        os.kill(self.pid, number)

    def wait(self, timeout: float) -> int:
        """The exit status. Fails with the output when the command is still running after the time."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout:.0f} s:\n{self.output()}") from None

    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def _first_child(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else None
    return None


class Host:
    """One host of a :class:`Cluster`."""

    def __init__(self, cluster: Cluster, index: int, name: str) -> None:
        self.cluster, self.index, self.name = cluster, index, name
        self.address = f"{NETWORK}.{_FIRST + index}"
        self.folder = cluster.folder / name
        self._port = f"port{index}"
        self._init: _Held | None = None
        self._started = 0
        # Apart from the init process: a host that loses its power keeps its place at the switch, as a real one does.
        self._net = _Held(["unshare", "--net", "sh", "-c", "echo ready; read -r _"])
        _ip(
            cluster.switch.pid,
            f"link add {self._port} type veth peer name eth0 netns {self._net.pid}",
            f"link set {self._port} master bridge up",
        )
        _ip(self._net.pid, "link set lo up", f"address add {self.address}/24 dev eth0", "link set eth0 up")

    @property
    def alive(self) -> bool:
        """The power is on."""
        return self._init is not None and self._init.alive

    def power_on(self) -> None:
        """Start the host: nothing runs on it but its init process and, in a cluster with ssh, sshd."""
        assert not self.alive, self.name
        self._init = _Held(
            ["nsenter", f"--net=/proc/{self._net.pid}/ns/net", "unshare", "--uts", "--pid", "--ipc", "--mount",
             "--fork", "--kill-child=SIGKILL", "--mount-proc", "bash", "-c", _INIT, "init", self.name,
             str(self.folder)],
            forks=True,
        )  # fmt: skip

    def power_off(self) -> None:
        """Kill the host with all that runs on it. Its peers see their connections closed."""
        if self._init is not None:
            self._init.end()
            self._init = None

    def cut(self) -> None:
        """Power off behind an unplugged cable: its peers see nothing, only time tells."""
        self.unplug()
        self.power_off()

    def unplug(self) -> None:
        """Take the cable out: nothing is sent either way, and nobody is told."""
        _ip(self.cluster.switch.pid, f"link set {self._port} down")

    def plug(self) -> None:
        """Put the cable back."""
        _ip(self.cluster.switch.pid, f"link set {self._port} up")

    def throttle(self, mbit: float | None) -> None:
        """Limit the cable to so many 10⁶ bit/s each way; None lifts the limit."""
        for pid, device in ((self.cluster.switch.pid, self._port), (self._net.pid, "eth0")):
            if mbit is None:
                rule = f"qdisc del dev {device} root"
            else:
                rule = f"qdisc replace dev {device} root tbf rate {mbit}mbit burst 64kb latency 200ms"
            _in_network(pid, ["tc", *rule.split()])

    def close(self) -> None:
        """Take the host apart."""
        self.power_off()
        self._net.end()

    # Commands

    def command(self, argv: Sequence[str], env: Mapping[str, str] | None, cwd: str | Path | None) -> list[str]:
        """What runs ``argv`` on the host when it is run on the machine."""
        assert self._init is not None, f"{self.name} is off"
        variables = [f"{key}={value}" for key, value in {**self.cluster.environment, **(env or {})}.items()]
        place = ["env", "-i", f"--chdir={cwd or self.cluster.folder}", *variables]
        return ["nsenter", "-t", str(self._init.pid), "-n", "-u", "-m", "-p", "-i", "--", *place, *map(str, argv)]

    def run(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        *,
        cwd: str | Path | None = None,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end.

        Args:
            argv: the command.
            env: variables besides :attr:`Cluster.environment`; those of the test process are not handed on.
            timeout: in s; then the command is killed and the test fails.
            cwd: working directory; the cluster's folder by default.
            check: fail where the exit status is not 0.
        """
        running = self.popen(argv, env, cwd=cwd)
        try:
            code = running.wait(timeout)
        finally:
            if running.poll() is None:
                running.signal(signal.SIGKILL)
        done = subprocess.CompletedProcess(list(argv), code, running.output(), "")
        assert not (check and code), f"{self.name}: {' '.join(map(str, argv))}: exit status {code}\n{done.stdout}"
        return done

    def popen(
        self, argv: Sequence[str], env: Mapping[str, str] | None = None, *, cwd: str | Path | None = None
    ) -> Running:
        """Start a command; arguments as of :meth:`run`."""
        self._started += 1
        log = self.folder / f"output-{self._started}.txt"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                self.command(argv, env, cwd), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )
        self.cluster.started.append(process)
        return Running(self, process, log)

    def processes(self, pattern: str = "") -> dict[int, str]:
        """Process ids, as the machine counts them, and command lines of what runs on the host and holds ``pattern``."""
        if not self.alive or self._init is None:
            return {}
        mine = os.readlink(f"/proc/{self._init.pid}/ns/pid")
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if os.readlink(entry / "ns" / "pid") == mine:
                        words = (entry / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
                        line = b" ".join(words).decode(errors="replace")
                        if line and pattern in line:
                            found[int(entry.name)] = line
        return found


class Cluster:
    """Hosts on one switch.

    Args:
        hosts: how many (``node0``, ``node1``, …), or their names.
        domain: every host is also known as ``name.domain``, as the pods behind a headless service are.
        ssh: sshd on every host; root of each may enter each, all keys are known beforehand.
        slurm: a Slurm whose nodes are the hosts (:class:`tests.launch.slurm.Slurm`), controlled from one more host.

    Raises:
        ClusterError: programs are missing; a host does not come up.
    """

    def __init__(
        self, hosts: int | Sequence[str], *, domain: str | None = None, ssh: bool = False, slurm: bool = False
    ) -> None:
        names = [f"node{k}" for k in range(hosts)] if isinstance(hosts, int) else list(hosts)
        if slurm:
            names.append("control")
        if missing := missing_tools(ssh=ssh, slurm=slurm):
            raise ClusterError(f"missing: {', '.join(missing)} (make cluster-tools)")
        # The path of a UNIX socket is at most 107 characters long: not under pytest's folder.
        self.folder = Path(tempfile.mkdtemp(prefix="cluster-"))
        self.folder.chmod(0o755)
        self.started: list[subprocess.Popen[bytes]] = []
        self._all: list[Host] = []
        self.slurm: Any = None
        atexit.register(self.close)
        try:
            self.switch = _Held(
                ["unshare", "--net", "sh", "-c", "ip link add bridge type bridge && ip link set bridge up && "
                 "ip link set lo up && echo ready && read -r _"]
            )  # fmt: skip
            for index, name in enumerate(names):
                (self.folder / name).mkdir()
                self._all.append(Host(self, index, name))
            addresses = {host.name: host.address for host in self._all}
            etc.write(self.folder, addresses, domain)
            if ssh:
                etc.write_ssh(self.folder, addresses)
            for host in self._all:
                host.power_on()
            if slurm:
                from tests.launch.slurm import Slurm

                self.slurm = Slurm(self)
        except BaseException:
            self.close()
            raise

    @property
    def hosts(self) -> list[Host]:
        """The hosts that work; without the one that controls Slurm."""
        return [host for host in self._all if host.name != "control"]

    @property
    def control(self) -> Host:
        """The host of Slurm's controller."""
        return next(host for host in self._all if host.name == "control")

    def __getitem__(self, index: int) -> Host:
        return self.hosts[index]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def environment(self) -> dict[str, str]:
        """What a login on a host would set: the interpreter of the tests comes first in PATH."""
        return {
            "PATH": f"{Path(sys.executable).parent}:{SYSTEM_PATH}",
            "HOME": os.environ.get("HOME", "/root"),
            "USER": "root",
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **({"SLURM_CONF": str(self.slurm.conf)} if self.slurm is not None else {}),
        }

    def reset(self) -> None:
        """End what still runs on the hosts, power all on, plug all in, lift limits: for a module that shares them."""
        for host in self.hosts:
            host.plug()
            host.throttle(None)
            host.power_off()
            host.power_on()
        if self.slurm is not None:
            self.slurm.reset()

    def close(self) -> None:
        """End every process, by its id, and remove everything. May be called twice."""
        atexit.unregister(self.close)
        for host in self._all:
            host.close()
        self._all = []
        if hasattr(self, "switch"):
            self.switch.end()
        for process in self.started:
            process.wait()  # nsenter, whose child went with its host
        self.started = []
        shutil.rmtree(self.folder, ignore_errors=True)


def _in_network(pid: int, command: Sequence[str]) -> None:
    subprocess.run(["nsenter", f"--net=/proc/{pid}/ns/net", *command], timeout=30, capture_output=True)


def _ip(pid: int, *lines: str) -> None:
    command = ["nsenter", f"--net=/proc/{pid}/ns/net", "ip", "-batch", "-"]
    done = subprocess.run(command, input="\n".join(lines) + "\n", timeout=30, capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"ip {'; '.join(lines)}: {done.stderr.strip()}")


def wait_until(condition: Callable[[], Any], timeout: float, what: str | Callable[[], str]) -> Any:
    """Poll until a condition is true and return its value; fails with ``what`` after ``timeout`` s."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s for {what if isinstance(what, str) else what()}"
        time.sleep(0.05)


@contextlib.contextmanager
def all_ended(runs: Sequence[Running]) -> Iterator[None]:
    """Kill what is left of some commands at the end of the block, by process id."""
    try:
        yield
    finally:
        for running in runs:
            if running.poll() is None:
                with contextlib.suppress(ProcessLookupError, AssertionError):
                    running.signal(signal.SIGKILL)
