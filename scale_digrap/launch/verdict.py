"""What is wrong with a set of hosts, from what each tells about itself: pure functions on tables, without torch.

A table has one row per host, in the order of ranks: the dictionaries of :func:`scale_digrap.launch.probe.report`. What
should be equal and is not is put to a vote; with as many on either side, the side of the first host is the reference.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIN_MBIT_PER_S = 500.0
MAX_SKEW_S = 2.0
_SLOW = 0.3  # of the median of the other links
_MIN_SHM_BYTES = 1 << 30
_MIN_OPEN_FILES = 4096
_GPU_IN_USE_MIB = 1024

Table = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        hosts: the odd ones; empty where it is no single host's fault.
        problem: what, with the values.
        fix: what to do.
        fatal: training would fail or be far too slow; else it is for people to judge.
    """

    hosts: tuple[str, ...]
    problem: str
    fix: str
    fatal: bool = True

    def __str__(self) -> str:
        where = f"{', '.join(self.hosts)}: " if self.hosts else ""
        return f"{'' if self.fatal else 'note: '}{where}{self.problem}; {self.fix}"


def judge(
    table: Table,
    *,
    device: str = "auto",
    processes: int | None = None,
    workers: int = 0,
    needed_bytes: int | None = None,
    scheduler: str = "hosts",
) -> list[Finding]:
    """Everything that the hosts' own reports tell.

    Args:
        table: the reports.
        device: ``training.device``.
        processes: of a host; None where it is not known yet.
        workers: loader processes of a rank.
        needed_bytes: room that the run's checkpoints take; None where it is not known.
        scheduler: how hosts are left out: ``slurm``, ``kubernetes`` or ``hosts``.
    """
    return [
        *judge_versions(table, scheduler),
        *judge_environment(table),
        *judge_gpus(table, device, processes, scheduler),
        *judge_folder(table, needed_bytes),
        *judge_shards(table),
        *judge_model(table),
        *judge_limits(table, workers),
        *judge_names(table),
    ]


def exclude(hosts: Iterable[str], scheduler: str) -> str:
    """How to start the job without some hosts."""
    names = sorted(hosts)
    if scheduler == "slurm":
        return f"--exclude={','.join(names)}"
    if scheduler == "kubernetes":
        return f"cordon the node of pod {', '.join(names)} (kubectl cordon NODE) and delete the pod"
    plural = "s" if len(names) > 1 else ""
    return f"take {', '.join(names)} out of `hosts` (launch.yaml), or the line{plural} out of the hostfile"


def outliers(values: Sequence[Any]) -> tuple[Any, list[int]]:
    """The value that most have, and who has another one."""
    texts = [json.dumps(value, sort_keys=True) for value in values]
    counts = Counter(texts)  # in order of appearance, so that the first host's value wins a draw
    reference = max(counts, key=lambda text: counts[text])
    return json.loads(reference), [index for index, text in enumerate(texts) if text != reference]


def _differing(table: Table, values: Sequence[Any]) -> list[tuple[tuple[str, ...], Any, str]]:
    """(hosts, their value, what the others have) for every value that is not that of the majority."""
    reference, odd = outliers(values)
    if not odd:
        return []
    others = [row["host"] for index, row in enumerate(table) if index not in odd]
    who = others[0] if len(others) == 1 else f"the other {len(others)}"
    groups: dict[str, list[int]] = {}
    for index in odd:
        groups.setdefault(json.dumps(values[index], sort_keys=True), []).append(index)
    shown = f"{who} {'has' if len(others) == 1 else 'have'} {_show(reference)}"
    return [(tuple(table[i]["host"] for i in members), json.loads(text), shown) for text, members in groups.items()]


def _show(value: Any) -> str:
    return "none" if value is None else str(value)


def judge_versions(table: Table, scheduler: str) -> list[Finding]:
    """Interpreter, packages, CUDA, NCCL and driver must be the same."""
    found = []
    for name in sorted({name for row in table for name in row["versions"]}):
        for hosts, value, others in _differing(table, [row["versions"].get(name) for row in table]):
            text = f"{name} is {value}" if value is not None else f"{name} is missing"
            fix = f"install the same on every host, or {exclude(hosts, scheduler)}"
            found.append(Finding(hosts, f"{text}, {others}", fix))
    return found


def judge_environment(table: Table) -> list[Finding]:
    """Variables that change what the libraries do must be the same."""
    found = []
    for name in sorted({name for row in table for name in row["environment"]}):
        for hosts, value, others in _differing(table, [row["environment"].get(name) for row in table]):
            text = f"{name}={value}" if value is not None else f"{name} is not set"
            fix = f"unset it there (a shell profile?), or set it for all: `environment: {{{name}: …}}` in launch.yaml"
            found.append(Finding(hosts, f"{text}, {others}", fix))
    return found


