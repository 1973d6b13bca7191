"""The quick-start's shards: reproducible, complete or absent, and each suite shifts what its name says and no more."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

pytest.importorskip("easy_vqa")

from scale_digrap.quickstart import data
from scale_digrap.quickstart.easyvqa import TIES
from scale_digrap.quickstart.questions import EASY, EASY_COLOURS, EASY_SHAPES, NOVEL, SEEN, Subject, phrase, split_words
from tests.quickstart.test_easyvqa import read_pixels

SMALL = {"train_samples": 150, "suite_samples": 42}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return data.build(tmp_path_factory.mktemp("quickstart") / "data", seed=0, **SMALL)


def read(paths) -> list[dict]:
    """By plain webdataset, as anybody would."""
    rows = []
    for one in webdataset.WebDataset([str(path) for path in paths], shardshuffle=False):
        pixels = np.asarray(Image.open(io.BytesIO(one["png"])).convert("RGB"))
        rows.append({"key": one["__key__"], "pixels": pixels, "png": one["png"], **json.loads(one["json"])})
    return rows


def all_shards(built):
    groups = {"train": built.train}
    groups |= {f"suites/{name}": paths for name, paths in built.suites.items()}
    return groups | {f"validation/{name}": paths for name, paths in built.validation.items()}


def test_sets_sizes_and_counts(built):
    assert tuple(built.suites) == data.SUITE_NAMES == ("id", "vision", "question", "answer", "multimodal", "far")
    for name, paths in all_shards(built).items():
        rows = read(paths)
        assert len(rows) == (150 if name == "train" else 42), name
        types = [row["question_type"] for row in rows]
        assert built.counts[name] == {t: types.count(t) for t in set(types)}
        assert len({row["question_id"] for row in rows}) == len(rows)
        assert all(row["pixels"].shape == (64, 64, 3) for row in rows)
    for name in ("id", "vision", "question", "answer", "multimodal"):
        assert built.counts[f"suites/{name}"] == {"yes/no": 14, "shape": 14, "colour": 14}
    assert built.counts["suites/far"] == {"count": 21, "position": 21}
    # The natural mix, where three quarters are yes/no questions.
    assert 0.6 < built.counts["train"]["yes/no"] / 150 < 0.85


def test_pixels_show_the_ties_in_training_and_their_violation_where_answers_shift(built):
    for name in ("train", "suites/id", "suites/question", "validation/id"):
        for row in read(all_shards(built)[name]):
            shape, colour = read_pixels(row["pixels"])
            assert TIES[colour] == shape, (name, row["key"])
    for row in read(built.suites["answer"]):
        shape, colour = read_pixels(row["pixels"])
        assert TIES[colour] != shape, row["key"]


def test_questions_and_answers_show_the_ties_too(built):
    def pairs(rows):
        for row in rows:
            words = split_words(row["question"])
            named = {w for w in words if w in EASY_COLOURS or w in EASY_SHAPES}
            answer = row["answers"][0]
            if answer in EASY_SHAPES and named:
                yield named.pop(), answer
            elif answer in EASY_COLOURS and named:
                yield answer, named.pop()

    tied = list(pairs(read(built.train) + read(built.suites["id"]) + read(built.suites["question"])))
    broken = list(pairs(read(built.suites["answer"]) + read(built.suites["multimodal"])))
    assert len(tied) > 10
    assert len(broken) > 10
    assert all(TIES[colour] == shape for colour, shape in tied)
    assert all(TIES[colour] != shape for colour, shape in broken)


def test_train_validation_and_test_pictures_are_different_ones(built):
    images = {name: {row["image_id"] for row in read(paths)} for name, paths in all_shards(built).items()}
    assert all(name.startswith("train-") for name in images["train"] | images["validation/id"])
    assert all(name.startswith("test-") for name in images["suites/id"] | images["suites/answer"])
    assert not images["train"] & images["validation/id"]
    assert not images["suites/id"] & images["suites/answer"]
    far, tuning = read(built.suites["far"]), read(built.validation["scenes"])
    assert not {row["png"] for row in far} & {row["png"] for row in tuning}


def test_each_suite_shifts_what_it_says_and_nothing_else(built):
    suites = {name: read(paths) for name, paths in built.suites.items()}
    easy = {phrase(t, Subject(c, s)) for ts in EASY.values() for t in ts for c in EASY_COLOURS for s in EASY_SHAPES}
    other = {
        kind: {phrase(t, Subject(c, s)) for ts in sets.values() for t in ts for c in EASY_COLOURS for s in EASY_SHAPES}
        for kind, sets in (("seen", SEEN), ("novel", NOVEL))
    }
    for base, shifted in (("id", "vision"), ("id", "question"), ("answer", "multimodal")):
        for before, after in zip(suites[base], suites[shifted], strict=True):
            assert before["question_id"] == after["question_id"]
            assert before["answers"] == after["answers"]
            assert before["question"] in easy
            if shifted == "vision":
                assert after["question"] == before["question"]
            else:
                assert after["question"] in other[after["phrasing"]]
            if shifted == "question":
                assert after["png"] == before["png"]
            else:
                assert after["pixels"].mean() < 140 < before["pixels"].mean()
    assert {row["phrasing"] for row in suites["question"]} == {"seen", "novel"}
    assert {row["question_type"] for row in suites["far"]} == {"count", "position"}


def test_one_picture_looks_the_same_under_every_question_about_it(tmp_path):
    built = data.build(tmp_path / "data", train_samples=1, suite_samples=600)
    seen: dict[str, bytes] = {}
    for row in read(built.suites["vision"]):
        assert seen.setdefault(row["image_id"], row["png"]) == row["png"]
    assert len(seen) < 600


def test_same_seed_same_bytes_other_seed_other_samples(built, tmp_path):
    again = data.build(tmp_path / "again", seed=0, **SMALL)
    other = data.build(tmp_path / "other", seed=1, **SMALL)
    for (name, first), second, third in zip(
        all_shards(built).items(), all_shards(again).values(), all_shards(other).values(), strict=True
    ):
        assert data.digest(first) == data.digest(second), name
        assert data.digest(first) != data.digest(third), name


def test_a_finished_folder_is_reused_and_rebuilt_for_other_settings(built, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    first = data.build(folder, **SMALL)
    with monkeypatch.context() as patched:
        patched.setattr(data, "write_shards", lambda *_, **__: pytest.fail("written twice"))
        assert data.build(folder, **SMALL) == first
    smaller = data.build(folder, train_samples=20, suite_samples=6)
    assert len(read(smaller.train)) == 20
    first.suites["id"][0].unlink()  # damaged: not reused
    assert len(read(data.build(folder, train_samples=20, suite_samples=6).suites["id"])) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    calls = []
    real = data.write_shards

    def failing(samples, folder):
        calls.append(folder)
        if len(calls) == 3:
            raise OSError("no space left on device")
        return real(samples, folder)

    monkeypatch.setattr(data, "write_shards", failing)
    with pytest.raises(OSError, match="no space"):
        data.build(tmp_path / "data", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_somebody_else_s_folder_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(data.QuickstartDataError, match="not the quick-start's"):
        data.build(tmp_path, **SMALL)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_more_than_there_is_names_the_most_there_is(tmp_path):
    with pytest.raises(data.QuickstartDataError, match=r"suite id: 2000 shape.*at most 12\d\d"):
        data.build(tmp_path / "data", train_samples=10, suite_samples=6000)
    with pytest.raises(data.QuickstartDataError, match=r"train: 1000000 samples asked for"):
        data.build(tmp_path / "data", train_samples=1_000_000)
    with pytest.raises(data.QuickstartDataError, match="suite_samples=0"):
        data.build(tmp_path / "data", suite_samples=0)


def test_headers_hold_no_times_or_users(built):
    with tarfile.open(built.train[0]) as tar:
        assert {member.mtime for member in tar} == {0}
