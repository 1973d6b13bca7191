"""The fake hosts behave as hosts: names, links, partitions, power, ssh, and a Slurm that requeues."""

from __future__ import annotations

import os
from pathlib import Path

from tests.launch.cluster import Cluster, wait_until

TALK = (
    "import socket,sys,time\n"
    "s=socket.create_connection(('node1',7000),timeout=5)\n"
    "s.settimeout(1)\n"
    "print('connected',flush=True)\n"
    "while True:\n"
    "  try:\n"
    "    data=s.recv(9)\n"
    "    print('got',data,flush=True)\n"
    "    if not data: sys.exit(7)\n"
    "  except TimeoutError: print('silent',flush=True)\n"
)
LISTEN = (
    "import socket,time\n"
    "s=socket.create_server(('',7000)); print('listening',flush=True); c,_=s.accept()\n"
    "while True: c.send(b'x'); time.sleep(.2)\n"
)


def test_a_partition_is_silent_and_a_power_cut_is_told(make_cluster):
    cluster = make_cluster(2)
    node0, node1 = cluster.hosts
    assert node0.run(["hostname"]).stdout == "node0\n"
    assert node0.run(["sh", "-c", "ls /sys/class/net; ls /dev/shm"]).stdout.split() == ["eth0", "lo"]
    listens = node1.popen(["/usr/bin/env", "python3", "-c", LISTEN])
    wait_until(lambda: "listening" in listens.output(), 20, listens.output)
    talks = node0.popen(["python3", "-c", TALK])
    wait_until(lambda: "got b'x'" in talks.output(), 20, talks.output)
    node1.unplug()
    wait_until(lambda: "silent" in talks.output(), 20, talks.output)
    assert talks.poll() is None
    node1.plug()
    said = len(talks.output())
    wait_until(lambda: "got b'x'" in talks.output()[said:], 20, talks.output)
    process = listens.pid
    node1.power_off()
    assert talks.wait(20) == 7
    assert not Path(f"/proc/{process}").exists()
    assert node1.processes() == {}


def test_a_throttled_link_is_slow(make_cluster):
    cluster = make_cluster(2)
    cluster[1].throttle(8)
    listens = cluster[1].popen(
        ["python3", "-c", "import socket\nc,_=socket.create_server(('',7001)).accept()\nwhile c.recv(1<<20): pass"]
    )
    send = (
        "import socket,time\n"
        "for _ in range(50):\n"
        "  try: s=socket.create_connection(('node1',7001),timeout=5); break\n"
        "  except OSError: time.sleep(.1)\n"
        "t=time.time(); s.sendall(bytes(1<<20)); s.shutdown(1); s.recv(1); print(time.time()-t)"
    )
    seconds = float(cluster[0].run(["python3", "-c", send], check=True).stdout)
    assert seconds > 0.6  # 8.4 Mbit, less what the burst lets through
    listens.wait(20)


def test_two_clusters_side_by_side_know_nothing_of_each_other(make_cluster):
    one = make_cluster(1)
    with Cluster(1) as other:
        folder = other.folder
        sleeper = other[0].popen(["sleep", "1000"])
        wait_until(lambda: other[0].processes("sleep 1000"), 10, "sleep")
        assert not one[0].processes("sleep 1000")
        pid = sleeper.pid
    assert not folder.exists()
    assert not os.path.exists(f"/proc/{pid}")
    assert one[0].run(["true"]).returncode == 0


def test_root_may_enter_every_host_from_every_other_by_ssh_and_pdsh(make_cluster):
    cluster = make_cluster(2, ssh=True)
    everywhere = "ssh node0 hostname && ssh node1 hostname && pdsh -R ssh -w node0,node1 hostname"
    done = cluster[1].run(["sh", "-c", everywhere], check=True)
    assert sorted(done.stdout.split("\n")) == ["", "node0", "node0: node0", "node1", "node1: node1"]


def test_slurm_requeues_a_job_and_gives_it_its_gpus_again(make_cluster, tmp_path):
    slurm = make_cluster(2, slurm=True).slurm
    script, out = tmp_path / "job.sh", tmp_path / "out.txt"
    script.write_text(
        "#!/bin/bash\n#SBATCH --nodes=2 --gres=gpu:1 --requeue --open-mode=append\n"
        "srun sh -c 'echo try ${SLURM_RESTART_COUNT:-0} $(hostname) gpu $CUDA_VISIBLE_DEVICES'\n"
        '[ -n "$SLURM_RESTART_COUNT" ] || { scontrol requeue $SLURM_JOB_ID; sleep 60; }\n'
    )
    job = slurm.submit(script, options=[f"--output={out}"])
    wait_until(lambda: out.exists() and out.read_text().count("try 0") == 2, 30, slurm.log)
    slurm.run_again(job)
    wait_until(lambda: slurm.state(job) == "COMPLETED", 60, slurm.log)
    assert sorted(out.read_text().split("\n")[-3:]) == ["", "try 1 node0 gpu 0", "try 1 node1 gpu 0"]
