"""Whatever a launch file, a host file or an override holds: it stays a value, in every script and manifest."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import yaml

from scale_digrap.config import ConfigError
from scale_digrap.launch import hosts
from scale_digrap.launch.cli import describe
from scale_digrap.launch.plan import ENVIRONMENT_FILE, SECRET_FILE, NodeContext, Plan, make_plan, node_command
from scale_digrap.launch.render import sbatch_word, shell_word
from scale_digrap.launch.run import write_files
from scale_digrap.launch.spec import LaunchConfig, LaunchError, load_spec
from scale_digrap.launch.workload import Workload, WorkloadError, load_workload
from scale_digrap.settings import to_yaml
from tests.launch.golden_files import ROOT

CONFIG = str(ROOT / "configs" / "quickstart.yaml")
NASTY = [
    "a b", "x; touch PWNED", "$(touch PWNED)", "`touch PWNED`", "'; touch PWNED; '", '"; touch PWNED; "',
    "x\ntouch PWNED", "x\n#SBATCH --uid=0", "-oProxyCommand=touch PWNED", "}; touch PWNED; {",
    "x}'; touch PWNED; echo '{",
    "${IFS}$(touch${IFS}PWNED)", "x', y: [z", "a: b # c", "{{ 7 * 7 }}", "{% raw %}", "$$(PATH) $(PATH) $$ $$$(HOME)",
    "back\\slash\\", "é ☃ 😀", "x\rtouch PWNED", "x\u2028touch PWNED", "x\x00y", "& touch PWNED &", "| touch PWNED",
    "yes", "~", "012", "null", "!x", "%n %h", "* ?", "\x1b[2J", "\udce9", "\u202eabc", "- a", "x\ttab", "'", '"', "#x",
]  # fmt: skip
PLACES = [("local", "torchrun"), ("local", "deepspeed"), ("hosts", "torchrun"), ("hosts", "deepspeed"), ("slurm", "torchrun")]  # fmt: skip  # noqa: E501
KINDS = ("job", "jobset", "trainjob")
STUB = """\
#!/bin/bash
case "$*" in
  *"launch.node config"*) printf '%s\\n' "$RUN"; for word in "$@"; do printf '%s\\0' "$word"; done >"$SEEN.config"; exit ;;
  *"launch.node step"*) echo 0; exit ;;
  *torch.distributed.run* | *deepspeed.launcher*) for word in "$@"; do printf '%s\\0' "$word"; done >"$SEEN"; env -0 >"$SEEN.env" ;;
