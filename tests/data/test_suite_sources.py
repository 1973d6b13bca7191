"""The official files of every built-in suite become shards by the command that the suite names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scale_digrap.cli import main
from scale_digrap.data.dataset import ShardDataset
from scale_digrap.data.shards import ShardWriteError
from scale_digrap.data.sources.gqa import read_gqa
from scale_digrap.data.sources.textvqa import read_textvqa
from scale_digrap.data.sources.vizwiz import read_vizwiz
from scale_digrap.data.sources.vqa import read_vqa
from scale_digrap.evaluation.registry import REGISTRIES
from tests.data import official
from tests.data.published import jpeg

SUITES = {name: suite for registry in REGISTRIES.values() for name, suite in registry.items() if suite.command}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def converted(name: str, folder: Path, *options: str) -> dict[str, dict]:
    """question_id → what a loader gets."""
    command = ["shards", "write", *SUITES[name].command.split(), "--to", str(folder / "suites" / name), *options]
    assert main(command) == 0
    dataset = ShardDataset(str(folder / "suites" / name))
    samples = [dataset[i] for i in range(len(dataset))]
    found = {
        one.question_id: {"question": one.question, "answers": one.answers, "image": one.image.tobytes(), **one.extra}
        for one in samples
    }
    assert len(found) == len(samples)
    return found


def decoded(path: Path) -> bytes:
    from PIL import Image

    return Image.open(path).convert("RGB").tobytes()


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_is_converted_by_the_command_that_it_names(name, here):
    assert set(SUITES) == set(official.MAKERS)
    questions = official.MAKERS[name](here)
    for file in SUITES[name].files:
        assert file.startswith("pictures: ") or (here / file).is_file(), file
    samples = converted(name, here)
    assert len(samples) == questions
    for sample in samples.values():
        assert sample["image_id"]
        assert sample["question"].strip()
        assert len(sample["answers"]) == (10 if SUITES[name].metric.startswith("vqa") else 1)
    if SUITES[name].metric.startswith("vqa") and name != "textvqa":
        assert {sample["answer_type"] for sample in samples.values()} <= {"other", "number", "unanswerable"}


def test_edited_pictures(here):
    official.edited(here)
    samples = converted("iv_vqa", here)
    assert set(samples) == {"262148000-5", "262148000-27", "9000-1"}
    one = samples["262148000-27"]
    assert (one["original_question_id"], one["original_image_id"]) == ("262148000", 262148)
    assert one["image_id"] == "000000262148_000000000027"
    assert one["image"] == decoded(here / "DIR" / "COCO_val2014_000000262148_000000000027.jpg")
    # A release whose ids are unique already keeps them.
    for file in ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"):
        content = json.loads((here / file).read_text())
        (entries,) = content.values()
        for number, entry in enumerate(entries):
            entry["question_id"] = f"{entry['question_id']}-{number}"
        official.save(here / file, content)
    files = (["v2_OpenEnded_mscoco_val2014_questions.json"], ["v2_mscoco_val2014_annotations.json"], "DIR")
    ids = [json.loads(record.json)["question_id"] for record in read_vqa(*files, derived="edited").records]
    assert ids == ["262148000-0", "262148000-1", "9000-2"]
    official.rephrasings(here)
    name = "mscoco_valrep2014_humans_og"
    with pytest.raises(ShardWriteError, match="image_id '9' of question_id 9000 is not that of an edited picture"):
        read_vqa([f"v2_OpenEnded_{name}_questions.json"], [f"v2_{name}_annotations.json"], "DIR", derived="edited")


def test_rephrasings_whose_ids_collide(here):
    official.rephrasings(here)
    samples = converted("vqa_rephrasings", here)
    assert set(samples) == {"9000", "9000-90000", "9000-90001", "90000", "90000-900000"}
    assert samples["9000-90000"]["question"] == "Which thing is it?"
    assert samples["9000-90000"]["original_question_id"] == "9000"
    assert samples["90000"]["question"] == "Who is there?"
    assert samples["90000"]["answers"][0] == "man"
    assert "original_question_id" not in samples["90000"]
    name = "mscoco_valrep2014_humans_og"
    files = ([f"v2_OpenEnded_{name}_questions.json"], [f"v2_{name}_annotations.json"], "DIR")
    with pytest.raises(ShardWriteError, match=r"90000 is annotated twice.*--derived rephrased"):
        read_vqa(*files)
    with pytest.raises(ShardWriteError, match="derived must be one of edited, rephrased, got 'changed'"):
        read_vqa(*files, derived="changed")


def test_counterexamples_are_a_part_of_the_validation_set(here):
    official.vqa_ce(here)
    assert set(converted("vqa_ce", here)) == {"9001", "262148000"}
    files = (["v2_OpenEnded_mscoco_val2014_questions.json"], ["v2_mscoco_val2014_annotations.json"], "DIR")
    source = read_vqa(*files, only="counterexamples.json")
    assert source.description.endswith("the 2 of counterexamples.json")
    # The form that FRAMES-VQA uses: annotations of the part, questions of all.
    content = json.loads(Path(files[1][0]).read_text())
    content["annotations"] = [one for one in content["annotations"] if one["question_id"] in (9001, 262148000)]
    official.save(here / "subset.json", content)
    part = read_vqa(files[0], ["subset.json"], "DIR", only="subset.json")
    assert [record.json for record in part.records] == [record.json for record in source.records]
    official.save(here / "counterexamples.json", [9001, 5])
    with pytest.raises(ShardWriteError, match=r"1 of 2 question_ids in counterexamples\.json belong to no question"):
        read_vqa(*files, only="counterexamples.json")
    official.save(here / "counterexamples.json", {"9001": 1})
    with pytest.raises(ShardWriteError, match="expected a list of question_ids"):
        read_vqa(*files, only="counterexamples.json")


def test_subsets_of_coco(here):
    official.vqa_cp(here)
    samples = converted("vqa_cp_v2", here)
    assert samples["9000"]["coco_split"] == "train2014"
    assert samples["9000"]["image"] == decoded(here / "DIR" / "train2014" / "COCO_train2014_000000000009.jpg")
    # AdVQA says val2017; who has val2014, which holds the same pictures, says so.
    official.advqa(here)
    official.pictures(here / "coco" / "val2014", [f"COCO_val2014_{image:012d}.jpg" for image in official.COCO])
    name = "mscoco_val2017_advqa"
    files = ([f"v1_OpenEnded_{name}_questions.json"], [f"v1_{name}_annotations.json"])
    assert [Path(r.images[0]).is_file() for r in read_vqa(*files, "coco").records] == [False] * 3
    assert all(Path(r.images[0]).is_file() for r in read_vqa(*files, "coco", subset="val2014").records)


def test_textvqa(here):
    official.textvqa(here)
    sample = converted("textvqa", here)["34602"]
    del sample["image"]
    assert sample == {
        "question": "what is the brand of this camera?",
        "answers": ["dakota", "nous les gosses", "dakota digital"] + ["dakota"] * 7,
        "image_id": "003a8ae2ef43b901",
        "image_classes": ["Cassette deck"],
        "set_name": "val",
    }
    content = json.loads((here / "TextVQA_0.5.1_val.json").read_text())
    del content["data"][1]["answers"]
    official.save(here / "TextVQA_0.5.1_test.json", content)
    with pytest.raises(ShardWriteError, match="question_id 34603 has no list of answers"):
        read_textvqa(["TextVQA_0.5.1_test.json"], "train_images")
    official.save(here / "other.json", {"entries": []})
    with pytest.raises(ShardWriteError, match="expected a list of data, or an object"):
        read_textvqa(["other.json"], "train_images")


def test_vizwiz(here, capsys):
    official.vizwiz(here)
    samples = converted("vizwiz", here)
    assert samples["VizWiz_val_00000001"]["answer_type"] == "unanswerable"
    assert samples["VizWiz_val_00000001"]["answerable"] == 0
    assert samples["VizWiz_val_00000002"]["image_id"] == "VizWiz_val_00000002.jpg"
    assert samples["VizWiz_val_00000002"]["image"] == decoded(here / "val" / "VizWiz_val_00000002.jpg")
    command = ["shards", "write", *SUITES["vizwiz"].command.split(), "--to", "fewer", "--drop-unanswerable"]
    assert main(command) == 0
    assert "left out: 1 questions unanswerable" in capsys.readouterr().out
    assert len(ShardDataset("fewer")) == 2
    assert json.loads(Path("fewer/written.json").read_text())["source"] == "vizwiz: val.json; left out: 1 unanswerable"
    entries = json.loads(Path("val.json").read_text())
    official.save(here / "val.json", [*entries, entries[0]])
    with pytest.raises(ShardWriteError, match="1 question_ids occur more than once, such as 'VizWiz_val_00000000'"):
        read_vizwiz(["val.json"], "val")
    del entries[2]["answers"]
    official.save(here / "val.json", entries)
    with pytest.raises(ShardWriteError, match=r"the entry of VizWiz_val_00000002\.jpg has no list of answers"):
        read_vizwiz(["val.json"], "val")


def test_gqa_and_its_ood_parts(here):
    official.gqa(here)
    samples = converted("gqa", here)
    assert samples["201030415"]["answers"] == ["couch"]
    assert (samples["201030415"]["question_type"], samples["201030415"]["answer_type"]) == ("query", "open")
    assert (samples["20602949"]["question_type"], samples["20602949"]["answer_type"]) == ("verify", "binary")
    assert samples["20602949"]["image_id"] == "2370799"
    official.gqa_ood(here)
    parts = {identity: sample["answer_type"] for identity, sample in converted("gqa_ood", here).items()}
    assert parts == {"1": "head", "2": "head", "3": "tail"}
    grouped = read_gqa(["ood_testdev_head.json", "ood_testdev_tail.json"], "images", grouped=True)
    assert [record.samples for record in grouped.records] == [2, 1]
    official.save(here / "test_balanced_questions.json", {"7": {"question": "Is it?", "imageId": "n1"}})
    with pytest.raises(ShardWriteError, match="question_id 7 has no answer"):
        read_gqa(["test_balanced_questions.json"], "images")
    official.save(here / "list.json", [])
    with pytest.raises(ShardWriteError, match="expected an object of question_id"):
        read_gqa(["list.json"], "images")
    with pytest.raises(ShardWriteError, match="no such image folder: elsewhere"):
        read_gqa(["testdev_balanced_questions.json"], "elsewhere")


def test_incomplete_questions_are_refused_or_left_out_and_counted(here, capsys):
    official.vqav2(here)
    files = ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json")
    asked, told = (json.loads(Path(file).read_text()) for file in files)
    asked["questions"][0]["question"] = " "
    told["annotations"][1]["answers"] = []
    told["annotations"][2]["answers"] = []
    for file, content in zip(files, (asked, told), strict=True):
        official.save(here / file, content)
    write = ["shards", "write", *SUITES["vqav2"].command.split(), "--to", "out"]
    assert main(write) == 2
    assert "question 9000: its text must not be empty" in (message := capsys.readouterr().err)
    assert "--drop-incomplete" in message
    assert not Path("out").exists()
    assert main([*write, "--drop-incomplete"]) == 0
    assert "left out: 1 questions without text, 2 questions without answers" in capsys.readouterr().out
    assert len(ShardDataset("out")) == 3
    told["annotations"][3]["answers"] = None  # not empty but wrong: never left out
    official.save(here / files[1], told)
    assert main([*write[:-1], "out2", "--drop-incomplete"]) == 2
    assert "has no list of answers" in capsys.readouterr().err


def test_pictures_are_stored_untouched(here):
    official.textvqa(here)
    source = read_textvqa(["TextVQA_0.5.1_val.json"], "train_images")
    assert [Path(record.images[0]).read_bytes() for record in source.records] == [jpeg(0), jpeg(1)]
