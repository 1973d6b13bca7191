"""Shards: what is written, another library reads; the same samples are the same bytes; failures leave nothing."""

from __future__ import annotations

import io
import json
import tarfile
import time

import numpy as np
import pytest
import webdataset
from PIL import Image

from scale_digrap.data.loader import ShardDataset
from scale_digrap.data.sample import VqaSample
from scale_digrap.data.shards import ShardWriteError, write_shards


def picture(seed: int, size: tuple[int, int] = (9, 7)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def encoded(seed: int, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, kind)
    return buffer.getvalue()


def samples(number: int) -> list[VqaSample]:
    return [
        VqaSample(f"s{i:04d}", picture(i), f"what is number {i}?", [str(i), "ü"], f"q{i}", {"question_type": "count"})
        for i in range(number)
    ]


def test_plain_webdataset_reads_every_field_in_order(tmp_path):
    paths = write_shards(samples(7), tmp_path, samples_per_shard=3)
    assert [path.name for path in paths] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]

    read = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False).decode("rgb8"))
    assert [one["__key__"] for one in read] == [f"s{i:04d}" for i in range(7)]
    for i, one in enumerate(read):
        np.testing.assert_array_equal(one["png"], np.asarray(picture(i)))
        assert one["json"] == {
            "question": f"what is number {i}?",
            "answers": [str(i), "ü"],
            "question_id": f"q{i}",
            "question_type": "count",
        }


def test_the_package_s_own_data_set_gives_the_samples_back(tmp_path):
    written = samples(5)
    written[3].image = None  # text only
    read = ShardDataset([str(path) for path in write_shards(written, tmp_path, samples_per_shard=2)])
    assert len(read) == 5
    for i, sample in enumerate(written):
        one = read[i]
        assert (one.key, one.question, one.answers, one.question_id) == (
            sample.key,
            sample.question,
            sample.answers,
            sample.question_id,
        )
        assert one.extra["question_type"] == "count"
        if sample.image is None:
            assert one.image is None
        else:
            np.testing.assert_array_equal(np.asarray(one.image), np.asarray(sample.image))


def test_same_samples_same_bytes_whenever_they_are_written(tmp_path, monkeypatch):
    first = [path.read_bytes() for path in write_shards(samples(5), tmp_path / "a", samples_per_shard=2)]
    monkeypatch.setattr(time, "time", lambda: 4e9)
    second = [path.read_bytes() for path in write_shards(samples(5), tmp_path / "b", samples_per_shard=2)]
    assert first == second
    with tarfile.open(tmp_path / "a" / "shard-000000.tar") as tar:
        assert {(m.mtime, m.uname, m.gname, m.uid, m.gid) for m in tar} == {(0, "root", "root", 0, 0)}


@pytest.mark.parametrize(("kind", "extension"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
def test_encoded_images_are_stored_untouched(tmp_path, kind, extension):
    data = encoded(1, kind)
    (path,) = write_shards([VqaSample("a", data, "what?", ["x"], "1")], tmp_path)
    with tarfile.open(path) as tar:
        assert tar.extractfile(f"a.{extension}").read() == data
        assert json.loads(tar.extractfile("a.json").read())["answers"] == ["x"]


def test_a_failing_source_leaves_no_shard_behind(tmp_path):
    def source():
        yield from samples(5)
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        write_shards(source(), tmp_path, samples_per_shard=2)
    assert list(tmp_path.iterdir()) == []


def test_shards_of_an_earlier_run_are_not_mixed_with_new_ones(tmp_path):
    write_shards(samples(5), tmp_path, samples_per_shard=1)
    with pytest.raises(ShardWriteError, match="already holds 5 shards"):
        write_shards(samples(2), tmp_path)
    assert len(write_shards(samples(2), tmp_path, prefix="other")) == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (VqaSample("s0000", picture(1), "what?", ["x"], "1"), "'s0000' occurs twice"),
        (VqaSample("a.b", picture(1), "what?", ["x"], "1"), "'a.b'.*dot"),
        (VqaSample("x/_a", picture(1), "what?", ["x"], "1"), "underscore"),
        (VqaSample("a", picture(1), "", ["x"], "1"), "'a' needs a question"),
        (VqaSample("a", picture(1), "what?", [], "1"), "at least one answer"),
        (VqaSample("a", b"GIF89a....", "what?", ["x"], "1"), "neither PNG, JPEG nor WebP"),
        (VqaSample("a", picture(1), "what?", ["x"], "1", {"answers": 3}), r"\['answers'\]"),
    ],
)
def test_samples_that_no_reader_would_understand_are_refused(tmp_path, bad, message):
    with pytest.raises(ShardWriteError, match=message):
        write_shards([*samples(1), bad], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(ShardWriteError, match="no samples"):
        write_shards([], tmp_path)
    with pytest.raises(ShardWriteError, match="samples_per_shard"):
        write_shards(samples(1), tmp_path, samples_per_shard=0)
