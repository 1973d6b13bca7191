"""launch/deepspeed.sh on two hosts: over real ssh and pdsh, without them, and with pdsh killed."""

from __future__ import annotations

import os
import re
import signal

import pytest

from tests.launch.workload import CONFIG, ROOT, TRAIN_S, outputs, ranks, wait_for_step

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1500)]

SCRIPT = ["bash", str(ROOT / "launch" / "deepspeed.sh"), str(CONFIG)]


@pytest.fixture
def settings(tmp_path) -> dict[str, str]:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("# name, processes\nnode0 slots=1\n\nnode1 slots=1\n")
    # Compiled operators are shared with all other tests: to compile them takes minutes.
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR", os.path.expanduser("~/.cache/torch_extensions"))
    return {
        "HOSTFILE": str(hostfile),
        "HOST0": "node0",
        "PORT": "22100",
        "DS_ACCELERATOR": "cpu",
        "WORKDIR": str(ROOT),
        "TORCH_EXTENSIONS_DIR": extensions,
    }


def zero_2(workload, run_dir) -> list[str]:
    return [*workload.overrides(run_dir), "sharding.engine=deepspeed", "sharding.zero.stage=2"]


def test_pdsh_is_killed_and_leaves_neither_orphans_nor_a_success(make_cluster, workload, run_dir, settings):
    cluster = make_cluster(2, ssh=True)
    node0, node1 = cluster.hosts
    command = [*SCRIPT, *zero_2(workload, run_dir)]
    killed = node0.popen(command, settings | {"STOP_WITHIN": "60"})
    wait_for_step(run_dir, 5, [killed])
    # The whole environment has come over, though deepspeed carries hardly any of it.
    (remote,) = ranks(node1)
    with open(f"/proc/{remote}/environ", "rb") as file:
        assert b"DS_ACCELERATOR=cpu" in file.read().split(b"\0")
    (pdsh,) = [pid for pid, line in node0.processes("pdsh").items() if line.split()[0].endswith("pdsh")]
    os.kill(pdsh, signal.SIGKILL)
    # deepspeed itself ends with 0 now, and leaves the ranks behind. The script asks them for a checkpoint and waits.
    assert killed.wait(TRAIN_S) == 75, outputs([killed])
    assert sorted(re.findall(r"(node\d): \d+ processes ended, (\d+) killed", killed.output())) == [
        ("node0", "0"),
        ("node1", "0"),
    ]
    assert not (run_dir / "DONE").exists()
    assert [ranks(host) for host in cluster.hosts] == [[], []]
    assert not node1.processes("deepspeed")

    again = node0.popen(command, settings)
    assert again.wait(TRAIN_S) == 0, outputs([again])
    workload.check(run_dir)
    assert len(list((run_dir / "logs" / "ranks").rglob("*rank*"))) >= 2


def test_without_ssh_a_start_on_every_host_does_the_same(make_cluster, workload, run_dir, settings):
    cluster = make_cluster(2)
    settings |= {"LAUNCHER": "no_ssh"}
    command = [*SCRIPT, *zero_2(workload, run_dir)]
    runs = [host.popen(command, settings | {"NODE_RANK": str(host.index)}) for host in cluster.hosts]
    assert [run.wait(TRAIN_S) for run in runs] == [0, 0], outputs(runs)
    workload.check(run_dir)


def test_a_launcher_that_cannot_work_is_refused_with_the_reason(make_cluster, workload, run_dir, settings):
    host = make_cluster(1)[0]
    done = host.run([*SCRIPT, *zero_2(workload, run_dir)], settings | {"LAUNCHER": "mpich"})
    assert done.returncode == 2
    assert "LAUNCHER=mpich does not work: use pdsh or no_ssh" in done.stdout
    assert not run_dir.exists()
