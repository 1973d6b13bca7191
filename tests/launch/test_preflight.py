"""The preflight's verdicts on made-up tables, what a host tells about itself, and its exchange, without any rank."""

from __future__ import annotations

import argparse
import copy
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from scale_digrap.config import load_config
from scale_digrap.launch import exchange, preflight, probe, verdict
from scale_digrap.launch.exchange import Exchange, Place, PreflightError, _seal, meet
from scale_digrap.launch.verdict import Finding, judge, judge_arrivals, judge_clocks, judge_links

H100 = {"name": "H100", "memory_mib": 81559, "used_mib": 4, "driver": "570.1"}


def row(host: str) -> dict:
    return {
        "host": host,
        "versions": {"python": "3.11.2", "torch": "2.9.0", "deepspeed": "0.18.0"},
        "environment": {"OMP_NUM_THREADS": "1"},
        "gpus": [dict(H100), dict(H100)],
        "visible_gpus": 2,
        "folder": {"path": "/shared/run", "error": None, "sees_first": True, "free_bytes": 10**12},
        "shards": {"errors": [], "content": "4 files, 100 bytes (digest ab)", "count": 4, "bytes": 100},
        "model": {"content": "5 files", "error": None},
        "limits": {"shm_bytes": 1 << 34, "open_files": 65536},
        "network": {
            "own_address": "10.0.0.1", "interfaces": ["eth0", "lo"], "interface_given": False, "no_such_interface": {},
        },
    }  # fmt: skip


def table(count: int, **changes) -> list[dict]:
    """Rows of equal hosts, with changes ``node1={"versions.torch": …}``."""
    rows = [row(f"node{k}") for k in range(count)]
    for host, values in changes.items():
        for path, value in values.items():
            place = rows[int(host.removeprefix("node"))]
            *sections, last = path.split(".")
            for section in sections:
                place = place[section]
            if value is None and last in place and path.startswith(("versions", "environment")):
                del place[last]
            else:
                place[last] = value
    return rows


def only(findings: list[Finding]) -> str:
    assert len(findings) == 1, findings
    return str(findings[0])


def test_equal_hosts_are_not_complained_about():
    assert judge(table(4), device="cuda", processes=2, workers=4, needed_bytes=10**11) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"node2": {"versions.torch": "2.8.0"}}, "node2: torch is 2.8.0, the other 3 have 2.9.0; install the same"),
        ({"node2": {"versions.deepspeed": None}}, "node2: deepspeed is missing, the other 3 have 0.18.0"),
        (
            {"node1": {"versions.torch": "2.8"}, "node3": {"versions.torch": "2.8"}, "node2": {"versions.torch": "3"}},
            "node0, node2",
        ),
        ({"node3": {"environment.NCCL_ALGO": "Tree"}}, "node3: NCCL_ALGO=Tree, the other 3 have none; unset it there"),
        ({"node0": {"environment.OMP_NUM_THREADS": None}}, "node0: OMP_NUM_THREADS is not set, the other 3 have 1"),
        ({"node1": {"gpus": [H100]}}, "node1: GPUs: 1 × H100 (79 GiB), the other 3 have 2 × H100"),
        ({"node1": {"visible_gpus": 1}}, "node1: 2 processes, but 1 GPU to be seen (CUDA_VISIBLE_DEVICES)"),
        ({"node1": {"visible_gpus": 0}}, "node1: training.device=cuda, but no GPU is usable: nvidia-smi lists 2, "),
        ({"node1": {"folder.sees_first": False}}, "node1: run_dir /shared/run is not the folder that node0 has there"),
        (
            {f"node{k}": {"folder.sees_first": False} for k in (1, 2, 3)},
            "node0: run_dir /shared/run is not the folder that the others have there",
        ),
        ({"node1": {"folder.error": "cannot be written to: No space"}}, "node1: run_dir /shared/run cannot be written"),
        ({"node2": {"folder.free_bytes": 5 * 10**9}}, "node2: run_dir /shared/run has room for 5.0 GB, the run's "),
        ({"node3": {"shards.errors": ["no such shard: a.tar"]}}, "node3: no such shard: a.tar; copy it there"),
        ({f"node{k}": {"shards.errors": ["no such shard: a.tar"]} for k in range(4)}, "no such shard: a.tar; copy it"),
        ({"node3": {"shards.content": "3 files, 75 bytes"}}, "node3: shards: 3 files, 75 bytes, the other 3 have 4 "),
        ({"node1": {"model.error": "model.path x is no folder"}}, "node1: model.path x is no folder; copy or download"),
        ({"node1": {"model.content": "4 files"}}, "node1: the files of the model: 4 files, the other 3 have 5 files"),
        ({"node1": {"limits.shm_bytes": 1 << 26}}, "node1: /dev/shm has 67.1 MB for the loader processes; enlarge it"),
        ({"node1": {"network.own_address": "127.0.1.1"}}, "node1: its own name means 127.0.1.1: others would be told"),
        ({"node1": {"network.own_address": None}}, "node1: does not know the address of its own name"),
        (
            {"node1": {"network.no_such_interface": {"GLOO_SOCKET_IFNAME": "ib0"}}},
            "node1: GLOO_SOCKET_IFNAME=ib0, but there is no such interface; name one of eth0, lo",
        ),
    ],
)  # fmt: skip
def test_the_odd_host_is_named(changes, said):
    findings = judge(table(4, **changes), device="cuda", processes=2, workers=4, needed_bytes=10**10)
    if said == "node0, node2":  # two against one and one: the two are not the majority of four, but the most
        assert {finding.hosts for finding in findings} == {("node0",), ("node2",)}
        return
    assert only(findings).startswith(said)
    assert findings[0].fatal


