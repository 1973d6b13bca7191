"""``scale-digrap checkpoint`` and ``scale-digrap export`` as a user calls them, over one small run."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from scale_digrap.checkpoint_commands import human
from scale_digrap.cli import main
from scale_digrap.training import manifest
from tests.models import tiny
from tests.models.conftest import checkpoint  # noqa: F401
from tests.training import runs


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("run")
    shards = tiny.write_shards(folder / "shards")
    saving = {"every": 2, "keep": 5, "save_final": True}
    runs.run(
        checkpoint("llava"),
        shards,
        folder / "run",
        optimizer={"name": "digrap", "lr": 1e-2},
        model={"path": str(checkpoint("llava")), "freeze": ["vision_tower"]},
        training={"steps": 4, "batch_size": 4},
        checkpoint=saving,
    )
    return folder / "run"


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 16
    path.write_bytes(content)


def call(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return status, told.out, told.err


@pytest.mark.parametrize(
    "arguments",
    [["checkpoint", "--help"], ["export", "--help"], ["checkpoint", "list", "RUN"], ["checkpoint", "verify", "RUN"]],
)
def test_neither_help_nor_list_nor_verify_waits_for_torch(trained, arguments):
    arguments = [str(trained) if argument == "RUN" else argument for argument in arguments]
    code = f"""
import sys
from scale_digrap.cli import main
try:
    status = main({arguments!r})
except SystemExit as end:
    status = end.code
sys.exit(3 if 'torch' in sys.modules or 'transformers' in sys.modules else status)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "step" in result.stdout


def test_list_shows_every_checkpoint_and_what_is_wrong_with_its_list(capsys, copy):
    folder = copy / "checkpoints"
    shutil.copytree(folder / "step-4", folder / "step-6.tmp")
    (folder / "step-2" / "state" / "stranger").write_text("x")
    status, out, _ = call(capsys, "checkpoint", "list", copy)
    assert status == 0
    lines = out.splitlines()
    assert re.match(r"step +written +samples +engine +ranks +files +size", lines[0])
    size = human(
        sum(
            path.stat().st_size
            for path in (folder / "step-4").rglob("*")
            if path.is_file() and path.name != manifest.NAME
        )
    )
    assert re.match(rf"4 +\d{{4}}-\d\d-\d\d \d\d:\d\d +16 +fsdp +1 +3 +{re.escape(size)}$", lines[2])
    assert lines[3] == "step-2 is not whole: state/stranger is not in manifest.json"
    assert lines[4].startswith("unfinished: step-6.tmp")


def test_verify_names_every_problem_and_exits_with_1(capsys, copy):
    status, out, _ = call(capsys, "checkpoint", "verify", copy)
    assert status == 0
    assert re.fullmatch(r"step-2: whole \(3 files, .*\)\nstep-4: whole \(3 files, .*\)\n", out)
    data = next((copy / "checkpoints/step-2/state").glob("*.distcp"))
    flip(data, data.stat().st_size // 3)
    (copy / "checkpoints/step-2/state/.metadata").unlink()
    status, out, _ = call(capsys, "checkpoint", "verify", copy)
    assert status == 1
    assert "step-2: NOT WHOLE: 2 problems" in out
    assert "state/.metadata is missing" in out
    assert f"state/{data.name} is damaged" in out
    assert "step-4: whole" in out
    status, out, _ = call(capsys, "checkpoint", "verify", copy, "--step", 4)
    assert (status, "step-2" in out) == (0, False)
    status, _, err = call(capsys, "export", copy, "--to", copy / "model", "--step", 2)
    assert status == 2
    assert "the newest whole one is that of step 4" in err


def test_show_tells_what_is_in_it(capsys, trained):
    status, out, _ = call(capsys, "checkpoint", "show", trained, "--step", 2, "--layers")
    assert status == 0
    facts = dict(re.findall(r"^([a-z ]+?) {2,}(.+)$", out, re.MULTILINE))
    assert (facts["step"], facts["samples"], facts["optimizer"]) == ("2", "8", "DiGraP")
    assert facts["written by"] == "fsdp on 1 rank"
    assert facts["left out"] == "frozen weights: those of the base"
    assert "torch 2" in facts["versions"]
    meta = json.loads((trained / "checkpoints/step-2/trainer.json").read_text())
    assert f"fingerprint {meta['base']}" in facts["base"]
    final = runs.initial(trained / "final")
    trained_here = {name: value for name, value in final.items() if "vision_tower" not in name}
    elements = sum(value.numel() for value in trained_here.values())
    size = re.escape(human(4 * elements))
    assert re.search(rf"^exp_avg_sq +{len(trained_here)} +{elements:,} +float32 +{size}$", out, re.MULTILINE)
    assert re.search(rf"^anchor +{len(trained_here)} +{elements:,} +bfloat16 ", out, re.MULTILINE)
    layers = out[out.index("\nlayer ") :].splitlines()[1:]
    assert layers[0].split()[:2] == ["layer", "elements"]
    assert "omega" in layers[0].split()
    assert sorted(line.split()[0] for line in layers[1:]) == sorted(trained_here)


def test_export_from_the_command_line(capsys, trained, tmp_path):
    status, out, _ = call(
        capsys, "export", trained, "--to", tmp_path / "model", "--wise", "0.5", "--max-shard-size", "50k"
    )
    assert status == 0
    assert re.search(r"model: model of step 4, float32, \d+ files, ", out)
    assert "tensors mixed, 0.5 of the trained ones" in out
    assert (tmp_path / "model/model.safetensors.index.json").is_file()
    assert runs.initial(tmp_path / "model").keys() == runs.initial(trained / "final").keys()
    status, _, err = call(capsys, "export", trained, "--to", tmp_path / "model")
    assert (status, err.count("\n")) == (2, 1)
    assert "exists: remove it" in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["checkpoint", "list", "nowhere"], "no such run: nowhere is no folder"),
        (["checkpoint", "show", "RUN", "--step", "3"], "holds no checkpoint of step 3: there are those of 2, 4"),
        (["checkpoint", "verify", "EMPTY"], "holds no checkpoint in checkpoints/step-N"),
        (["export", "EMPTY", "--to", "x"], "holds no checkpoint in checkpoints/step-N"),
        (["export", "RUN", "--to", "x", "--wise", "2"], "alpha must be a number between 0"),
    ],
)
def test_a_wrong_call_is_one_line(capsys, trained, tmp_path, arguments, told):
    places = {"RUN": str(trained), "EMPTY": str(tmp_path), "x": str(tmp_path / "x")}
    status, out, err = call(capsys, *(places.get(argument, argument) for argument in arguments))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert told in err
    assert not (tmp_path / "x").exists()


def test_sizes_for_people():
    assert [human(size) for size in (0, 999, 1000, 25_300_000, 10**15)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "25.3 MB",
        "1000.0 TB",
    ]
