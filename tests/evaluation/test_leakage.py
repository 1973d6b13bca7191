"""Planted leaks of every kind are found, and nothing else is."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scale_digrap.data.dataset import ShardDataset
from scale_digrap.data.sample import VqaSample
from scale_digrap.data.shards import write_shards
from scale_digrap.evaluation import fingerprints
from scale_digrap.evaluation.fingerprints import image_key, question_text
from scale_digrap.evaluation.leakage import KINDS, LeakageError, LeakageReport, check
from scale_digrap.evaluation.suites import Suite
from tests.data.made import encoded, tar


def scene(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A picture that is like no other, with the 1/f spectrum that photographs have."""
    rng, (width, height) = np.random.default_rng(seed), size
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width) * width, np.fft.fftfreq(height) * height))
    frequency[0, 0] = 1.0
    grey = np.fft.ifft2((rng.normal(size=(height, width)) + 1j * rng.normal(size=(height, width))) / frequency).real
    colour = 128 + 50 * ((grey - grey.mean()) / grey.std())[..., None] + rng.uniform(-40, 40, 3)
    return Image.fromarray(np.clip(colour, 0, 255).astype(np.uint8))


def sample(number: int, image: Image.Image | int | None = -1, **changes) -> VqaSample:
    """Number's own picture, question and ids, unless changed."""
    picture = scene(number) if image == -1 else image
    extra = {"image_id": changes.pop("image_id", number), **changes.pop("extra", {})}
    return VqaSample(
        key=changes.pop("key", f"k{number:05d}"),
        image=picture,
        question=changes.pop("question", f"What is thing {number}?"),
        answers=["yes"],
        question_id=str(changes.pop("question_id", 1000 * number)),
        extra={name: value for name, value in extra.items() if value is not None},
    )


def shards(folder: Path, samples: list[VqaSample], per_shard: int = 50) -> str:
    write_shards(samples, folder, samples_per_shard=per_shard)
    return str(folder)


def suite(name: str, folder: str) -> Suite:
    return Suite(name=name, group="near", shift="vision", shards=(folder,))


TRAIN = 120


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[str, list[Suite]]:
    """A training set of samples 0…119, a clean suite, and one with a single leak of each kind among clean samples."""
    root = tmp_path_factory.mktemp("leakage")
    train = [sample(number) for number in range(TRAIN)]
    # The training set also holds a question that was edited from the suite's sample 540.
    train.append(
        sample(
            700,
            question_id="540000-17",
            extra={"original_question_id": "540000", "original_image_id": 540},
            image_id="000000000540_000000000017",
        )
    )
    train.append(sample(701, Image.new("RGB", (96, 64), (0, 0, 0))))
    clean = [sample(number) for number in range(200, 260)]
    clean += [
        # Ids of another data set that happen to be equal; the same text about another picture; a black picture.
        sample(300, question_id=5000),
        sample(301, image_id="5", question="What is thing 5?"),
        sample(302, Image.new("RGB", (96, 64), (0, 0, 0))),
        sample(303, None, image_id=None, question="What is thing 7?"),
        sample(304, scene(304, (97, 64))),
    ]
    leaky = [sample(number) for number in range(500, 560)]
    leaky[3] = sample(503, question_id=3000, image_id=3, question="Reworded")
    leaky[7] = sample(507, question_id=4000, image_id=None, question="what is thing 4")
    leaky[11] = sample(511, image_id="val2014/COCO_val2014_000000000005.jpg", question=" what is thing, 5 ?")
    leaky[20] = sample(520, scene(6))
    leaky[25] = sample(525, scene(8).resize((60, 40), Image.Resampling.LANCZOS))
    leaky[30] = sample(
        530,
        question_id="9000-1",
        image_id="000000000009_000000000001",
        extra={"original_question_id": "9000", "original_image_id": 9},
    )
    suites = [suite("clean", shards(root / "clean", clean)), suite("leaky", shards(root / "leaky", leaky, 13))]
    return shards(root / "train", train), suites