def test_with_two_hosts_the_first_is_the_reference():
    said = only(judge_two("versions", {"torch": "2.8.0"}))
    assert said.startswith("node1: torch is 2.8.0, node0 has 2.9.0; ")
    assert said.endswith("--exclude=node1")


def judge_two(section: str, values: dict) -> list[Finding]:
    rows = table(2)
    rows[1][section].update(values)
    return judge(rows, scheduler="slurm")


def test_what_is_for_people_to_judge_is_not_fatal():
    busy = copy.deepcopy([H100, H100])
    busy[1]["used_mib"] = 40000
    for changes in ({"gpus": busy}, {"limits.open_files": 1024}):
        (finding,) = judge(table(2, node0=changes), device="cuda")
        assert not finding.fatal
        assert str(finding).startswith("note: node0: ")


def test_gpus_do_not_matter_to_a_run_on_the_cpu():
    assert judge(table(2, node0={"visible_gpus": 0}), device="cpu", processes=2) == []


def test_slow_links_name_the_host_that_they_have_in_common():
    hosts = [f"node{k}" for k in range(4)]
    links = {(0, 1): 9000.0, (1, 2): 60.0, (2, 3): 55.0, (0, 3): 9500.0}
    said = only(judge_links(hosts, links, 500.0, "slurm"))
    assert said.startswith("node2: all its links are slow: node1–node2 60 Mbit/s, node2–node3 55 Mbit/s (the best link")
    assert "--exclude=node2" in said
    # One slow link among fast ones is the link's fault, or either end's.
    assert judge_links(hosts, links | {(1, 2): 9000.0}, 500.0, "slurm")[0].hosts == ("node2", "node3")
    # Far below what is usual here, though above the limit.
    assert judge_links(hosts, dict.fromkeys(links, 90000.0) | {(0, 1): 9000.0}, 500.0, "slurm")[0].hosts == hosts_of(
        0, 1
    )
    assert judge_links(hosts, dict.fromkeys(links, 9000.0), 500.0, "slurm") == []
    assert judge_links(hosts[:2], {(0, 1): 60.0}, 500.0, "hosts")[0].hosts == hosts_of(0, 1)
    # All slow: nobody is the odd one, every link is told.
    assert len(judge_links(hosts[:3], {(0, 1): 60.0, (1, 2): 60.0, (0, 2): 60.0}, 500.0, "hosts")) == 3


