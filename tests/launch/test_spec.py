"""The launch file: what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from scale_digrap.config import ConfigError
from scale_digrap.launch.spec import LaunchError, load_spec
from tests.launch.golden_files import GOLDEN, SHIPPED


def spec_of(tmp_path: Path, text: str):
    path = tmp_path / "launch.yaml"
    path.write_text(text)
    return load_spec(path)


def test_numbers_may_be_written_as_numbers(tmp_path):
    spec = spec_of(tmp_path, "nodes: 4\nprocesses_per_node: 8\nrendezvous: {port: 4242}")
    assert (spec.node_range, spec.processes_per_node, spec.port) == ((4, 4), "8", 4242)
    assert spec_of(tmp_path, 'nodes: "2:4"').node_range == (2, 4)
    assert load_spec(None).node_range == (1, 1)


def test_the_port_comes_from_the_name_and_stays_below_those_of_outgoing_connections(tmp_path):
    ports = {spec_of(tmp_path, f"name: run-{number}").port for number in range(50)}
    assert len(ports) > 45
    assert min(ports) >= 20000
    assert max(ports) < 32768


def leaves(spec: object, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in vars(spec).items():
        found |= leaves(value, f"{prefix}{key}.") if hasattr(value, "__dict__") else {f"{prefix}{key}": value}
    return found


def test_the_golden_spec_leaves_no_key_at_its_default():
    assert load_spec(SHIPPED / "launch.example.yaml").slurm.partition == "gpu"
    everything, plain = leaves(load_spec(GOLDEN / "everything.yaml")), leaves(load_spec(None))
    # But for alternatives to what it sets, and numbers of which one is like the other.
    assert {key for key, value in plain.items() if everything[key] == value} == {
        "hostfile",
        "kubernetes.kind",
        "ssh.connect_timeout_s",
        "rendezvous.last_call_timeout_s",
        "rendezvous.keep_alive_interval_s",
        "rendezvous.close_timeout_s",
        "rendezvous.read_timeout_s",
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nodez: 2", "unknown key 'nodez' (did you mean 'nodes'?)"),
        ("slurm: {partitoin: gpu}", "did you mean 'slurm.partition'"),
        ("partition: gpu", "did you mean 'slurm.partition'"),
        ("kubernetes: {volumes: [{claim: a, pth: /b}]}", "pth"),
        ("nodes: zwei", "nodes must be a number, or min:max such as 2:4, got 'zwei'"),
        ('nodes: "4:2"', "got '4:2'"),
        ("nodes: 0", "got '0'"),
        ("processes_per_node: 0", "processes_per_node must be auto or a number above 0"),
        ("name: My_Run", "name must be lower-case letters"),
        ("restarts: -1", "restarts must be at least 0, got -1"),
        ("restarts: some", "restarts"),
        ("rendezvous: {port: 80}", "rendezvous.port must be from 1024 to 65535, got 80"),
        ("rendezvous: {store: etcd}", "rendezvous.store must be one of tcp, file; got 'etcd'"),
        ("rendezvous: {store: file}", "rendezvous.folder goes with store: file"),
        ("rendezvous: {folder: /x}", "rendezvous.folder goes with store: file"),
        ("deepspeed: {launcher: mpich}", "it returns 0 when a rank has failed"),
        ("deepspeed: {launcher: slurm}", "needs mpi4py"),
        ("deepspeed: {launcher: openmpi}", "binds each rank to one core"),
        ("deepspeed: {launcher: ssh}", "has no such launcher"),
        ("deepspeed: {launcher: pdhs}", "did you mean 'pdsh'"),
        ("slurm: {time: a day}", "slurm.time"),
        ("slurm: {signal: TERM}", "slurm.signal must be one of USR1, USR2"),
        ("slurm: {extra: [constraint=a100]}", "'constraint=a100' is no option of sbatch"),
        ("kubernetes: {kind: pod}", "kubernetes.kind must be one of job, jobset, trainjob"),
        ("kubernetes: {volumes: [{claim: a, path: shared}]}", "path (absolute)"),
        ("environment: {A-B: x}", "'A-B' is no name of a variable"),
        ('environment: {A: "x\\ny"}', "environment.A holds a line break"),
        ("hosts: [a, a]", "names one host twice"),
        ("hosts: [a]\nhostfile: b", "hosts and hostfile are both given"),
        ("- a", "must hold key: value pairs"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_what_is_refused(tmp_path, text, words):
    with pytest.raises((ConfigError, LaunchError)) as refused:
        spec_of(tmp_path, text)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"'nowhere\.yaml' does not exist"):
        load_spec("nowhere.yaml")
