"""A checkpoint from someone else: nothing in it is run, nothing outside it is opened, and what it says is checked."""

import contextlib
import io
import json
import os
import pickle
import shutil

import pytest
import torch

from scale_digrap.cli import main
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.evaluation import models as evaluation_models
from scale_digrap.evaluation.evaluate_config import EvaluateConfig, ModelEntry
from scale_digrap.optim import AdamL2SP
from scale_digrap.optim.portable import PortableStateError, load_portable
from scale_digrap.training import manifest
from scale_digrap.training.engine import CheckpointError
from scale_digrap.training.stored import StoredState
from tests.training import planted, runs

SAVING = {"every": 1, "keep": 5, "save_final": False, "resume": "auto"}
OPTIONS = {"optimizer": {"name": "digrap"}, "schedule": {"name": "constant"}, "checkpoint": SAVING}


@pytest.fixture(scope="module")
def trained(checkpoint, shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    runs.run(checkpoint("llava"), shards, folder, training={"steps": 1}, **OPTIONS)
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def step(run):
    return run / "checkpoints" / "step-1"


def every_command(run, path, shards, tmp_path):
    """(what, call) of everything that reads a checkpoint."""
    evaluated = EvaluateConfig(models={"m": ModelEntry(run=str(run))}, out=str(tmp_path / "out"))
    return {
        "show": lambda: main(["checkpoint", "show", str(run), "--layers"]),
        "verify": lambda: main(["checkpoint", "verify", str(run)]),
        "export": lambda: main(["export", str(run), "--to", str(tmp_path / "exported")]),
        "evaluate": lambda: evaluation_models.plan(evaluated),
        "train": lambda: runs.run(path, shards, run, training={"steps": 2}, **OPTIONS),
    }


PLANTS = {
    "the metadata": planted.metadata,
    "a field of the metadata": planted.inside_metadata,
    "a dotted name": planted.dotted,
    "the entry of numbers": planted.entry("layers"),
    "the entry of a tensor": planted.entry("param."),
}


@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS.keys())
def test_no_command_runs_a_pickle_of_a_checkpoint_and_verify_names_it(
    checkpoint,
    shards,
    copy,
    tmp_path,
    capsys,
    plant,
):
    marker = tmp_path / "ran"
    plant(step(copy), marker)
    assert manifest.read(step(copy))[1] == [], "the plant is not to be found by its checksums"
    for what, call in every_command(copy, checkpoint("llava"), shards, tmp_path).items():
        try:
            status = call()
            told = "".join(capsys.readouterr())
        except ScaleDigrapError as error:
            status, told = 2, str(error) + "\n"
        assert not marker.exists(), f"{what} ran the pickle"
        if what == "show" and status == 0:
            continue  # reads the sizes of tensors, not the tensors
        assert status == (1 if what == "verify" else 2), (what, told)
        assert "not safe to read" in told, (what, told)
        assert "eval'" in told or "os.system'" in told, (what, told)
        if what != "verify":
            assert told.count("\n") == 1, (what, told)
    assert (step(copy) / "state").is_dir()


@pytest.mark.parametrize("name", PLANTS)
def test_the_plants_run_where_torch_reads_them(trained, tmp_path, name):
    """Else the test above shows nothing."""
    import torch.distributed.checkpoint as dcp

    shutil.copytree(trained, tmp_path / "run")
    marker, state = tmp_path / "ran", step(tmp_path / "run") / "state"
    PLANTS[name](step(tmp_path / "run"), marker)
    reader = dcp.FileSystemReader(state)
    with contextlib.suppress(Exception):  # what os.system returns is no metadata
        found = reader.read_metadata()
        last = max(found.storage_data.values(), key=lambda info: info.offset)
        with open(state / last.relative_path, "rb") as data:
            data.seek(last.offset)
            torch.load(io.BytesIO(data.read(last.length)), weights_only=False)
    assert marker.exists()


def test_portable_state_runs_no_pickle(copy, tmp_path):
    marker = tmp_path / "ran"
    planted.metadata(step(copy), marker)
    optimizer = AdamL2SP(torch.nn.Linear(2, 2).named_parameters(), lr=1e-3)
    with pytest.raises(PortableStateError, match=r"not safe to read: .*'builtins.eval'"):
        load_portable(optimizer, step(copy) / "state")
    with pytest.raises(CheckpointError, match="not safe to read"):
        StoredState(step(copy) / "state")
    assert not marker.exists()