def test_planted_leaks_are_found_and_nothing_else(planted):
    train, suites = planted
    seen = []
    report = check(suites, train, progress=lambda *step: seen.append(step), workers=2)
    clean, leaky = report.rows
    assert (clean.questions, clean.leaked, clean.fraction, clean.marked) == (65, 0, 0.0, False)
    assert clean.matches == dict.fromkeys(KINDS, 0)
    assert (clean.id_collisions, clean.flat_images, clean.unreadable) == (1, 1, 0)

    def found(kind: str) -> list[tuple[str, str, int]]:
        return [(one["suite"]["key"], one["train"]["key"], one["bits"]) for one in leaky.examples[kind]]

    # id + picture; id + text; the edited question's original; the original of an edited question in training.
    assert leaky.matches["question_id"] == 4
    assert found("question_id") == [("k00503", "k00003", 0), ("k00507", "k00004", 0), ("k00530", "k00009", 0)]
    assert leaky.matches["question_and_image"] == 1
    assert found("question_and_image") == [("k00511", "k00005", 0)]
    assert leaky.matches["exact_image"] == 1
    assert found("exact_image") == [("k00520", "k00006", 0)]
    assert leaky.matches["near_image"] == 2  # the copy, and the one that was made smaller
    ((key, other, bits),) = found("near_image")
    assert (key, other, bits <= 4) == ("k00525", "k00008", True)
    # Two of them have an id of the training data: it is the leak, not a collision.
    assert (leaky.leaked, leaky.questions, leaky.marked, leaky.id_collisions) == (6, 60, True, 0)
    assert leaky.fraction == pytest.approx(0.1)
    assert leaky.examples["question_id"][0]["train"]["question"] == "What is thing 3?"
    assert report.train == {
        "shards": [train], "questions": 122, "images": 122, "flat_images": 1, "unreadable": 0,
    }  # fmt: skip
    assert report.marked == ["leaky"]
    assert "LEAK  leaky: 6 of 60 questions (10.00%)" in report.describe()
    assert {name for name, _, _ in seen} == {"clean", "leaky", "train"}
    assert LeakageReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_limits_decide_what_is_marked(planted):
    train, suites = planted
    marked = [
        check(suites, train, images=images, **limits).marked
        for images, limits in [
            (True, {"limit": 0.1, "near_limit": 0.04}),
            (True, {"limit": 0.09, "near_limit": 0.04}),
            (True, {"limit": 0.1, "near_limit": 0.03}),
            (False, {"limit": 0.09}),  # the copied picture is not seen: 5 of 60
        ]
    ]
    assert marked == [[], ["leaky"], ["leaky"], []]


