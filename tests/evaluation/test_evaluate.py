"""The command on any ranks and engines, against models in memory; what it refuses before a model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from scale_digrap.config import ConfigError
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.evaluation import models
from scale_digrap.evaluation.evaluate_config import load_evaluate_config
from scale_digrap.evaluation.records import read_predictions
from tests.evaluation import evaluations
from tests.evaluation.evaluations import ALPHA, COUNTS, overrides, predictions, run_evaluation
from tests.evaluation.tiny import write_suite

LORA = ("lora.enabled=true", "lora.rank=4", "lora.targets=['[qv]_proj']", "optimizer.lr=0.02")
ZERO3 = ("sharding.engine=deepspeed", "sharding.zero.stage=3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """``suites`` and ``base``."""
    folder = tmp_path_factory.mktemp("evaluate")
    evaluations.make_suites(folder / "suites")
    evaluations.make_base(folder / "base")
    return folder


@pytest.mark.distributed
def test_every_engine_and_number_of_ranks_writes_the_same_files(dist_pool, folder: Path):
    base = folder / "base"
    full = dist_pool(2).run(evaluations.train_and_answer, base, folder / "full")[0]
    lora = dist_pool(2).run(evaluations.train_and_answer, base, folder / "lora", *LORA, *ZERO3)[0]
    rows = {
        "base": f"{{path: {base}}}",
        "full": f"{{run: {folder / 'full'}, alphas: [1.0, {ALPHA}]}}",
        "lora": f"{{run: {folder / 'lora'}, alphas: [{ALPHA}, 1.0]}}",
    }
    run_evaluation(overrides(folder, "one", "baseline=base", **rows))
    one = predictions(folder / "one")
    assert len(one) == 5 * len(COUNTS)

    # the checkpoints say what the models in memory said, of either engine, mixed and not
    for name, trained in (("full", full), ("lora", lora)):
        for alpha, answers in trained.items():
            key = f"{name}-seed0" if alpha == 1.0 else f"{name}-wise-{ALPHA}-seed0"
            for suite, records in answers.items():
                assert read_predictions(folder / "one" / "predictions" / key / f"{suite}.jsonl") == records, key
    by_model = {key: [json.loads(line)["prediction"] for line in one[key].splitlines()] for key in one if "/id" in key}
    assert len({tuple(answers) for answers in by_model.values()}) == 5, "the models must not all answer alike"
    assert all(len(set(answers)) > 2 for answers in by_model.values())
    for key, content in one.items():
        lines = [json.loads(line) for line in content.splitlines()]
        assert [line["index"] for line in lines] == list(range(COUNTS[Path(key).stem]))
        assert list(lines[0]) == [
            "index", "question_id", "prediction", "answers", "score", "question_type", "answer_type", "image_id",
        ]  # fmt: skip

    for world, engine, batch in ((2, "replicated", 3), (2, "fsdp", 4), (2, "deepspeed", 5), (3, "fsdp", 2)):
        chosen = rows if world == 2 and engine != "replicated" else {"base": rows["base"], "lora": rows["lora"]}
        out = f"{engine}{world}"
        dist_pool(world).run(
            run_evaluation, overrides(folder, out, f"engine.name={engine}", f"batch_size={batch}", **chosen)
        )
        here = predictions(folder / out)
        assert here == {key: one[key] for key in here}, out
        assert len(here) == len(chosen) * 2 * len(COUNTS) - len(COUNTS)
        assert (folder / out / "DONE").is_file()
        assert not (folder / out / "models").exists()

    results = json.loads((folder / "one" / "results.json").read_text())
    assert {method["key"] for method in results["methods"]} == {
        "base", "full", f"full-wise-{ALPHA}", "lora", f"lora-wise-{ALPHA}",
    }  # fmt: skip
    assert "Base" in (folder / "one" / "table.md").read_text() or "base" in (folder / "one" / "table.md").read_text()
    assert (folder / "one" / "report.html").stat().st_size > 1000
    provenance = json.loads((folder / "one" / "runs" / f"lora-wise-{ALPHA}-seed0.json").read_text())["provenance"]
    assert provenance["alpha"] == ALPHA
    assert provenance["step"] == 2
    assert provenance["trained_as"]["lora"]["enabled"]
    assert set(results["settings"]["config"]["models"]) == set(rows)
    assert provenance["template"]["prompt"] == "{question}"
    assert provenance["generation"] == {"do_sample": False, "num_beams": 1, "max_new_tokens": 3}

    # again, with nothing to do but a model more: the files of the others stay as they are
    before = {path: path.stat().st_mtime_ns for path in (folder / "one" / "predictions").rglob("*.jsonl")}
    run_evaluation(overrides(folder, "one", another=rows["base"], **rows))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert predictions(folder / "one")["another-seed0/id.jsonl"] == one["base-seed0/id.jsonl"]
    # another base than the adapter was trained on
    other = shutil.copytree(base, folder / "other-base")
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if name.endswith("mlp.down_proj.weight"))
    save_file({**tensors, name: 1.1 * tensors[name]}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ScaleDigrapError, match="has other weights than the base"):
        run_evaluation(overrides(folder, "other", lora=f"{{run: {folder / 'lora'}, base: {other}}}"))
    # and with other settings it is refused
    with pytest.raises(ScaleDigrapError, match=r"generation.max_new_tokens: 3 → 4.*name another folder"):
        run_evaluation(overrides(folder, "one", "generation.max_new_tokens=4", **rows))


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load_model", fail)
    monkeypatch.setattr(models, "loaded", fail)


def refused(folder: Path, *more: str, **rows: str) -> str:
    with pytest.raises(ScaleDigrapError) as caught:
        run_evaluation(overrides(folder, "refused", *more, **(rows or {"base": f"{{path: {folder / 'base'}}}"})))
    return str(caught.value)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_what_is_wrong_is_told_before_a_model_is_loaded(folder: Path, tmp_path: Path):
    assert "no setting of Transformers' GenerationConfig (did you mean 'num_beams'" in refused(
        folder, "generation.num_beam=3"
    )
    assert "generation.synced_gpus is the runner's own" in refused(folder, "generation.synced_gpus=true")
    assert "`temperature`" in refused(folder, "generation.temperature=0.3")
    assert "greater than 0" in refused(folder, "generation.max_new_tokens=-1")
    assert "alphas=[0.5]" in refused(folder, a=f"{{path: {folder / 'base'}, alphas: [0.5]}}")
    assert "is no folder" in refused(folder, a=f"{{run: {tmp_path / 'nothing'}}}")
    assert "models.a: cannot load a model" in refused(folder, a=f"{{path: {tmp_path}}}")
    assert "expected 22" in refused(folder, "suites.custom.id.expected=22")

    # weights of another architecture than their config.json
    other = tmp_path / "other"
    other.mkdir()
    for file in (folder / "base").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, other / "model.safetensors", {"format": "pt"})
    assert "the files are of another architecture" in refused(folder, a=f"{{path: {other}}}")

    # questions that would spoil a score
    suites = {"group": "id", "shift": "none", "metric": "exact"}
    fields = ", ".join(f"{key}: {value}" for key, value in suites.items())
    for what, message in (
        ("twice", "question ids occur more than once, first '00001'"),
        ("empty", "must be a list of one or more strings"),
    ):
        broken = tmp_path / what
        broken.mkdir()
        write_suite(broken, "id", 8)
        data = (broken / "id-1.tar").read_bytes()
        if what == "twice":
            data = data.replace(b'"question_id": "00003"', b'"question_id": "00001"')
        else:
            data = data.replace(b'["circle"]', b"[        ]", 1)
        (broken / "id-1.tar").write_bytes(data)
        assert message in refused(
            folder, f"suites.custom.mine={{{fields}, shards: ['{broken}/*.tar']}}", "suites.only=[mine]"
        )

    # a second evaluation in the same folder
    import fcntl

    with open(folder / "refused" / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another evaluation is writing" in refused(folder)


def test_the_configuration_is_checked(tmp_path: Path):
    good = ["models.a.path=x", "suites.set=gqa"]
    for wrong, message in (
        (["models.a.run=y"], "one of path .* and run"),
        (["models.a.alphas=[1.5]"], "between 0"),
        (["models.b={path: y, method: a}"], "would both be 'a' with seed 0"),
        (["baseline=zero"], "is no row of the table"),
        (["engine.name=fsdpp"], "did you mean 'fsdp'"),
        (["engine.zero.stage=2"], "must be 3"),
        (["leakage={limit: 1}"], "leakage.train is empty"),
        (["data.train=[x]"], "leakage.train and shift.train"),
        (["model.prompt=hello"], "must contain {question}"),
        (["models.a.checkpoint=last"], "newest or a step|for run"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_evaluate_config(None, [*good, *wrong])
    with pytest.raises(ConfigError, match="models is empty"):
        load_evaluate_config(None, [])
