"""``python -m scale_digrap.launch.preflight``: what would make a run fail or crawl, told before it starts.

One process a host, started as the run's agents are. Each tells about itself (:mod:`scale_digrap.launch.probe`), they
measure what is between them (:mod:`scale_digrap.launch.exchange`), and rank 0 says which host is the odd one
(:mod:`scale_digrap.launch.verdict`). All end with status 0, or 2 where the run should not be started.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scale_digrap.config import Config, load_config, validate_for_training
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.launch.exchange import (
    MEET_S,
    SECRET,
    UNSIGNED,
    Exchange,
    Place,
    PreflightError,
    meet,
    network,
    quiet,
)
from scale_digrap.launch.verdict import (
    MAX_SKEW_S,
    MIN_MBIT_PER_S,
    Finding,
    exclude,
    gigabytes,
    judge,
    judge_arrivals,
    judge_clocks,
    judge_links,
)
from scale_digrap.runtime import console

JOIN_S = 120.0
SCHEDULERS = ("hosts", "slurm", "kubernetes")
_PORT = 29500


def main(argv: Sequence[str] | None = None) -> int:
    """Run the preflight on this host.

    Returns:
        0, or 2 where anything was found that would stop or cripple the run.
    """
    console.prepare()
    arguments = _parser().parse_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        validate_for_training(config)
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return 0  # one process a host
        return check(config, place(arguments, os.environ), arguments)
    except ScaleDigrapError as error:
        print(f"scale-digrap: preflight: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return error.exit_status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scale_digrap.launch.preflight",
        description="Check hosts before a run. Start it once on every host, with the same arguments but --rank.",
        epilog="Under Slurm, `srun --ntasks-per-node=1` and the configuration are enough; under torchrun too.",
    )
    parser.add_argument("config", metavar="CONFIG.yaml", type=Path)
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--nodes", type=int, help="how many hosts")
    parser.add_argument("--rank", type=int, help="which of them this is, from 0")
    parser.add_argument("--endpoint", metavar="HOST:PORT", help="where rank 0 listens: that of the run's rendezvous")
    parser.add_argument("--hosts", metavar="NAME,…", help="their names in the order of ranks, to name who is missing")
    parser.add_argument("--processes", type=int, help="ranks that the run will have on every host")
    parser.add_argument("--scheduler", choices=SCHEDULERS, help="how a host is left out")
    parser.add_argument("--join-timeout-s", type=float, default=JOIN_S, metavar="S", help=f"({JOIN_S:.0f})")
    parser.add_argument(
        "--min-mbit-per-s", type=float, default=MIN_MBIT_PER_S, metavar="X", help=f"slowest link ({MIN_MBIT_PER_S:.0f})"
    )
    parser.add_argument("--max-skew-s", type=float, default=MAX_SKEW_S, metavar="S", help=f"of clocks ({MAX_SKEW_S:g})")
    return parser


def place(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Place:
    """This host among the others: from the arguments, else from what a launcher or scheduler has set.

    Raises:
        PreflightError: it cannot be told, or does not fit together.
    """
    if "GROUP_RANK" in environment and arguments.rank is None and not arguments.hosts:
        # Under torchrun: its agents have met already, in an order of their own.
        return Place(int(environment["GROUP_RANK"]), int(environment["GROUP_WORLD_SIZE"]), None)
    hosts = tuple(arguments.hosts.split(",")) if arguments.hosts else _slurm_hosts(environment)
    nodes = arguments.nodes or (len(hosts) if hosts else 0)
    nodes = nodes or int(environment.get("SLURM_NNODES") or environment.get("CROSS_SIZE") or 1)
    if hosts and len(hosts) != nodes:
        raise PreflightError(f"--nodes={nodes}, but --hosts names {len(hosts)}: {', '.join(hosts)}")
    rank = arguments.rank
    if rank is None and arguments.hosts:
        rank = _own_place(hosts or ())
    if rank is None:
        for name in ("CROSS_RANK", "SLURM_NODEID", "SLURM_PROCID", "JOB_COMPLETION_INDEX"):
            if name in environment:
                rank = int(environment[name])
                break
    if rank is None and nodes == 1:
        rank = 0
    if rank is None or not 0 <= rank < nodes:
        told = "give --rank" if rank is None else f"rank {rank} is not among 0 … {nodes - 1}"
        known = f"; this host is {socket.gethostname()}, --hosts has {', '.join(hosts)}" if hosts else ""
        raise PreflightError(f"which of the {nodes} hosts is this? {told}{known}")
    return Place(rank, nodes, _endpoint(arguments.endpoint, hosts, nodes, environment), hosts)


def _slurm_hosts(environment: Mapping[str, str]) -> tuple[str, ...] | None:
    listed = environment.get("SLURM_JOB_NODELIST")
    if not listed or shutil.which("scontrol") is None:
        return None
    done = subprocess.run(["scontrol", "show", "hostnames", listed], capture_output=True, text=True, timeout=60)
    return tuple(done.stdout.split()) or None


def _own_place(hosts: Sequence[str]) -> int | None:
    own = {socket.gethostname(), socket.gethostname().partition(".")[0], socket.getfqdn()}
    found = [rank for rank, host in enumerate(hosts) if host in own or host.partition(".")[0] in own]
    return found[0] if len(found) == 1 else None


def _endpoint(
    given: str | None, hosts: Sequence[str] | None, nodes: int, environment: Mapping[str, str]
) -> tuple[str, int]:
    if given:
        match = re.fullmatch(r"\[?([^\]]+?)\]?:(\d+)", given)
        if match is None or not 0 < int(match.group(2)) < 65536:
            raise PreflightError(f"--endpoint {given!r} is not HOST:PORT, such as {(hosts or ['node0'])[0]}:29500")
        return match.group(1), int(match.group(2))
    if "CROSS_RANK" in environment and "MASTER_ADDR" in environment:  # the deepspeed launcher
        return environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    if hosts:
        return hosts[0], 20000 + int(environment.get("SLURM_JOB_ID", _PORT - 20000)) % 10000
    if nodes > 1:
        raise PreflightError("where do the hosts meet? give --hosts, or --endpoint HOST:PORT with the host of rank 0")
    return "localhost", _PORT


def check(config: Config, here: Place, arguments: argparse.Namespace) -> int:
    """Meet, compare, measure, judge; 0 or 2."""
    quiet()
    from scale_digrap.launch import probe

    began = time.monotonic()
    scheduler = arguments.scheduler or _scheduler(os.environ)
    alone = here.nodes == 1
    if alone and here.endpoint is not None:
        here = Place(0, 1, ("localhost", _free_port()), here.hosts)
    store = meet(here, arguments.join_timeout_s)
    exchange = Exchange(here, store)
    name = here.hosts[here.rank] if here.hosts else socket.gethostname()
    arrived = exchange.gather("arrived", name, arguments.join_timeout_s)
    findings = judge_arrivals(here.expected, arrived, arguments.join_timeout_s, scheduler)

    (token, *_) = exchange.gather("token", uuid.uuid4().hex[:12])
    folder = probe.SharedFolder(config.run_dir, here.rank, token)
    try:
        exchange.gather("written", True)
        mine = probe.report(config, os.environ) | {"host": name}
        mine["folder"] = folder.look()
        table = exchange.gather("report", mine)
        exchange.gather("looked", True)  # before anybody takes its file away
    finally:
        folder.remove()
    silent = [host for host, row in zip(arrived, table, strict=True) if row is None and host is not None]
    if silent:
        fix = f"is a file system or the storage of the shards hanging there? Otherwise {exclude(silent, scheduler)}"
        findings.append(Finding(tuple(silent), f"told nothing for {MEET_S:.0f} s", fix))
    rows = [row for row in table if row is not None]
    needed = probe.checkpoint_bytes(config)
    findings += judge(
        rows,
        device=config.training.device,
        processes=arguments.processes or int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or None,
        workers=config.data.workers,
        needed_bytes=needed,
        scheduler=scheduler,
    )

    told = [f"{len(rows)} of {here.nodes} hosts: {', '.join(row['host'] for row in rows)}", *_summary(rows, needed)]
    if not alone and not os.environ.get(SECRET):
        told.append(UNSIGNED)
    if here.endpoint is not None and None in arrived:
        told.append(f"this host listened at {store.host}, port {store.port}")
    if alone:
        told.append("network: one host, nothing to measure")
    elif len(rows) < here.nodes:
        told.append("network: not measured, because not all hosts are there")
    else:
        found, line = _between(here, name, exchange, store, config, arguments, scheduler)
        findings += found
        told.append(line)
    fatal = sum(finding.fatal for finding in findings)
    status = exchange.gather("verdict", 2 if fatal else 0)[0]  # rank 0's, who alone knows all
    if here.rank == 0:
        _print(told, findings, fatal, time.monotonic() - began)
    exchange.leave()
    return status


def _between(
    here: Place,
    name: str,
    exchange: Exchange,
    store: Any,
    config: Config,
    arguments: argparse.Namespace,
    scheduler: str,
) -> tuple[list[Finding], str]:
    skews = exchange.clocks()
    problem: str | None = None
    links: dict[tuple[int, int], float] = {}
    reduced = 0.0
    try:
        links, reduced = network(here, store, config.training.device, arguments.min_mbit_per_s)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:300]
    problems = exchange.gather("network", problem)
    hosts = exchange.gather("names", name)
    findings = judge_clocks(hosts, skews, arguments.max_skew_s)
    failed = [rank for rank, told in enumerate(problems) if told]
    if failed:
        fix = "is the network between the hosts open (all ports), is GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME right?"
        text = f"the hosts cannot exchange tensors: {problems[failed[0]]}"
        findings.append(Finding(tuple(hosts[rank] for rank in failed), text, fix))
        return findings, "network: no connection"
    findings += judge_links(hosts, links, arguments.min_mbit_per_s, scheduler)
    skew = max((abs(skew) for skew, _ in skews.values()), default=0.0)
    return findings, (
        f"network: links {min(links.values()):.0f} to {max(links.values()):.0f} Mbit/s, all-reduce {reduced:.0f} MB/s; "
        f"clocks at most {1e3 * skew:.1f} ms apart"
    )


def _scheduler(environment: Mapping[str, str]) -> str:
    if "SLURM_JOB_ID" in environment:
        return "slurm"
    return "kubernetes" if "KUBERNETES_SERVICE_HOST" in environment else "hosts"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _summary(rows: Sequence[Mapping[str, Any]], needed: int | None) -> list[str]:
    first = rows[0]
    versions = ", ".join(f"{name} {value}" for name, value in first["versions"].items() if value is not None)
    free = [row["folder"]["free_bytes"] for row in rows if row["folder"]["free_bytes"] is not None]
    room = gigabytes(min(free)) if free else "nothing"
    wanted = "the size of a checkpoint is not known beforehand" if needed is None else f"{gigabytes(needed)} needed"
    gpus = sum(row["visible_gpus"] for row in rows)
    return [
        versions,
        f"run_dir {first['folder']['path']}: {room} free, {wanted}",
        f"data: {first['shards']['content']}; model: {first['model']['content']}; {gpus} GPUs",
    ]


def _print(told: Sequence[str], findings: Sequence[Finding], fatal: int, seconds: float) -> None:
    for line in told:
        print(f"preflight: {line}")
    sys.stdout.flush()
    for finding in findings:
        print(f"scale-digrap: preflight: {finding}", file=sys.stderr, flush=True)
    verdict = "nothing stands in the way" if not fatal else f"{fatal} problem{'s' * (fatal > 1)}, see above"
    print(f"preflight: {verdict} ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