def hosts_of(*ranks: int) -> tuple[str, ...]:
    return tuple(f"node{rank}" for rank in ranks)


def test_clocks_and_arrivals():
    hosts = ["node0", "node1", "node2"]
    (finding,) = judge_clocks(hosts, {1: (-7.5, 0.1), 2: (2.5, 1.0)}, 2.0)
    assert str(finding).startswith("node1: its clock is -7.5 s off that of node0")
    (finding,) = judge_arrivals(hosts, ["node0", None, "node2"], 60.0, "kubernetes")
    assert str(finding).startswith("node1: did not arrive within 60 s (2 of 3 hosts did)")
    assert "kubectl cordon" in finding.fix
    assert judge_arrivals(hosts, hosts, 60.0, "hosts") == []


def test_variables_that_may_be_secret_are_compared_but_not_shown():
    environment = {"HF_TOKEN": "abc", "NCCL_DEBUG": "INFO", "PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1"}
    found = probe.variables(environment)
    assert set(found) == {"HF_TOKEN", "NCCL_DEBUG"}
    assert "abc" not in json.dumps(found)
    assert found["HF_TOKEN"] != probe.variables({"HF_TOKEN": "abd"})["HF_TOKEN"]


def test_lines_of_nvidia_smi():
    text = "NVIDIA H100 80GB HBM3, 81559, 4, 570.124.06\nNVIDIA H100 80GB HBM3, 81559, [N/A], 570.124.06\n"
    first, second = probe.gpu_lines(text)
    assert first == {"name": "NVIDIA H100 80GB HBM3", "memory_mib": 81559, "used_mib": 4, "driver": "570.124.06"}
    assert second["used_mib"] == 0
    assert probe.gpu_lines("No devices were found") == []


@pytest.fixture
def made_model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights = {"language_model.layers.0.q_proj.weight": np.zeros((64, 32), np.float32), "vision.w": np.zeros(100, "f4")}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # (weights + two moments + anchor) × 4 bytes × (2 kept + the one being written) and the final model
        (["checkpoint.every=1"], 3 * 16 * 2148 + 4 * 2148),
        (["checkpoint.every=1", "checkpoint.anchors=false", "checkpoint.save_final=false"], 3 * 12 * 2148),
        (["optimizer.name=adamw", "checkpoint.save_final=false"], 12 * 2148),
        (["model.freeze=[vision]", "checkpoint.save_final=false"], 16 * 2048),
        (["lora.enabled=true", "lora.rank=4", "checkpoint.every=1"], 3 * 12 * 4 * 96),
    ],
)
def test_room_for_checkpoints(made_model, tmp_path, overrides, expected):
    config = load_config(None, [f"model.path={made_model}", f"run_dir={tmp_path / 'run'}", *overrides])
    assert probe.checkpoint_bytes(config) == expected


