"""The preflight on real hosts: what is wrong with one of them is found, named, and bounded in time."""

from __future__ import annotations

import shutil
import sys
import time

import pytest

from tests.launch.cluster import Running
from tests.launch.workload import CONFIG, outputs

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]

LIMIT_S = 240.0  # under a minute on a quiet machine: the figure that is asserted is the one that the preflight gives


def preflight(hosts, names, overrides, *options, environments=None) -> list[Running]:
    command = [sys.executable, "-m", "scale_digrap.launch.preflight", *options]
    command += ["--hosts", ",".join(names), "--endpoint", f"{names[0]}:22300", str(CONFIG), *overrides]
    return [host.popen(command, (environments or {}).get(host.name)) for host in hosts]


def test_three_hosts_with_a_fault_each(make_cluster, workload, run_dir):
    cluster = make_cluster(3)
    _, node1, node2 = cluster.hosts
    names = [host.name for host in cluster.hosts]
    # node0 is fine; node1 has a stray variable and lacks a shard; node2's cable is bad, and its run_dir is its own.
    hidden = workload.train[-1]
    node1.run(["sh", "-c", f"mkdir /run/empty && mount --bind /run/empty {hidden.parent}"], check=True)
    for shard in workload.train[:-1]:
        shutil.copy(shard, node1.folder)
        node1.run(["sh", "-c", f"cp {node1.folder / shard.name} {shard}"], check=True)
    run_dir.mkdir()
    node2.run(["mount", "-t", "tmpfs", "tmpfs", str(run_dir)], check=True)
    node2.throttle(60)
    began = time.monotonic()
    runs = preflight(cluster.hosts, names, workload.overrides(run_dir), environments={"node1": {"NCCL_ALGO": "Tree"}})
    assert [run.wait(LIMIT_S) for run in runs] == [2, 2, 2], outputs(runs)
    assert time.monotonic() - began < LIMIT_S
    said = runs[0].output()
    findings = [line for line in said.splitlines() if line.startswith("scale-digrap: preflight: ")]
    assert len(findings) == 4, said
    assert "node1: NCCL_ALGO=Tree, the other 2 have none" in said
    assert f"node1: data.train: no such shard: {hidden}" in said
    assert f"node2: run_dir {run_dir} is not the folder that node0 has there" in said
    assert "node2: all its links are slow: node0–node2 " in said
    assert "take node2 out of `hosts`" in said
    assert not run_dir.exists() or not list(run_dir.iterdir())


def test_a_host_that_never_comes_is_named(make_cluster, workload, run_dir):
    cluster = make_cluster(2)
    options = ["--join-timeout-s", "5"]
    names = ["node0", "node1"]
    (run,) = preflight(cluster.hosts[:1], names, workload.overrides(run_dir), *options)
    assert run.wait(LIMIT_S) == 2, run.output()
    assert "node1: did not arrive within 5 s (1 of 2 hosts did)" in run.output()
    (run,) = preflight(cluster.hosts[1:], names, workload.overrides(run_dir), "--join-timeout-s", "1")
    assert run.wait(LIMIT_S) == 2, run.output()
    assert "node1 could not reach node0 at node0:22300 for 1 s: it is up, but nobody listens there" in run.output()


def test_a_port_in_use_is_named(make_cluster, workload, run_dir):
    host = make_cluster(2)[0]
    listens = host.popen(["python3", "-c", "import socket,time; s=socket.create_server(('',22300)); time.sleep(600)"])
    host.run(["sh", "-c", "until ss -ltn | grep -q 22300; do sleep 0.1; done"], timeout=30, check=True)
    (run,) = preflight([host], ["node0", "node1"], workload.overrides(run_dir))
    assert run.wait(LIMIT_S) == 2, run.output()
    assert "port 22300 of node0 cannot be listened at (Address already in use)" in run.output()
    assert listens.poll() is None