@pytest.mark.distributed
def test_ranks_find_the_same_as_one_process(planted, dist_pool, tmp_path, monkeypatch):
    train, suites = planted
    alone = check(suites, train).to_json()
    ranks = dist_pool(2).run(_on_rank, planted, str(tmp_path))
    assert [report for report, _ in ranks] == [alone, alone]
    # Both ranks, not only the one that has it, get the error.
    assert ranks[0][1] == ranks[1][1]
    assert ranks[0][1].startswith("leakage check, reading (rank 1): no such shard")
    # Blocks of 8, read by two ranks, serve one process.
    monkeypatch.setattr(fingerprints, "BLOCK", 8)
    monkeypatch.setattr(fingerprints, "_block", None)
    assert len(list(tmp_path.glob("*/*.npz"))) == -(-122 // 8) + -(-65 // 8) + -(-60 // 8)
    assert check(suites, train, cache_dir=tmp_path).to_json() == alone


def _on_rank(planted, cache: str) -> tuple[dict, str]:
    import torch.distributed as dist

    train, suites = planted
    ranks = {"dp_rank": dist.get_rank(), "dp_world_size": 2}
    usual, fingerprints.BLOCK = fingerprints.BLOCK, 8
    try:
        report = check(suites, train, cache_dir=cache, **ranks).to_json()
    finally:
        fingerprints.BLOCK = usual
    try:
        check(suites, train if dist.get_rank() == 0 else "/nowhere/train.tar", **ranks)
    except LeakageError as error:
        return report, str(error)
    return report, "no error"


def test_a_cache_is_used_only_for_the_same_shards(planted, tmp_path, monkeypatch):
    train, suites = planted
    first = check(suites, train, cache_dir=tmp_path / "cache")
    files = sorted((tmp_path / "cache").glob("*/*.npz"))
    assert len(files) == 3
    reads = []
    files[0].write_bytes(files[0].read_bytes()[:100])  # torn: read again
    original = fingerprints._block
    monkeypatch.setattr(fingerprints, "_block", lambda *a: reads.append(a) or original(*a))
    assert check(suites, train, cache_dir=tmp_path / "cache") == first
    assert len(reads) == 1
    check(suites, train, cache_dir=tmp_path / "cache", images=False)
    assert len(reads) == 4


def test_missing_suites_and_unreadable_samples_are_told(tmp_path):
    good = {"question": "Same?", "answers": ["a"], "question_id": 1, "image_id": 1}
    members = [("a.json", json.dumps(good).encode()), ("a.png", encoded(scene(1)))]
    members += [("b.json", json.dumps({**good, "question_id": 2}).encode()), ("b.png", b"no picture")]
    path = str(tar(tmp_path / "train.tar", members))
    absent = Suite(name="absent", group="far", shift="skill")
    report = check([suite("same", path), absent], path)
    assert report.missing == ["absent"]
    assert "absent: no shards, not compared" in report.describe()
    assert report.train["unreadable"] == 1
    assert (report.rows[0].unreadable, report.rows[0].matches["question_id"], report.rows[0].leaked) == (1, 2, 2)
    assert (report.rows[0].matches["exact_image"], report.rows[0].matches["near_image"]) == (1, 1)


def test_options_that_make_no_sense(planted, tmp_path):
    train, suites = planted
    for options, words in [
        ({"distance": 16}, "distance must be 0 to 15"),
        ({"limit": 1.5}, "limit must be a fraction"),
        ({"near_limit": -1.0}, "near_limit must be a fraction"),
        ({"dp_world_size": 2}, "torch.distributed is not running"),
    ]:
        with pytest.raises(LeakageError, match=words):
            check(suites, train, **options)
    (tmp_path / "file").write_text("")
    with pytest.raises(LeakageError, match=r"reading: cache_dir='.*/file' cannot be written: Not a directory"):
        check(suites, train, cache_dir=tmp_path / "file")
    with pytest.raises(LeakageError, match="names no shards"):
        check(suites, [])
    with pytest.raises(LeakageError, match="no such shard"):
        check(suites, "nowhere.tar")
    with pytest.raises(LeakageError, match="schema 7"):
        LeakageReport.from_json({"schema": 7})


def test_many_questions_about_one_picture_are_one_decoding(tmp_path, monkeypatch):
    same = encoded(scene(1))
    members = []
    for number in range(20):
        content = {"question": f"q{number}", "answers": ["a"], "question_id": number, "image_id": 1}
        members += [(f"s{number:02d}.json", json.dumps(content).encode()), (f"s{number:02d}.png", same)]
    dataset = ShardDataset(str(tar(tmp_path / "t.tar", members)))
    decoded = []
    original = fingerprints.image_hash
    monkeypatch.setattr(fingerprints, "image_hash", lambda image: decoded.append(1) or original(image))
    ((start, block),) = fingerprints.read_blocks(dataset, rank=0, ranks=1)
    assert (start, len(block), len(block.pixels), len(decoded)) == (0, 20, 20, 1)
    assert len(set(block.ids.tolist())) == 20


def test_forms_of_ids_and_questions():
    coco = {image_key(one) for one in (262148, "000000262148", "val2014/COCO_val2014_000000262148.jpg")}
    assert coco == {"number 262148"}
    others = ["262148", "n262148", "COCO_val2014_000000262148_000000000005.jpg", "VizWiz_val_00262148.jpg"]
    assert len({image_key(one) for one in others} | coco) == 5
    assert image_key("real/a/x.jpg") == image_key("real/a/x.png") != image_key("real/b/x.jpg")
    assert image_key([1, "n2"]) != image_key([1])
    assert image_key(None) == image_key("") == ""
    assert question_text("  Is THIS, a_test?! ") == question_text("is this a test") == "is this a test"
    assert question_text("Ist das schön?") != question_text("Ist das schon?")


def test_random_ids_and_texts_against_comparing_every_pair(tmp_path, monkeypatch):
    """Small ranges, so that everything collides with everything; the rules spelled out, pair by pair."""
    rng = random.Random(3)

    def draw(number: int) -> VqaSample:
        image = rng.choice([None, *range(12), *(f"n{i}" for i in range(6)), "000000000003"])
        extra = {}
        if rng.random() < 0.3:
            extra["original_question_id"] = str(rng.randrange(60))
            if rng.random() < 0.5:
                extra["original_image_id"] = rng.randrange(12)
        text = rng.choice(["Is it {}?", "is IT  {}"]).format(rng.randrange(25))
        return sample(number, None, question_id=rng.randrange(60), image_id=image, question=text, extra=extra)

    train, asked = [draw(i) for i in range(150)], [draw(i) for i in range(400)]
    monkeypatch.setattr(fingerprints, "BLOCK", 64)
    folders = shards(tmp_path / "train", train), shards(tmp_path / "asked", asked, 130)
    (row,) = check([suite("asked", folders[1])], folders[0], examples=400).rows

    def image(one: VqaSample) -> str:
        return image_key(one.extra.get("image_id"))

    def original(one: VqaSample) -> tuple[str, str] | None:
        if "original_question_id" not in one.extra:
            return None
        from_image = image_key(one.extra["original_image_id"]) if "original_image_id" in one.extra else image(one)
        return (one.extra["original_question_id"], from_image) if from_image else None

    def same_question(a: VqaSample, b: VqaSample) -> bool:
        about = [{(one.question_id, image(one)), original(one)} - {None, (one.question_id, "")} for one in (a, b)]
        same_text = question_text(a.question) == question_text(b.question)
        return bool(about[0] & about[1]) or (a.question_id == b.question_id and same_text)

    def same_asked(a: VqaSample, b: VqaSample) -> bool:
        images = []
        for one in (a, b):
            edited = one.extra.get("original_image_id")
            images.append({image(one), image_key(edited)} - {""})
        return question_text(a.question) == question_text(b.question) and bool(images[0] & images[1])

    expected = {}
    for kind, rule in (("question_id", same_question), ("question_and_image", same_asked)):
        hits = {i: [j for j, other in enumerate(train) if rule(one, other)] for i, one in enumerate(asked)}
        expected[kind] = {f"k{i:05d}": f"k{js[0]:05d}" for i, js in hits.items() if js}
        found = {one["suite"]["key"]: one["train"]["key"] for one in row.examples[kind]}
        assert found == expected[kind]
        assert row.matches[kind] == len(found) > 20
    assert row.leaked == len(expected["question_id"].keys() | expected["question_and_image"].keys())
    ids = {one.question_id for one in train}
    collisions = [
        i for i, one in enumerate(asked) if one.question_id in ids and f"k{i:05d}" not in expected["question_id"]
    ]
    assert row.id_collisions == len(collisions) > 20