esac
echo '{}' >"$RUN/DONE"
"""  # noqa: E501
SRUN = """\
#!/bin/bash
while [ "$1" != bash ]; do shift; done
SLURMD_NODENAME=n0 exec "$@"
"""


def text_fields(schema: Any = LaunchConfig, path: tuple = ()) -> Iterator[tuple]:
    """The paths of every string of the launch file: keys, ``*`` for a list's item, ``?`` for a mapping's key."""
    for name, kind in get_type_hints(schema).items():
        kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
        for one in kinds:
            if one is str:
                yield (*path, name)
            elif dataclasses.is_dataclass(one):
                yield from text_fields(one, (*path, name))
            elif get_origin(one) is list and get_args(one)[0] is str:
                yield (*path, name, "*")
            elif get_origin(one) is list and dataclasses.is_dataclass(get_args(one)[0]):
                yield from text_fields(get_args(one)[0], (*path, name, "*"))
            elif get_origin(one) is dict:
                yield (*path, name, "=")
                yield (*path, name, "?")


def put(values: dict[str, Any], path: tuple, value: str) -> None:
    for place, part in enumerate(path):
        if part in ("?", "="):
            values.update({value: "v"} if part == "?" else {"KEY": value})
            return
        rest = path[place + 1 :]
        if not rest:
            values[part] = value
        elif rest[0] == "*":
            old = values.get(part) or [{}]
            if len(rest) == 1:
                values[part] = [value]
            else:
                values[part] = [{**old[0], rest[1]: value}]
            return
        else:
            values = values.setdefault(part, {})


def base(python: str = "python") -> dict[str, Any]:
    return {
        "python": python,
        "hosts": ["node0"],
        "slurm": {"partition": "p"},
        "kubernetes": {"image": "i", "volumes": [{"claim": "c", "path": "/"}]},
    }


def load(tmp_path: Path, values: dict[str, Any]) -> LaunchConfig:
    path = tmp_path / "launch.yaml"
    path.write_text(to_yaml(values), encoding="utf-8")
    return load_spec(path)


def plans(spec: LaunchConfig, workload: Workload) -> Iterator[Plan]:
    for place, launcher in PLACES:
        yield make_plan(spec, workload, place, launcher, {})
    for kind in KINDS:
        kubernetes = dataclasses.replace(spec.kubernetes, kind=kind)
        yield make_plan(dataclasses.replace(spec, kubernetes=kubernetes), workload, "kubernetes", "torchrun", {})


def sound(plan: Plan) -> None:
    """Shell that bash can read, YAML that parses, and no file that others can read."""
    for name, text in plan.files.items():
        if name.endswith(".yaml"):
            assert list(yaml.safe_load_all(text))
        elif name != "hostfile":
            subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    if plan.place != "kubernetes":
        for context in (NodeContext(0, None, "id"), NodeContext(0, "node0", "id")):
            subprocess.run(["bash", "-n"], input=f"{node_command(plan, context)}\n", text=True, check=True)


def pod_script(text: str) -> str:
    """The script in a manifest as the shell gets it: the kubelet expands what it knows, and reads $$ as $."""
    document = list(yaml.safe_load_all(text))[-1]
    spec = document["spec"]
    if document["kind"] == "TrainJob":
        script = spec["trainer"]["command"][2]
    else:
        job = spec["replicatedJobs"][0]["template"]["spec"] if document["kind"] == "JobSet" else spec
        script = job["template"]["spec"]["containers"][0]["command"][2]
    known = {"PATH": "EXPANDED", "HOME": "EXPANDED"}
    out, place = [], 0
    while place < len(script):
        rest = script[place:]
        if rest.startswith("$$"):
            out.append("$")
            place += 2
        elif rest.startswith("$(") and rest[2 : rest.index(")")] in known:
            out.append("EXPANDED")
            place += rest.index(")") + 1
        else:
            out.append(rest[0])
            place += 1
    return "".join(out)


@pytest.fixture
def stage(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "run").mkdir()
    for name, text in (("python", STUB), ("srun", SRUN), ("scontrol", "#!/bin/bash\necho n0\n"), ("squeue", ""), ("scancel", "")):  # fmt: skip  # noqa: E501
        (tmp_path / "bin" / name).write_text(text or "#!/bin/bash\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run(stage: Path, plan: Plan) -> tuple[list[str], dict[str, str]] | None:
    """Start a plan's script with stand-ins; what torchrun or deepspeed was given, and its environment."""
    seen = stage / "seen"
    for path in stage.glob("seen*"):
        path.unlink()
    settings = {
        "PATH": f"{stage / 'bin'}:{os.environ['PATH']}", "RUN": str(stage / "run"), "SEEN": str(seen), "SETTLE": "0",
        "HOSTNAME": "pod-0", "JOB_COMPLETION_INDEX": "0", "PET_MASTER_ADDR": "a", "PET_MASTER_PORT": "1",
        "SLURM_JOB_ID": "1", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "n0", "HOME": str(stage),
    }  # fmt: skip
    if plan.place == "kubernetes":
        command = ["bash", "-c", pod_script(next(iter(plan.files.values())))]
    else:
        write_files(plan)
        assert all((plan.folder / name).stat().st_mode & 0o077 == 0 for name in plan.files)
        if plan.launcher == "deepspeed":
            (plan.folder / "hostfile").write_text("node0 slots=2\n")
            settings["LAUNCHER"] = "no_ssh"
        command = ["bash", str(plan.script)]
    done = subprocess.run(command, env=settings, cwd=stage, capture_output=True, timeout=60, check=False)
    assert not list(stage.rglob("PWNED*")), (plan.place, done.stderr)
    if not seen.exists():
        return None
    read = lambda path: path.read_bytes().decode("utf-8", "surrogateescape").split("\0")[:-1]  # noqa: E731
    arguments = read(seen) if plan.launcher == "torchrun" else read(Path(f"{seen}.config"))
    return arguments, dict(line.split("=", 1) for line in read(Path(f"{seen}.env")))