def test_room_is_estimated_from_a_checkpoint_that_is_there(made_model, tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "step-10"
    folder.mkdir(parents=True)
    from scale_digrap.training import manifest

    (folder / "state").write_bytes(bytes(5000))
    manifest.write(folder, 10, manifest.describe(folder, ["state"]))
    overrides = [f"model.path={made_model}", f"run_dir={tmp_path / 'run'}", "checkpoint.every=5"]
    config = load_config(None, [*overrides, "checkpoint.save_final=false", "checkpoint.keep=3"])
    assert probe.checkpoint_bytes(config) == 4 * 5000 - 5000


def test_shards_and_models_that_cannot_be_read(made_model, tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(1024))
    (tmp_path / "b.tar").write_bytes(bytes(100))
    good = probe.shards(load_config(None, [f"data.train=[{tmp_path}/a.tar]"]))
    assert (good["errors"], good["count"], good["bytes"]) == ([], 1, 1024)
    short = probe.shards(load_config(None, [f"data.train=[{tmp_path}/a.tar,{tmp_path}/b.tar]"]))
    assert short["errors"] == [f"shard {tmp_path}/b.tar is cut off: it has not even a tar header"]
    lost = probe.shards(load_config(None, [f"data.train=[{tmp_path}/c.tar]"]))
    assert lost["errors"] == [f"data.train: no such shard: {tmp_path}/c.tar"]
    assert probe.model(str(made_model))["error"] is None
    assert "is no folder" in probe.model(f"{tmp_path}/nothing")["error"]
    (made_model / "config.json").unlink()
    assert "holds neither config.json" in probe.model(str(made_model))["error"]


def test_a_folder_that_is_not_shared(tmp_path):
    """Two hosts whose run_dir has one path and is two folders; the hosts are two objects here."""
    shared = [probe.SharedFolder(str(tmp_path / "run"), rank, "t") for rank in (0, 1)]
    assert [folder.look(0.0)["sees_first"] for folder in shared] == [True, True]
    for folder in shared[::-1]:
        folder.remove()
    assert not (tmp_path / "run").exists()
    apart = [probe.SharedFolder(str(tmp_path / f"run{rank}"), rank, "t") for rank in (0, 1)]
    assert [folder.look(0.2)["sees_first"] for folder in apart] == [True, False]
    (tmp_path / "file").write_text("")
    assert probe.SharedFolder(str(tmp_path / "file"), 0, "t").look(0.0)["error"] == "cannot be written to: File exists"


def place(environment: dict[str, str], **arguments) -> Place:
    known = {"hosts": None, "nodes": None, "rank": None, "endpoint": None}
    return preflight.place(argparse.Namespace(**known | arguments), environment)


def test_every_launcher_tells_which_host_this_is():
    assert place({}) == Place(0, 1, ("localhost", 29500), None)
    assert place({}, hosts="a,b", rank=1) == Place(1, 2, ("a", 29500), ("a", "b"))
    assert place({}, hosts="a,b", rank=1, endpoint="[fe80::1]:7000").endpoint == ("fe80::1", 7000)
    torchrun = {"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "3", "SLURM_NODEID": "2", "SLURM_NNODES": "3"}
    assert place(torchrun) == Place(1, 3, None, None)
    deepspeed = {"CROSS_RANK": "1", "CROSS_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "7000"}
    assert place(deepspeed) == Place(1, 2, ("a", 7000), None)
    kubernetes = {"JOB_COMPLETION_INDEX": "1"}
    assert place(kubernetes, nodes=2, endpoint="job-0.job:29400") == Place(1, 2, ("job-0.job", 29400), None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"hosts": "a,b", "nodes": 3}, "--nodes=3, but --hosts names 2: a, b"),
        ({"hosts": "a,b"}, "which of the 2 hosts is this? give --rank; this host is "),
        ({"nodes": 2, "rank": 2}, "rank 2 is not among 0 … 1"),
        ({"nodes": 2, "rank": 1}, "where do the hosts meet? give --hosts, or --endpoint"),
        ({"nodes": 2, "rank": 1, "endpoint": "node0"}, "--endpoint 'node0' is not HOST:PORT"),
    ],
)
def test_a_place_that_cannot_be_told(arguments, said):
    with pytest.raises(PreflightError) as error:
        place({}, **arguments)
    assert said in str(error.value)