def judge_gpus(table: Table, device: str, processes: int | None, scheduler: str) -> list[Finding]:
    """Every host has the same GPUs, enough of them, and nobody else uses them."""
    found = []
    cards = [sorted((gpu["name"], gpu["memory_mib"]) for gpu in row["gpus"]) for row in table]
    for hosts, value, others in _differing(table, [_count(names) for names in cards]):
        fix = f"check `nvidia-smi` there, or {exclude(hosts, scheduler)}"
        found.append(Finding(hosts, f"GPUs: {_show(value)}, {others}", fix, fatal=device != "cpu"))
    for row in table:
        host, gpus, seen = (row["host"],), row["gpus"], row["visible_gpus"]
        if device == "cuda" and not seen:
            reason = f"nvidia-smi lists {len(gpus)}, torch sees none" if gpus else "there is none"
            text = f"training.device=cuda, but no GPU is usable: {reason}"
            found.append(Finding(host, text, _exclude(host, scheduler)))
        elif device != "cpu" and seen and processes is not None and processes > seen:
            text = f"{processes} processes, but {seen} GPU{'s' * (seen > 1)} to be seen (CUDA_VISIBLE_DEVICES)"
            found.append(Finding(host, text, "start one process per GPU"))
        if device != "cpu":
            busy = [f"{k} ({gpu['used_mib']} MiB)" for k, gpu in enumerate(gpus) if gpu["used_mib"] > _GPU_IN_USE_MIB]
            if busy:
                text = f"memory of GPU {', '.join(busy)} is in use by somebody else"
                found.append(Finding(host, text, _exclude(host, scheduler), fatal=False))
    return found


def _exclude(hosts: Iterable[str], scheduler: str) -> str:
    return f"repair it, or {exclude(hosts, scheduler)}"


def _count(cards: Sequence[tuple[str, int]]) -> str | None:
    counts = Counter(f"{name} ({mib // 1024} GiB)" for name, mib in cards)
    return " + ".join(f"{number} × {name}" for name, number in sorted(counts.items())) or None


def judge_folder(table: Table, needed_bytes: int | None) -> list[Finding]:
    """``run_dir`` is one folder that all hosts see and may write to, with room for the checkpoints."""
    found = []
    fix = "put run_dir on a file system that all hosts mount at the same path, writable for this user"
    for row in table:
        if row["folder"]["error"]:
            found.append(Finding((row["host"],), f"run_dir {row['folder']['path']} {row['folder']['error']}", fix))
    apart = [row for row in table if not row["folder"]["sees_first"] and not row["folder"]["error"]]
    first = table[0]
    if apart and not first["folder"]["error"]:
        if 1 < len(apart) == len(table) - 1:  # nobody sees what the first host writes: it is the odd one
            text = f"run_dir {first['folder']['path']} is not the folder that the others have there"
            found.append(Finding((first["host"],), text, fix))
        else:
            text = f"run_dir {apart[0]['folder']['path']} is not the folder that {first['host']} has there"
            found.append(Finding(tuple(row["host"] for row in apart), text, fix))
    free = [(row["folder"]["free_bytes"], row["host"]) for row in table if row["folder"]["free_bytes"] is not None]
    if needed_bytes is not None and free and min(free)[0] < needed_bytes:
        room, host = min(free)
        found.append(
            Finding(
                (host,),
                f"run_dir {table[0]['folder']['path']} has room for {gigabytes(room)}, the run's checkpoints take "
                f"{gigabytes(needed_bytes)}",
                "free some, lower checkpoint.keep, or choose another run_dir",
            )
        )
    return found


def judge_shards(table: Table) -> list[Finding]:
    """All hosts can read the data, and it is the same data."""
    found = []
    errors: dict[str, list[str]] = {}
    for row in table:
        for error in row["shards"]["errors"]:
            errors.setdefault(error, []).append(row["host"])
    for error, names in errors.items():
        where = () if len(names) == len(table) else tuple(names)
        found.append(Finding(where, error, "copy it there, mount it, or correct data.train and evaluation.suites"))
    readable = [row for row in table if not row["shards"]["errors"]]
    if readable:
        for hosts, value, others in _differing(readable, [row["shards"]["content"] for row in readable]):
            fix = "the shards must be the same files on all hosts: names, order and sizes"
            found.append(Finding(hosts, f"shards: {value}, {others}", fix))
    return found


def judge_model(table: Table) -> list[Finding]:
    """All hosts can read the model, and it is the same one."""
    found = [
        Finding((row["host"],), row["model"]["error"], "copy or download it there, or correct model.path")
        for row in table
        if row["model"]["error"]
    ]
    there = [row for row in table if not row["model"]["error"]]
    if there:
        for hosts, value, others in _differing(there, [row["model"]["content"] for row in there]):
            found.append(Finding(hosts, f"the files of the model: {value}, {others}", "give all hosts the same model"))
    return found