@pytest.mark.parametrize("value", NASTY, ids=ascii)
def test_every_string_of_the_launch_file_is_refused_in_one_line_or_stays_a_value(stage, value):
    """Each field alone: refused, or rendered soundly; then all that take it at once, with the scripts run."""
    workload = Workload("train", CONFIG, (), stage / "run", "")
    taken, told = [], []
    for path in text_fields():
        values = base(str(stage / "bin" / "python"))
        put(values, path, value)
        try:
            for plan in plans(load(stage, values), workload):
                describe(plan)
            taken.append(path)
        except (LaunchError, ConfigError) as error:
            told.append(str(error))
    assert all(line.isprintable() for line in told), told
    control = any(mark in value for mark in "\n\r\t\0\x1b\u2028\u202e\udce9")
    if "${" in value:  # an interpolation of a name that does not exist: refused wherever it is resolved
        return
    if control:
        assert taken == []
        return
    assert {("slurm", "account"), ("slurm", "extra", "*"), ("kubernetes", "shm"), ("environment", "=")} <= {
        *taken, *([("slurm", "extra", "*")] if not value.startswith("-") else []),
    }  # fmt: skip
    values = base(str(stage / "bin" / "python"))
    for path in taken:
        if path not in (("python",), ("workdir",), ("logs",), ("hostfile",), ("kubernetes", "volumes", "*", "path")):
            put(values, path, value)
    values["kubernetes"]["volumes"][0]["path"] = "/"
    spec = load(stage, values)
    for plan in plans(spec, workload):
        sound(plan)
        found = run(stage, plan)
        assert found is not None, plan.place
        if plan.place != "kubernetes":
            assert found[1]["KEY"] == value
    for field in ("python", "workdir", "logs"):  # these end a script early, or lead elsewhere
        if (field,) in taken:
            for plan in plans(load(stage, base(str(stage / "bin" / "python")) | {field: value}), workload):
                sound(plan)
                run(stage, plan)


@pytest.mark.parametrize("value", [value for value in NASTY if "\0" not in value], ids=ascii)
def test_overrides_reach_the_command_as_they_are(stage, value):
    overrides = (f"model.prompt=Q: {{question}} {value}", value)
    workload = Workload("train", CONFIG, overrides, stage / "run", "")
    spec = load(stage, base(str(stage / "bin" / "python")))
    for plan in plans(spec, workload):
        sound(plan)
        found = run(stage, plan)
        assert found is not None
        assert tuple(found[0][-2:]) == overrides, plan.place


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


@pytest.mark.parametrize("value", [value for value in NASTY if value.isprintable() and "${" not in value], ids=ascii)
@pytest.mark.parametrize("kind", KINDS)
def test_manifests_parse_back_to_the_very_values(tmp_path, kind, value):
    values = base()
    for field in ("namespace", "image", "cpu", "memory", "shm", "service_account"):
        values["kubernetes"][field] = f"{field}{value}"
    values["kubernetes"] |= {"kind": kind, "runtime": f"runtime{value}", "node_selector": {value: f"label{value}"}}
    values["kubernetes"]["volumes"] = [{"claim": f"claim{value}", "path": "/"}, {"claim": "b", "path": f"/{value}"}]
    values["environment"] = {"yes": value, "HF_TOKEN": f"s3cret{value}"}
    workload = Workload("train", CONFIG, (), tmp_path / "run", "")
    plan = make_plan(load(tmp_path, values), workload, "kubernetes", "torchrun", {})
    manifest, secret = plan.files.values()
    found = list(leaves(list(yaml.safe_load_all(manifest))))
    wanted = [f"{field}{value}" for field in ("namespace", "image", "cpu", "memory", "shm", "service_account", "claim")]
    wanted += [f"label{value}", f"/{value}", value, "yes", *([f"runtime{value}"] if kind == "trainjob" else [])]
    assert [one for one in wanted if one not in found] == []
    assert yaml.safe_load(secret)["stringData"] == {"yes": value, "HF_TOKEN": f"s3cret{value}"}
    assert "s3cret" not in manifest + describe(plan)


@pytest.mark.parametrize("name", ["-oProxyCommand=touch PWNED", "a;b", "$(x)", "a b", "a\nb", "-w", "", "é", "a/../b"])
def test_what_is_not_a_host_is_refused_in_the_launch_file_and_in_a_hostfile(tmp_path, name):
    workload = Workload("train", CONFIG, (), tmp_path / "run", "")
    with pytest.raises(LaunchError, match=r"hosts(: |\[0\] holds)"):
        load(tmp_path, {"hosts": [name]})
    (tmp_path / "hosts").write_text(f"# a comment\n{name} slots=1\n")
    spec = load(tmp_path, {"hostfile": str(tmp_path / "hosts")})
    if name.split() and name.split()[0] not in ("a",):
        with pytest.raises(LaunchError, match=r"is not the name or the address of a host"):
            make_plan(spec, workload, "hosts", "torchrun", {})
    good = load(tmp_path, {"hosts": ["node-0.example.org"]})
    command = node_command(
        make_plan(good, workload, "hosts", "torchrun", {}), NodeContext(0, "node-0.example.org", "i")
    )
    assert command.argv[command.argv.index("node-0.example.org") - 1] == "--"