def test_a_host_that_falls_silent_is_not_waited_for_twice_and_clocks_are_compared():
    """Three hosts as threads around one real store; the last one's clock is wrong, and it leaves before its report."""
    port = preflight._free_port()
    results: dict[int, list] = {}

    def host(rank: int) -> None:
        here = Place(rank, 3, ("localhost", port), ("a", "b", "c"))
        exchange = Exchange(here, meet(here, 30.0))
        gathered = [exchange.gather("arrived", f"host {rank}", 30.0)]
        offset = 5.0 if rank == 2 else 0.0
        skews = exchange.clocks(lambda: verdict_time() + offset)
        if rank < 2:
            gathered += [exchange.gather("report", rank, 1.0), exchange.gather("verdict", rank, 30.0)]
            exchange.leave()
        results[rank] = [gathered, skews]

    import time

    verdict_time = time.time
    threads = [threading.Thread(target=host, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    arrived = ["host 0", "host 1", "host 2"]
    assert results[0][0] == results[1][0] == [arrived, [0, 1, None], [0, 1, None]]
    assert results[2][0] == [arrived]
    skews = results[0][1]
    assert skews[2][0] == pytest.approx(5.0, abs=1.0)
    assert abs(skews[1][0]) < 1.0
    assert [finding.hosts for finding in judge_clocks(["a", "b", "c"], skews, verdict.MAX_SKEW_S)] == [("c",)]


def test_one_process_alone(tmp_path, made_model, capsys):
    (tmp_path / "a.tar").write_bytes(bytes(1024))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"run_dir: {tmp_path / 'run'}\nmodel: {{path: {made_model}}}\ndata: {{train: [{tmp_path}/a.tar]}}\n"
        "training: {steps: 5, device: cpu}\n"
    )
    assert preflight.main([str(config)]) == 0
    out = capsys.readouterr().out
    assert "preflight: 1 of 1 hosts" in out
    assert "nothing stands in the way" in out
    assert preflight.main([str(config), f"data.train=[{tmp_path}/b.tar]"]) == 2
    assert "no such shard" in capsys.readouterr().err
    assert preflight.main([str(config), "training.step=4"]) == 2
    assert "training.steps" in capsys.readouterr().err


class OneHost(dict):
    """A store of one process."""

    def set(self, key, value):
        self[key] = value.encode() if isinstance(value, str) else value

    def check(self, keys):
        return all(key in self for key in keys)


@pytest.mark.parametrize("secret", ["", "5ecret"])
def test_what_a_stranger_writes_into_the_store_is_one_error_and_never_a_value(monkeypatch, secret):
    monkeypatch.setenv("SCALE_DIGRAP_SECRET", secret)
    two = Place(rank=0, nodes=2, endpoint=None)
    strangers = [b"\xff\xfe", b"{", b"NaN", b"", *([b'{"host": "forged"}', b"0" * 64 + b"1"] if secret else [])]
    for garbage in strangers:
        store = OneHost({"facts/1": garbage})
        with pytest.raises(PreflightError, match="does not come from a host of this launch") as refused:
            Exchange(two, store).gather("facts", {"a": 1}, wait_s=1)
        assert "\n" not in str(refused.value)
    store = OneHost({"facts/1": _seal("facts/1", {"b": 2}).encode()})
    assert Exchange(two, store).gather("facts", {"a": 1}, wait_s=1) == [{"a": 1}, {"b": 2}]
    store = OneHost({"facts/1": _seal("other/1", {"b": 2}).encode()})  # under another key
    if secret:
        with pytest.raises(PreflightError, match="does not come from"):
            Exchange(two, store).gather("facts", {"a": 1}, wait_s=1)


def listening(port: int) -> set[str]:
    """Addresses of this machine at which somebody listens on a port, as /proc/net shows them."""
    found = set()
    for name in ("tcp", "tcp6"):
        file = Path("/proc/net") / name
        for line in file.read_text().splitlines()[1:] if file.exists() else []:
            local, _, state = line.split()[1:4]
            address, _, at = local.partition(":")
            if int(at, 16) == port and state == "0A":
                found.add(address)
    return found


LOOPBACK = {"0100007F", "00000000000000000000000001000000"}
EVERYWHERE = {"00000000", "0" * 32}


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1"])
def test_the_store_listens_at_the_address_of_the_endpoint_and_at_no_other(name):
    if name == "::1" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 here")
    port = preflight._free_port()
    here = Place(0, 2, (name, port), None)
    store = meet(here, 5.0)
    assert listening(port)
    assert listening(port) <= LOOPBACK
    other = meet(Place(1, 2, (name, port), None), 5.0)
    other.set("a", "b")
    assert store.get("a") == b"b"


@pytest.mark.parametrize(
    ("means", "nodes", "listens"),
    [
        (["127.0.1.1"], 2, EVERYWHERE),  # what Debian writes into /etc/hosts: others are told another address
        (["127.0.1.1"], 1, {"0101007F"}),
        (["192.0.2.7"], 2, EVERYWHERE),  # NAT: the address is not this machine's
        (["192.0.2.7", "127.0.0.1"], 1, LOOPBACK),
        ([], 2, EVERYWHERE),
    ],
)
def test_a_name_that_is_not_an_address_of_this_machine_is_listened_for_everywhere_and_said(
    monkeypatch, capsys, means, nodes, listens
):
    def lookup(name, port, **_):
        if not means:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in means]

    monkeypatch.setattr(exchange.socket, "getaddrinfo", lookup)
    port = preflight._free_port()
    _, listener = exchange._listen("head", port, nodes)
    with listener:
        assert listening(port)
        assert listening(port) <= listens
    said = capsys.readouterr().out
    wanted = f"preflight: head means {', '.join(means) or 'nothing'} here, which is no address that others reach"
    assert said.startswith(wanted) if listens is EVERYWHERE else said == ""


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PreflightError, match=f"port {port} of 127.0.0.1 cannot be listened at .*another job"):
            meet(Place(0, 2, ("127.0.0.1", port), None), 5.0)


