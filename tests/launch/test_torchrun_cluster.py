"""launch/torchrun.sh on two hosts: both engines, and every way in which a host can be lost. Real ranks, real links."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.launch.cluster import wait_until
from tests.launch.workload import TRAIN_S, outputs, ranks, torchrun, wait_for_step

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1500)]


def test_fsdp_trains_and_evaluates_on_two_hosts_after_a_preflight(make_cluster, workload, run_dir, tmp_path):
    cluster = make_cluster(2)
    suite = f"evaluation.suites={{id: {{shards: [{','.join(map(str, workload.suite))}]}}}}"
    runs = torchrun(cluster.hosts, [*workload.overrides(run_dir), suite], PREFLIGHT="1")
    assert [run.wait(TRAIN_S) for run in runs] == [0, 0], outputs(runs)
    workload.check(run_dir)
    assert "preflight: 2 of 2 hosts" in runs[0].output() + runs[1].output()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["ranks"] == 2
    assert 0 <= summary["evaluation"]["id"] <= 1
    assert json.loads((run_dir / "evaluation" / "id.json").read_text())
    assert {path.name for path in (run_dir / "logs").iterdir()} >= {"node0", "node1"}

    config, out = tmp_path / "evaluate.yaml", tmp_path / "evaluation"
    config.write_text(
        f"suites: {{set: quickstart, folder: {workload.suites}}}\nmodels: {{tiny: {{run: {run_dir}}}}}\n"
        "batch_size: 8\ngeneration: {max_new_tokens: 4}\n"
    )
    runs = torchrun(cluster.hosts, [f"out={out}", "engine.device=cpu"], config, COMMAND="evaluate")
    assert [run.wait(TRAIN_S) for run in runs] == [0, 0], outputs(runs)
    assert (out / "DONE").is_file()
    assert (out / "results.json").is_file()


def test_zero_2_trains_on_two_hosts(make_cluster, workload, run_dir):
    cluster = make_cluster(2)
    overrides = workload.overrides(run_dir, "sharding.engine=deepspeed", "sharding.zero.stage=2")
    runs = torchrun(cluster.hosts, overrides, DS_ACCELERATOR="cpu")
    assert [run.wait(2 * TRAIN_S) for run in runs] == [0, 0], outputs(runs)  # the first start compiles an operator
    workload.check(run_dir)


def test_a_worker_dies_then_a_host_which_is_replaced(make_cluster, workload, run_dir):
    cluster = make_cluster(2)
    node0, node1 = cluster.hosts
    overrides = workload.overrides(run_dir)
    runs = torchrun([node0, node1], overrides, NODES="1:2", RESTARTS="9")

    wait_for_step(run_dir, 5, runs)
    (worker,) = ranks(node1)
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: ranks(node0) and ranks(node1) and worker not in ranks(node1), TRAIN_S, lambda: outputs(runs))
    wait_for_step(run_dir, 9, runs)
    assert [run.poll() for run in runs] == [None, None], outputs(runs)

    before = ranks(node0)
    node1.power_off()
    wait_until(lambda: ranks(node0) and ranks(node0) != before, TRAIN_S, lambda: outputs(runs))
    wait_for_step(run_dir, 13, runs[:1])

    # Held where it is, so that the run is not over before the new host has come.
    (alone,) = ranks(node0)
    os.kill(alone, signal.SIGSTOP)
    node1.power_on()
    runs[1:] = torchrun([node1], overrides, NODES="1:2", RESTARTS="9", HOST0="node0")
    wait_until(lambda: _pending(alone, signal.SIGTERM), TRAIN_S, lambda: outputs(runs))
    os.kill(alone, signal.SIGCONT)

    assert [run.wait(TRAIN_S) for run in runs] == [0, 0], outputs(runs)
    workload.check(run_dir)
    assert json.loads((run_dir / "summary.json").read_text())["ranks"] == 2


def test_a_silent_partition_is_noticed_after_the_timeout(make_cluster, workload, run_dir):
    cluster = make_cluster(2)
    node0, node1 = cluster.hosts
    limit = 10.0
    overrides = workload.overrides(run_dir, f"training.timeout_s={limit}", "training.stall_s=6")
    runs = torchrun([node0, node1], overrides, NODES="1:2", RESTARTS="9")
    wait_for_step(run_dir, 5, runs)
    before = ranks(node0)
    node1.unplug()
    cut = time.monotonic()
    # The rank that waits in vain ends, and its agent starts another one, alone: nothing here is a long default's.
    wait_until(lambda: ranks(node0) and ranks(node0) != before, limit + 60, lambda: outputs(runs))
    noticed = time.monotonic() - cut
    assert runs[0].wait(TRAIN_S) == 0, outputs(runs)
    # On the other side of the cut, the rank has ended as well; its agent may wait for as long as TCP does.
    assert not ranks(node1)
    assert runs[1].poll() != 0, "a host that is cut off must not think that it has finished"
    assert noticed > limit / 2, "ended before its time: the test shows nothing"
    workload.check(run_dir)
    assert json.loads((run_dir / "summary.json").read_text())["ranks"] == 1


def test_the_file_store_survives_the_host_that_the_others_met_at(make_cluster, workload, run_dir, tmp_path):
    cluster = make_cluster(2)
    node0, node1 = cluster.hosts
    meeting = {"RDZV_DIR": str(tmp_path / "rendezvous"), "RUN_ID": "first"}
    runs = torchrun([node0, node1], workload.overrides(run_dir), NODES="1:2", RESTARTS="9", **meeting)
    wait_for_step(run_dir, 5, runs)
    node0.power_off()
    assert runs[1].wait(TRAIN_S) == 0, outputs(runs)
    workload.check(run_dir)
    assert json.loads((run_dir / "summary.json").read_text())["ranks"] == 1


def _pending(pid: int, number: int) -> bool:
    """A signal was sent to a process that is stopped, and waits for it to go on."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)