def judge_limits(table: Table, workers: int) -> list[Finding]:
    """Shared memory and open files, which loader processes and large jobs use up."""
    found = []
    for row in table:
        shm, files = row["limits"]["shm_bytes"], row["limits"]["open_files"]
        if workers and shm is not None and shm < _MIN_SHM_BYTES:
            fix = "enlarge it (Docker: --shm-size; Kubernetes: an emptyDir with medium Memory), or data.workers=0"
            found.append(Finding((row["host"],), f"/dev/shm has {gigabytes(shm)} for the loader processes", fix))
        if files < _MIN_OPEN_FILES:
            fix = "ulimit -n 65536 before the start, or in limits.conf"
            found.append(Finding((row["host"],), f"a process may open {files} files only", fix, fatal=False))
    return found


def judge_names(table: Table) -> list[Finding]:
    """Gloo listens at the address of the host's own name, or at the interface that it is given."""
    found = []
    for row in table:
        names = row["network"]
        for variable, wanted in names["no_such_interface"].items():
            fix = f"name one of {', '.join(names['interfaces'])}"
            found.append(Finding((row["host"],), f"{variable}={wanted}, but there is no such interface", fix))
        if len(table) > 1 and not names["interface_given"] and names["own_address"] is None:
            fix = "enter it in /etc/hosts or in the DNS, or set GLOO_SOCKET_IFNAME"
            found.append(Finding((row["host"],), "does not know the address of its own name", fix))
        elif len(table) > 1 and not names["interface_given"] and names["own_address"].startswith("127."):
            text = f"its own name means {names['own_address']}: others would be told to connect to themselves"
            found.append(Finding((row["host"],), text, "correct /etc/hosts there, or set GLOO_SOCKET_IFNAME"))
    return found


def judge_arrivals(
    expected: Sequence[str], arrived: Sequence[str | None], waited_s: float, scheduler: str
) -> list[Finding]:
    """Who did not come, by name where names were given."""
    late = [name for name, host in zip(expected, arrived, strict=True) if host is None]
    if not late:
        return []
    text = f"did not arrive within {waited_s:.0f} s ({len(expected) - len(late)} of {len(expected)} hosts did)"
    return [Finding(tuple(late), text, f"is it up, and did the job start there? Otherwise {exclude(late, scheduler)}")]


def judge_clocks(hosts: Sequence[str], skews: Mapping[int, tuple[float, float]], limit_s: float) -> list[Finding]:
    """Clocks against that of the first host.

    Args:
        hosts: names by rank.
        skews: rank → (s ahead of rank 0, how far that may be wrong).
        limit_s: what is still tolerated.
    """
    fix = "start chrony or ntpd there: object stores, munge and tickets refuse clocks that are wrong"
    return [
        Finding((hosts[rank],), f"its clock is {skew:+.1f} s off that of {hosts[0]}", fix)
        for rank, (skew, error) in sorted(skews.items())
        if abs(skew) - error > limit_s
    ]


def slow_links(links: Mapping[tuple[int, int], float], minimum: float) -> list[tuple[int, int]]:
    """Links below ``minimum`` (10⁶ bit/s), or far below what is usual among them."""
    usual = sorted(links.values())[len(links) // 2] if links else 0.0
    return sorted(pair for pair, speed in links.items() if speed < max(minimum, _SLOW * usual))


def judge_links(
    hosts: Sequence[str], links: Mapping[tuple[int, int], float], minimum: float, scheduler: str
) -> list[Finding]:
    """Links that are too slow, and the host that they have in common.

    Args:
        hosts: names by rank.
        links: pair of ranks → 10⁶ bit/s, for a ring of neighbours.
        minimum: as for :func:`slow_links`.
        scheduler: as for :func:`judge`.
    """
    slow = slow_links(links, minimum)
    found, explained = [], set()
    best = max(links.values(), default=0.0)
    for rank, host in enumerate(hosts):
        mine = [pair for pair in links if rank in pair]
        # With two hosts either may be at fault; with three, the one that both slow links of the ring have in common.
        if len(mine) > 1 and all(pair in slow for pair in mine) and len(slow) < len(links):
            explained |= set(mine)
            speeds = ", ".join(f"{hosts[a]}–{hosts[b]} {links[a, b]:.0f} Mbit/s" for a, b in sorted(mine))
            fix = f"check its cable, port and driver, or {exclude([host], scheduler)}"
            found.append(Finding((host,), f"all its links are slow: {speeds} (the best link has {best:.0f})", fix))
    for a, b in slow:
        if (a, b) not in explained:
            usual = f"the best link has {best:.0f}" if best > links[a, b] else f"at least {minimum:.0f} are expected"
            text = f"the link between them is slow: {links[a, b]:.0f} Mbit/s ({usual})"
            fix = "is it the right interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)? --min-mbit-per-s accepts less"
            found.append(Finding((hosts[a], hosts[b]), text, fix))
    return found


def gigabytes(count: float) -> str:
    """A number of bytes for people, in powers of ten."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