@pytest.mark.parametrize("place", ["../../secret", "/dev/zero", "link", "fifo"])
def test_metadata_that_points_outside_the_folder(copy, tmp_path, place):
    (copy / "secret").write_bytes(b"x" * (1 << 20))
    state = step(copy) / "state"
    os.symlink(copy / "secret", state / "link")
    os.mkfifo(state / "fifo")
    found = pickle.loads((state / ".metadata").read_bytes())
    for info in found.storage_data.values():
        info.relative_path = place
    (state / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(CheckpointError, match=r"inside|link|regular file"):
        StoredState(state)


def test_metadata_that_claims_more_than_the_files_hold(copy):
    state = step(copy) / "state"
    found = pickle.loads((state / ".metadata").read_bytes())
    name = next(key for key in found.state_dict_metadata if key.startswith("param."))
    found.state_dict_metadata[name].size = torch.Size([1 << 50])
    (state / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(CheckpointError, match=rf"'{name}' should have 4,503,599,627,370,496 bytes, and the files hold"):
        StoredState(state)


FORGED = {
    "a device": {"/dev/zero": [1 << 40, "0" * 64]},
    "a parent": {"../../config.yaml": [5, "0" * 64]},
    "a fifo": {"fifo": [0, "0" * 64]},
    "a link": {"link": [5, "0" * 64]},
    "a terminal escape": {"\x1b]0;owned\x07.bin": [1, "0" * 64]},
}


@pytest.mark.parametrize("files", FORGED.values(), ids=FORGED.keys())
def test_a_forged_list_of_files_opens_nothing_outside_and_shows_no_escapes(copy, capsys, files):
    os.mkfifo(step(copy) / "fifo")
    os.symlink(copy / "config.yaml", step(copy) / "link")
    body = json.loads((step(copy) / "manifest.json").read_text())
    del body["sha256"]
    body["files"] |= files
    planted.write_manifest(step(copy), body)
    assert main(["checkpoint", "verify", str(copy)]) == 1
    told = capsys.readouterr().out
    assert "NOT WHOLE" in told
    assert "\x1b" not in told
    (name,) = files
    words = {
        "fifo": "not a regular file",
        "link": "is a link",
        "\x1b]0;owned\x07.bin": r"\x1b]0;owned\x07.bin is missing",
    }
    assert words.get(name, "does not name a file inside") in told


MANIFESTS = {
    "null": "null",
    "a list": "[]",
    "not UTF-8": b"\xff\xfe{}",
    "nested": "[" * 5000,
    "a huge number": '{"step": ' + "9" * 5000 + "}",
    "files are a list": {"files": []},
    "an entry is null": {"files": {"trainer.json": None}},
    "an entry is text": {"files": {"trainer.json": "x"}},
    "sizes are text": {"files": {"trainer.json": ["1", "0" * 64]}},
    "no step": {"step": None},
    "a step is a list": {"step": [1]},
}
STATES = {
    "null": "null",
    "a list": "[]",
    "not UTF-8": b"\xff\xfe{}",
    "not JSON": "{",
    "nested": "[" * 5000,
    "a missing key": {"config": ...},
    "a step is text": {"step": "x"},
    "a huge step": {"step": 10**300},
    "a step is null": {"step": None},
    "versions are a list": {"versions": [1]},
    "versions of numbers": {"versions": {"torch": 2}},
    "a configuration is null": {"config": None},
    "ranks are text": {"ranks": "many"},
    "another version": {"version": 99},
    "a version is a list": {"version": []},
}
CONFIGURATIONS = {
    "of another type": {"model": 3},
    "a list": {"model": {"path": ["a"]}},
    "null": {"model": None},
    "a number of text": {"training": {"steps": "many"}},
    "an unknown key": {"nonsense": 1},
}


def damage(path, content):
    if isinstance(content, dict):
        values = json.loads(path.read_text())
        values.pop("sha256", None)
        values |= {key: value for key, value in content.items() if value is not ...}
        for key in [key for key, value in content.items() if value is ...]:
            del values[key]
        if path.name == "manifest.json":
            planted.write_manifest(path.parent, values)
            return
        content = json.dumps(values)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if path.name != "manifest.json":
        planted.put_right(path.parent)


def outcomes(capsys, commands, skip=()):
    for what, call in commands.items():
        if what in skip:
            continue
        try:
            status = call()
            told = "".join(capsys.readouterr())
        except ScaleDigrapError as error:
            status, told = 2, str(error) + "\n"
        yield what, status, told


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_damaged_list_of_files_is_one_line(checkpoint, shards, copy, tmp_path, capsys, content):
    damage(step(copy) / "manifest.json", content)
    for what, status, told in outcomes(capsys, every_command(copy, checkpoint("llava"), shards, tmp_path)):
        if what != "show":  # which does not verify
            assert status == (1 if what == "verify" else 2), (what, told)
            assert "manifest.json" in told, (what, told)


@pytest.mark.parametrize("content", STATES.values(), ids=STATES.keys())
def test_a_damaged_state_of_the_run_is_one_line(checkpoint, shards, copy, tmp_path, capsys, content):
    damage(step(copy) / "trainer.json", content)
    for what, status, told in outcomes(capsys, every_command(copy, checkpoint("llava"), shards, tmp_path)):
        if what == "verify" and isinstance(content, dict) and "version" in content:
            assert status == 0, told  # that of another version may be whole
            continue
        assert status == (1 if what == "verify" else 2), (what, told)
        assert "trainer.json" in told, (what, told)
        assert told.count("\n") <= 2, (what, told)


@pytest.mark.parametrize("content", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_a_damaged_configuration_is_one_line(checkpoint, shards, copy, tmp_path, capsys, content):
    values = json.loads((step(copy) / "trainer.json").read_text())["config"]
    damage(step(copy) / "trainer.json", {"config": {**values, **content}})
    commands = every_command(copy, checkpoint("llava"), shards, tmp_path)
    for what, status, told in outcomes(capsys, commands, skip=("train", "verify")):
        if what == "show":
            assert status == 0, told
        else:
            assert status == 2, (what, told)
            assert "its configuration is damaged" in told, (what, told)


def test_a_configuration_from_someone_else_reads_no_secret_of_this_machine(copy, tmp_path, monkeypatch, capsys):
    """An interpolation in it would put a secret of the environment into the exported prompt."""
    monkeypatch.setenv("A_SECRET", "hunter2")
    monkeypatch.setenv("A_NAME", "plain")
    values = json.loads((step(copy) / "trainer.json").read_text())["config"]
    values["model"]["prompt"] = "${oc.env:A_SECRET} ${oc.env:A_NAME} {question}"
    damage(step(copy) / "trainer.json", {"config": values})
    assert main(["export", str(copy), "--to", str(tmp_path / "model")]) == 0
    written = json.loads((tmp_path / "model" / "scale_digrap.json").read_text())
    assert written["prompt_template"]["prompt"] == "*** plain {question}"


def test_secrets_of_the_configuration_are_not_in_a_checkpoint_and_resuming_works(
    checkpoint,
    shards,
    tmp_path,
    caplog,
):
    url = "https://user:hunter2@host/x.tar?sig=hunter3"
    suite = {"shards": [url], "group": "near", "shift": "vision"}
    options = {**OPTIONS, "evaluation": {"suites": {"s": suite}}}
    run = tmp_path / "run"
    runs.run(checkpoint("llava"), shards, run, training={"steps": 1}, **options)
    path = step(run) / "trainer.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert "hunter" not in path.read_text()
    assert json.loads(path.read_text())["config"]["evaluation"]["suites"]["s"]["shards"] == [
        "https://***@host/x.tar?sig=***"
    ]
    with caplog.at_level("WARNING"):
        result = runs.run(checkpoint("llava"), shards, run, training={"steps": 2}, **options)
    assert len(result["loss"]) == 2
    told = [record.getMessage() for record in caplog.records if "another configuration" in record.getMessage()]
    assert told == ["going on with another configuration than before: training.steps: 1 → 2"]
    caplog.clear()
    other = {**suite, "shards": [url.replace("host", "elsewhere")]}
    with caplog.at_level("WARNING"):
        runs.run(
            checkpoint("llava"),
            shards,
            run,
            training={"steps": 3},
            **{**options, "evaluation": {"suites": {"s": other}}},
        )
    assert "https://***@elsewhere/x.tar" in caplog.text
    assert "hunter" not in caplog.text