@pytest.mark.parametrize("secret", ["", "5ecret"])
def test_two_hosts_measure_their_link_with_and_without_a_secret(tmp_path, made_model, secret):
    """Two processes as two hosts on the loopback; what comes out is theirs, and said to be signed or not."""
    (tmp_path / "a.tar").write_bytes(bytes(1024))
    command = [sys.executable, "-m", "scale_digrap.launch.preflight", "--nodes", "2"]
    command += ["--endpoint", f"127.0.0.1:{preflight._free_port()}", "--min-mbit-per-s", "1"]
    overrides = [f"run_dir={tmp_path / 'run'}", f"model.path={made_model}", f"data.train=[{tmp_path}/a.tar]"]
    (tmp_path / "c.yaml").write_text("training: {steps: 5, device: cpu}\n")
    environment = os.environ | {"SCALE_DIGRAP_SECRET": secret, "GLOO_SOCKET_IFNAME": "lo"}
    hosts = [
        subprocess.Popen(
            [*command, "--rank", str(rank), str(tmp_path / "c.yaml"), *overrides],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said, _ = [host.communicate(timeout=120)[0] for host in hosts]
    assert "preflight: 2 of 2 hosts" in said
    assert "network: links " in said, said
    assert said.count("is not signed: give all of them one SCALE_DIGRAP_SECRET") == (not secret)


def test_hosts_that_do_not_know_each_other_yet_unpickle_nothing():
    """Within a job ranks trust each other; before it, nobody has said who the others are."""
    package = Path(exchange.__file__).parent
    for file in package.rglob("*.py"):
        text = file.read_text()
        for word in ("_object(", "_object_list(", "pickle", "marshal", "torch.load"):
            assert word not in text.replace("a pickle of an unknown host", ""), (file, word)


@pytest.mark.parametrize("told", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_speed_that_cannot_be_is_an_error(monkeypatch, told):
    import torch.distributed as dist

    monkeypatch.setattr(dist, "all_reduce", lambda block: block.fill_(told))
    with pytest.raises(RuntimeError, match="hosts 0 and 1 tell a speed of"):
        exchange._together([(0, 1)], {}, "cpu")