def test_the_deepspeed_script_refuses_a_hostfile_with_an_option_of_ssh(stage):
    (stage / "hosts").write_text("-oProxyCommand=touch${IFS}PWNED slots=1\n")
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "deepspeed.sh"), CONFIG],
        env=os.environ | {"PYTHON": str(stage / "bin" / "python"), "RUN": str(stage / "run"), "SEEN": str(stage / "s"),
                          "HOSTFILE": str(stage / "hosts"), "LAUNCHER": "no_ssh", "WORKDIR": str(stage)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "is not the name or the address of a host" in done.stderr
    assert not list(stage.rglob("PWNED*"))


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\x1b[1m"])
def test_a_run_folder_with_control_characters_is_refused(value):
    with pytest.raises(WorkloadError, match="its folder holds") as refused:
        load_workload("train", CONFIG, [f"run_dir={value}"])
    assert str(refused.value).isprintable()


def test_words_for_bash_and_sbatch():
    for value in NASTY:
        if "\0" not in value:
            raw = subprocess.run(
                ["bash", "-c", f"printf %s {shell_word(value)}"], capture_output=True, check=True
            ).stdout
            assert raw.decode("utf-8", "surrogateescape") == value
            assert "\n" not in shell_word(value)
    assert [sbatch_word(one) for one in ("gpu", "a b", 'q"\\', "a#b")] == ["gpu", '"a b"', '"q\\"\\\\"', '"a#b"']


def test_the_environment_is_in_one_private_file_and_masked_elsewhere(stage):
    secrets = {
        "HF_TOKEN": "s3cret-1",
        "DB_URL": "postgres://me:s3cret-2@host/db",
        "GH_PAT": "ghp_s3cret3",
        "PLAIN": "on",
    }
    overrides = ("data.train=[https://me:s3cret-4@host/a.tar]",)
    workload = Workload("train", CONFIG, overrides, stage / "run", "")
    spec = load(stage, base(str(stage / "bin" / "python")) | {"environment": secrets})
    for plan in plans(spec, workload):
        private = {name for name, text in plan.files.items() if "s3cret-1" in text}
        assert private == ({SECRET_FILE} if plan.place == "kubernetes" else {ENVIRONMENT_FILE})
        told = describe(plan)
        assert "s3cret" not in told
        assert "PLAIN" in told
        if plan.place != "kubernetes":
            arguments, environment = run(stage, plan)
            assert {name: environment[name] for name in secrets} == secrets
            assert arguments[-1] == overrides[0]


def test_variables_that_the_configuration_names_go_to_every_host(stage):
    workload = dataclasses.replace(
        Workload("train", CONFIG, (), stage / "run", ""), resolved="a: ${oc.env:MY_STORE_KEY}"
    )
    plan = make_plan(load(stage, base()), workload, "hosts", "torchrun", {"MY_STORE_KEY": "k", "OTHER": "o"})
    assert plan.files[ENVIRONMENT_FILE].splitlines()[0] == "export MY_STORE_KEY=k"
    assert "OTHER" not in plan.files[ENVIRONMENT_FILE]


def test_every_launch_of_several_hosts_has_a_secret_of_its_own_in_its_private_file(tmp_path, monkeypatch):
    """By which hosts know each other in the preflight; a user's own stays, and nothing shows it."""
    workload = Workload("train", CONFIG, (), tmp_path / "run", "")
    values = {"preflight": True, "hosts": ["a", "b"], "nodes": 2, "slurm": {"partition": "gpu"}}
    values["kubernetes"] = {"image": "i", "volumes": [{"claim": "c", "path": "/"}]}
    seen = set()
    for place in ("hosts", "slurm", "kubernetes"):
        for given in ({}, {}, {"SCALE_DIGRAP_SECRET": "0wn"}):
            plan = make_plan(load(tmp_path, values | {"environment": given}), workload, place, "torchrun", {})
            private = plan.files[SECRET_FILE if place == "kubernetes" else ENVIRONMENT_FILE]
            if place == "kubernetes":
                secret = yaml.safe_load(private)["stringData"]["SCALE_DIGRAP_SECRET"]
                assert 'key: "SCALE_DIGRAP_SECRET"' in next(iter(plan.files.values()))
            else:
                (line,) = [line for line in private.splitlines() if "SCALE_DIGRAP_SECRET" in line]
                secret = line.removeprefix("export SCALE_DIGRAP_SECRET=")
                assert str(plan.folder.absolute() / ENVIRONMENT_FILE) in next(iter(plan.files.values()))
            assert secret == "0wn" if given else len(secret) == 32
            assert secret not in describe(plan)
            seen.add(secret)
    assert len(seen) == 7
    quiet = make_plan(load(tmp_path, values | {"preflight": False}), workload, "slurm", "torchrun", {})
    assert ENVIRONMENT_FILE not in quiet.files

    given = []
    monkeypatch.setattr(
        hosts.subprocess, "run", lambda argv, env, check: given.append(env) or subprocess.CompletedProcess(argv, 0)
    )
    hosts.preflight(quiet)  # `--check`: srun hands its environment on
    assert len(given[0]["SCALE_DIGRAP_SECRET"]) == 32
