"""Published data sets become shards that hold what they hold, in a form that webdataset reads."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image, ImageOps

from scale_digrap.data.dataset import ShardDataset
from scale_digrap.data.shards import ShardWriteError
from scale_digrap.data.sources.labelled import read_image_folder, read_image_lists
from scale_digrap.data.sources.lavis import read_lavis
from scale_digrap.data.sources.records import Question, to_records, unique_keys
from scale_digrap.data.sources.vqa import read_vqa
from scale_digrap.data.writing import write_source
from scale_digrap.data.written import WriteOptions
from tests.data.published import domainnet, jpeg, lavis, vqav2


def written(source, folder: Path, **options) -> list[dict]:
    """What plain webdataset reads from what was written."""
    write_source(source, folder, WriteOptions(**options))
    shards = sorted(map(str, folder.glob("*.tar")))
    return list(webdataset.WebDataset(shards, shardshuffle=False))


def read(files: dict[str, str], **options):
    return read_vqa([files["questions"]], [files["annotations"]], files["images"], **options)


def test_vqav2(tmp_path):
    files = vqav2(tmp_path)
    samples = written(read(files), tmp_path / "out", shuffle_seed=None, max_count=5)
    questions = json.loads(Path(files["questions"]).read_text())["questions"]
    annotations = {one["question_id"]: one for one in json.loads(Path(files["annotations"]).read_text())["annotations"]}
    assert len(samples) == len(questions) == 18
    for sample, question in zip(samples, questions, strict=True):
        content, annotation = json.loads(sample["json"]), annotations[question["question_id"]]
        assert content["question"] == question["question"]
        assert content["answers"] == [one["answer"] for one in annotation["answers"]]
        assert content["question_id"] == str(question["question_id"])
        assert (content["image_id"], content["answer_type"]) == (question["image_id"], "other")
        picture = tmp_path / "images" / "train2014" / f"COCO_train2014_{question['image_id']:012d}.jpg"
        assert sample["jpg"] == picture.read_bytes()
    assert [Path(sample["__url__"]).name for sample in samples][:6] == ["shard-000000.tar"] * 5 + ["shard-000001.tar"]


def test_grouped_records_are_the_same_samples_with_one_copy_of_each_picture(tmp_path):
    files = vqav2(tmp_path)
    single = ShardDataset([str(tmp_path / "single")]) if written(read(files), tmp_path / "single") else None
    groups = written(read(files, grouped=True), tmp_path / "grouped")
    grouped = ShardDataset([str(tmp_path / "grouped")])
    assert len(groups) == 6
    assert len(grouped) == len(single) == 18

    def facts(dataset):
        return {
            one.question_id: (one.question, one.answers, one.extra["image_id"], one.image.tobytes())
            for one in (dataset[i] for i in range(len(dataset)))
        }

    assert facts(grouped) == facts(single)


def test_a_group_shares_only_what_all_its_questions_have():
    def question(number, **extra):
        content = {"question": f"q{number}?", "answers": ["a"], "question_id": str(number), **extra}
        return Question(str(number), ("x/p.jpg",), content)

    equal, other = {"image_id": 7, "coco_split": "train2014"}, {"image_id": 7, "coco_split": "val2014"}
    for members, common in (([equal, equal], equal), ([equal, other], {"image_id": 7}), ([equal, {}], {})):
        questions = [question(number, **extra) for number, extra in enumerate(members)]
        (record,) = to_records(questions, grouped=True, shared=("image_id", "coco_split"))
        content = json.loads(record.json)
        asked = content.pop("questions")
        assert content == common
        assert [{**one, **content} for one in asked] == [one.content for one in questions]
        assert (record.key, record.samples) == ("p", 2)


def test_vqa_cp_names_the_subset_in_every_entry_and_images_may_lie_flat(tmp_path):
    files = vqav2(tmp_path, images=2)
    for name in ("questions", "annotations"):
        entries = json.loads(Path(files[name]).read_text())[name]
        Path(files[name]).write_text(json.dumps([{**entry, "coco_split": "train2014"} for entry in entries]))
    for path in (tmp_path / "images" / "train2014").iterdir():
        path.rename(tmp_path / "images" / path.name)
    assert len(written(read(files), tmp_path / "out")) == 6
    for path in (tmp_path / "images").glob("*.jpg"):
        path.rename(path.with_name(path.name.rpartition("_")[2]))  # COCO 2017
    assert len(written(read(files), tmp_path / "out2")) == 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, a: a.pop(), "question_id 9000 has no annotation"),
        (lambda q, a: q.pop(), "1 annotations belong to no question, such as question_id 25002"),
        (lambda q, a: q.append(q[0]), "9000 is asked twice"),
        (lambda q, a: a.append(a[0]), "25002 is annotated twice"),
        (lambda q, a: a[0].update(image_id=7), "about image 25, its annotation about image 7"),
        (lambda q, a: a[0].update(answers=[]), "25002: needs a list of one or more answers"),
        (lambda q, a: a[0].update(answers=["yes", "no", None]), "has no list of answers"),
        (lambda q, a: q[0].update(question=" "), "9000: its text must not be empty"),
        (lambda q, a: q[0].pop("image_id"), "lacks 'image_id'"),
    ],
)
def test_vqa_files_that_do_not_fit_together(tmp_path, change, words):
    files = vqav2(tmp_path, images=2)
    content = {name: json.loads(Path(files[name]).read_text()) for name in ("questions", "annotations")}
    change(content["questions"]["questions"], content["annotations"]["annotations"])
    for name, value in content.items():
        Path(files[name]).write_text(json.dumps(value))
    with pytest.raises(ShardWriteError, match=words):
        read(files)


def test_lavis_lists(tmp_path):
    file, images = lavis(tmp_path)
    entries = json.loads(Path(file).read_text())
    extra = [
        {"question_id": "a", "question": "Same?", "answer": "yes", "image": [entries[0]["image"], entries[2]["image"]]},
        {"question_id": "b", "question": "Two plus two?", "answers": ["four", "4"], "image": None},
    ]
    Path(file).write_text(json.dumps(entries + extra))
    samples = written(read_lavis([file], images), tmp_path / "out", shuffle_seed=None)
    assert len(samples) == len(entries) + 2
    for sample, entry in zip(samples, entries, strict=False):
        content = json.loads(sample["json"])
        assert sample["jpg"] == (Path(images) / entry["image"]).read_bytes()
        assert content == {
            "question": entry["question"],
            "answers": entry["answer"],
            "question_id": str(entry["question_id"]),
            "image_id": entry["image"],
            "dataset": "vqa",
        }
    several, text = samples[-2:]
    assert [several[name] for name in ("0.jpg", "1.jpg")] == [
        (Path(images) / entries[i]["image"]).read_bytes() for i in (0, 2)
    ]
    assert not [name for name in text if "jpg" in name]
    grouped = written(read_lavis([file], images, grouped=True), tmp_path / "grouped", shuffle_seed=None)
    assert [len(json.loads(one["json"])["questions"]) for one in grouped] == [2, 2, 2, 2, 1, 1]
    dataset = ShardDataset([str(tmp_path / "grouped")])
    assert [len(dataset[i].images) for i in (0, 8, 9)] == [1, 2, 0]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"question_id": 1, "question": "?", "answer": ["a"]}, "entry 8 lacks 'image'"),
        ({"question_id": 1, "question": "?", "image": "x.jpg"}, r"entry 8 \(question_id 1\) has no answer"),
        ({"question_id": 77, "question": "?", "image": 7, "answer": "a"}, "'image' must be a path"),
        ({"question_id": 0, "question": "?", "image": None, "answer": "a"}, "'0'"),
    ],
)
def test_lavis_lists_of_another_form(tmp_path, entry, words):
    file, images = lavis(tmp_path)
    Path(file).write_text(json.dumps([*json.loads(Path(file).read_text()), entry]))
    with pytest.raises(ShardWriteError, match=words):
        read_lavis([file], images)


def test_domainnet_lists_and_image_folders_agree(tmp_path):
    file, root = domainnet(tmp_path)
    lines = [line.rsplit(" ", 1) for line in Path(file).read_text().splitlines()]
    listed = written(read_image_lists([file], root), tmp_path / "lists", shuffle_seed=None)
    for sample, (path, label) in zip(listed, lines, strict=True):
        assert (sample["cls"], sample["jpg"]) == (label.encode(), (tmp_path / path).read_bytes())
        content = json.loads(sample["json"])
        assert (content["question"], content["question_id"]) == ("what is in the image", path)
    answers = [json.loads(one["json"])["answers"] for one in listed]
    assert answers == [["aircraft carrier"]] * 3 + [["The Eiffel Tower"]] * 3 + [["zebra"]] * 3
    manifest = json.loads((tmp_path / "lists" / "manifest.json").read_text())
    assert manifest["classes"] == ["aircraft carrier", "The Eiffel Tower", "zebra"]

    # Sorted folder names would number them otherwise ("T" < "a"); a list of classes keeps the numbers.
    folders = written(read_image_folder(tmp_path / "real"), tmp_path / "folders")
    assert Counter(one["cls"] for one in folders) == {b"0": 3, b"1": 3, b"2": 3}
    assert {json.loads(one["json"])["answers"][0] for one in folders if one["cls"] == b"0"} == {"The Eiffel Tower"}
    (tmp_path / "classes.txt").write_text("aircraft_carrier\nThe_Eiffel_Tower\nzebra\n")
    source = read_image_folder(tmp_path / "real", classes=tmp_path / "classes.txt", question="which?")
    again = written(source, tmp_path / "again", shuffle_seed=None)
    assert [(one["cls"], one["jpg"]) for one in again] == [(one["cls"], one["jpg"]) for one in listed]
    dataset = ShardDataset([str(tmp_path / "again")])
    assert (dataset[8].question, dataset[8].answers) == ("which?", ["zebra"])


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("real/zebra/a.jpg", "line 1: expected 'path label'"),
        ("a/x.jpg 0\na/y.jpg 1", "folders do not name the classes"),
        ("a/x.jpg 0\nb/y.jpg 0", "folders do not name the classes"),
        ("a/x.jpg 0\nb/y.jpg 2", r"classes \[1\] occur in no line"),
        ("a/x.jpg 0\na/x.jpg 0", "listed twice"),
        ("", "no pictures"),
    ],
)
def test_lists_that_contradict_themselves(tmp_path, lines, words):
    (tmp_path / "list.txt").write_text(lines)
    with pytest.raises(ShardWriteError, match=words):
        read_image_lists([tmp_path / "list.txt"], tmp_path)


def test_keys_are_what_every_reader_takes_and_depend_on_nothing_else():
    names = ["12", "a/b.c", "a/b-c", "_x", "ü", "é", "n" * 200, "n" * 201]
    keys = unique_keys(names)
    assert len(set(keys)) == len(names)
    assert all(len(key) <= 80 and "." not in key and "/" not in key and key[0] != "_" for key in keys)
    assert keys[0] == "12"
    assert unique_keys(names[::-1]) == keys[::-1]


@pytest.mark.parametrize(("side", "expected"), [("shortest", (36, 24)), ("longest", (24, 16))])
def test_resizing_reduces_the_side_asked_for_and_leaves_small_pictures_untouched(tmp_path, side, expected):
    (tmp_path / "in" / "a").mkdir(parents=True)
    kinds = {"plain.jpg": "JPEG", "plain.png": "PNG", "plain.webp": "WEBP", "plain.bmp": "BMP"}
    for name, kind in kinds.items():
        (tmp_path / "in" / "a" / name).write_bytes(jpeg(1, (48, 32), kind))
    (tmp_path / "in" / "a" / "large.jpg").write_bytes(jpeg(1, (960, 640)))
    (tmp_path / "in" / "a" / "small.jpg").write_bytes(jpeg(2, (20, 16)))
    turned = Image.Exif()
    turned[0x0112] = 6
    (tmp_path / "in" / "a" / "turned.jpg").write_bytes(jpeg(1, (48, 32), exif=turned))
    source = read_image_folder(tmp_path / "in")
    samples = written(source, tmp_path / "out", resize=24, resize_side=side, quality=98)
    by_name = {json.loads(one["json"])["question_id"].partition("/")[2]: one for one in samples}
    assert by_name["small.jpg"]["jpg"] == (tmp_path / "in" / "a" / "small.jpg").read_bytes()
    reference = Image.open(io.BytesIO(jpeg(1, (48, 32), "PNG"))).resize(expected, Image.Resampling.LANCZOS)
    for name, sample in by_name.items():
        if name == "small.jpg":
            continue
        extension = {"plain.png": "png", "plain.webp": "webp", "plain.bmp": "png"}.get(name, "jpg")
        picture = Image.open(io.BytesIO(sample[extension]))
        wanted = reference
        if name == "turned.jpg":
            assert not picture.getexif()
            wanted = ImageOps.exif_transpose(_with_exif(reference, turned))
        assert picture.size == wanted.size, name
        difference = np.abs(np.asarray(picture, dtype=int) - np.asarray(wanted, dtype=int)).mean()
        assert difference < 6, (name, difference)


def _with_exif(image: Image.Image, exif: Image.Exif) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    return Image.open(buffer)
