"""Annotation files and folders as they come: pandas' NaN, byte order marks, links, hidden folders, weights."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scale_digrap.cli import main
from scale_digrap.data.dataset import ShardDataset
from scale_digrap.data.decode import ImageDecoder
from scale_digrap.data.encoding import encode_record
from scale_digrap.data.sample import VqaSample
from scale_digrap.data.shards import ShardWriteError, encode_json, write_shards
from scale_digrap.data.sources.gqa import read_gqa
from scale_digrap.data.sources.labelled import read_classes, read_image_folder, read_image_lists
from scale_digrap.data.sources.lavis import read_lavis
from scale_digrap.data.sources.records import Question, Record, to_records
from scale_digrap.data.sources.textvqa import read_textvqa
from scale_digrap.data.sources.vizwiz import read_vizwiz
from scale_digrap.data.sources.vqa import read_vqa
from scale_digrap.data.writing import write_source
from scale_digrap.data.written import WriteOptions
from tests.data import made
from tests.data.damage import members

NAN = math.nan


def file(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def lavis_entry(**changes) -> dict:
    return {"image": None, "question_id": 9000, "question": "Is it red?", "answer": ["yes"], **changes}


def contents(source) -> list[dict]:
    return [json.loads(record.json) for record in source.records]


# Numbers that are none, and numbers for text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"answer": NAN}, "question_id 9000.*its answer is nan"),
        ({"answer": ["yes", NAN]}, "question_id 9000.*its answer is nan"),
        ({"answer": math.inf}, "question_id 9000.*its answer is inf"),
        ({"answer": 2.0}, "question_id 9000.*the number 2.0: write it as text, '2' or '2.0'"),
        ({"answer": None}, "question_id 9000.*no answer"),
        ({"answer": [None]}, "question_id 9000.*no answer"),
        ({"answer": True}, "question_id 9000.*no answer"),
        ({"question": NAN}, "question 9000: its text"),
        ({"score": NAN}, "question 9000: its field 'score' is nan"),
        ({"boxes": [{"x": [1, -math.inf]}]}, "question 9000: its field 'boxes' is -inf"),
        ({"question": "half \ud83d"}, "question 9000: its question holds half a character"),
        ({"answer": ["\udc00"]}, "question 9000: its answer holds half a character"),
        ({"note": "\udc00"}, "question 9000: its field 'note' holds half a character"),
        ({"question": "w " * 100_000}, "question 9000: its question has 200,000 characters"),
        ({"question_id": NAN}, "'question_id' is nan, and must be text or a whole number"),
        ({"question_id": None}, "'question_id' is None"),
        ({"question_id": True}, "'question_id' is True"),
        ({"question_id": 1.5}, "'question_id' is 1.5"),
        ({"image": NAN}, "question_id 9000.*'image' must be a path"),
    ],
)
def test_what_is_no_text_is_refused_with_the_id_of_its_question(tmp_path, changes, words):
    path = file(tmp_path / "a.json", [lavis_entry(question_id=1), lavis_entry(**changes)])
    with pytest.raises(ShardWriteError, match=words):
        read_lavis([path], tmp_path)


def test_whole_numbers_as_answers_and_ids_with_a_decimal_point_are_what_they_mean(tmp_path):
    entries = [lavis_entry(answer=2), lavis_entry(answer=2.5, question_id=7.0), lavis_entry(question_id="7.0")]
    first, second, third = contents(read_lavis([file(tmp_path / "a.json", entries)], tmp_path))
    assert (first["answers"], second["answers"]) == (["2"], ["2.5"])
    assert (second["question_id"], third["question_id"]) == ("7", "7.0")


def test_ids_with_a_decimal_point_find_their_annotation_and_their_picture(tmp_path):
    (tmp_path / "000000000009.jpg").write_bytes(made.jpg(1))
    ask = [{"question_id": 90.0, "image_id": 9, "question": "?"}]
    told = [{"question_id": 90, "image_id": 9.0, "answers": [{"answer": "a"}]}]
    questions, annotations = file(tmp_path / "q.json", ask), file(tmp_path / "a.json", told)
    source = read_vqa([questions], [annotations], tmp_path, only=file(tmp_path / "o.json", [90.0]))
    assert source.records[0].images == (str(tmp_path / "000000000009.jpg"),)
    assert (contents(source)[0]["question_id"], contents(source)[0]["image_id"]) == ("90", 9)


def test_every_source_refuses_nan_with_the_id(tmp_path):
    ten = [{"answer": "a"}] * 9 + [{"answer": NAN}]
    questions = file(tmp_path / "q.json", [{"question_id": 90, "image_id": 9, "question": "?"}])
    with pytest.raises(ShardWriteError, match="question_id 90: its answer is nan"):
        read_vqa([questions], [file(tmp_path / "a.json", [{"question_id": 90, "answers": ten}])], tmp_path)
    text = {"data": [{"question_id": 90, "image_id": "x", "question": "?", "answers": ["a", NAN]}]}
    with pytest.raises(ShardWriteError, match="question_id 90: its answer is nan"):
        read_textvqa([file(tmp_path / "t.json", text)], tmp_path)
    vizwiz = [{"image": "v9.jpg", "question": "?", "answers": ten, "answerable": NAN}]
    with pytest.raises(ShardWriteError, match=r"v9\.jpg: its answer is nan"):
        read_vizwiz([file(tmp_path / "v.json", vizwiz)], tmp_path)
    with pytest.raises(ShardWriteError, match=r"'answerable' of v9\.jpg is nan"):
        read_vizwiz([tmp_path / "v.json"], tmp_path, drop_unanswerable=True)
    gqa = {"90": {"imageId": "1", "question": "?", "answer": NAN}}
    with pytest.raises(ShardWriteError, match="question_id 90 has no answer, or not text: nan"):
        read_gqa([file(tmp_path / "g.json", gqa)], tmp_path)


def test_no_file_is_written_with_numbers_that_json_does_not_have():
    for number in (NAN, math.inf):
        with pytest.raises(ShardWriteError, match="cannot be written as JSON"):
            encode_json({"x": [number]})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"question": "\ud83d"}, "sample 'k': its question holds half a character"),
        ({"answers": ["\ud83d"]}, "sample 'k': its answer holds half a character"),
        ({"extra": {"x": NAN}}, "sample 'k': cannot be written as JSON"),
        ({"extra": {"x": "\ud83d"}}, "sample 'k': cannot be written as JSON"),
        ({"key": "na\udcefve"}, "is not UTF-8"),
    ],
)
def test_a_sample_that_no_loader_takes_is_refused_by_name_and_nothing_is_left(tmp_path, changes, words):
    values = {"key": "k", "image": None, "question": "?", "answers": ["a"], "question_id": "1", "extra": {}, **changes}
    with pytest.raises(ShardWriteError, match=words):
        write_shards([VqaSample(**values)], tmp_path)
    assert not list(tmp_path.iterdir())


# Byte order marks

BOM = b"\xef\xbb\xbf"


def test_a_byte_order_mark_changes_no_name_and_no_file(tmp_path):
    classes = tmp_path / "classes.txt"
    classes.write_bytes(BOM + b"cat\r\ndog\r\n")
    assert read_classes(classes) == ["cat", "dog"]
    lines = tmp_path / "list.txt"
    lines.write_bytes(BOM + b"cat/1.jpg 0\ncat/2.jpg 0\n")
    source = read_image_lists([lines], tmp_path)
    assert [record.images[0] for record in source.records] == [str(tmp_path / f"cat/{i}.jpg") for i in (1, 2)]
    assert source.classes == ["cat"]
    annotations = tmp_path / "a.json"
    annotations.write_bytes(BOM + json.dumps([lavis_entry()]).encode())
    assert contents(read_lavis([annotations], tmp_path))[0]["answers"] == ["yes"]
    for path, read in ((classes, read_classes), (annotations, lambda one: read_lavis([one], tmp_path))):
        path.write_bytes("cat".encode("utf-16"))
        with pytest.raises(ShardWriteError, match="looks like UTF-16"):
            read(path)


# Folders


def test_an_image_folder_is_what_torchvision_finds_without_what_is_hidden(tmp_path, capsys):
    root, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for path, kind in (
        ("cat/1.jpg", "jpeg"),
        ("cat/x.jfif", "jpeg"),
        ("cat/y.jpe", "jpeg"),
        ("cat/deep/z.PNG", "png"),
        ("dog/2.webp", "webp"),
        (".ipynb_checkpoints/1.jpg", "jpeg"),
        ("cat/.ipynb_checkpoints/1-checkpoint.jpg", "jpeg"),
        ("cat/._1.jpg", "jpeg"),
        ("__MACOSX/1.jpg", "jpeg"),
        ("top.jpg", "jpeg"),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        made.picture(1, 8).save(root / path, kind)
    elsewhere.mkdir()
    made.picture(1, 8).save(elsewhere / "9.jpg")
    (root / "cat" / "more").symlink_to(elsewhere)
    (root / "linked").symlink_to(elsewhere)
    (root / "cat" / "loop").symlink_to(root / "cat")
    for name in ("cat/notes.txt", "cat/.DS_Store", "Thumbs.db", "cat/a.heic", "cat/plain"):
        (root / name).write_bytes(b"x")
    source = read_image_folder(root)
    assert source.classes == ["cat", "dog", "linked"]
    found = {Path(record.images[0]).relative_to(root).as_posix(): record.label for record in source.records}
    cats = dict.fromkeys(["cat/1.jpg", "cat/x.jfif", "cat/y.jpe", "cat/deep/z.PNG", "cat/more/9.jpg"], 0)
    assert found == {**cats, "dog/2.webp": 1, "linked/9.jpg": 2}
    notes = "\n".join(source.notes)
    for words in (
        "3 hidden folders, such as .ipynb_checkpoints",
        "3 hidden files, such as Thumbs.db",
        "1 files outside of any class, such as top.jpg",
        "1 files with the extension .txt, such as cat/notes.txt",
        "1 files with the extension .heic",
        "1 files with the extension (none), such as cat/plain",
        "1 links to a folder that they lie in, such as cat/loop",
    ):
        assert words in notes
    assert main(["shards", "write", "image-folder", str(root), "--to", str(tmp_path / "out")]) == 0
    assert "left out: 3 hidden folders" in capsys.readouterr().out
    assert len(ShardDataset(tmp_path / "out")) == 7
    # torchvision's own walk: os.walk with links, files by their extensions. Beyond it only .jfif, .jpe, .jif and .gif.
    (root / "cat" / "loop").unlink()
    extensions = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
    theirs = {
        (Path(folder) / name).relative_to(root).as_posix()
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.lower().endswith(extensions) and Path(folder) != root
    }
    shown = {one for one in theirs if "/." not in f"/{one}" and "__MACOSX" not in one}
    assert shown == {one for one in found if one.lower().endswith(extensions)}


def test_names_that_are_not_utf8_are_said_or_written_as_text(tmp_path):
    (tmp_path / "f" / "cat").mkdir(parents=True)
    made.picture(1, 8).save(tmp_path / "f" / "cat" / "na\udcefve.jpg")
    source = read_image_folder(tmp_path / "f")
    assert contents(source)[0]["image_id"] == "cat/na\\xefve.jpg" or "\\udcef" in contents(source)[0]["image_id"]
    write_source(source, tmp_path / "out", WriteOptions())
    assert ShardDataset(tmp_path / "out")[0].image.size == (8, 8)
    (tmp_path / "f" / "d\udcef").mkdir()
    with pytest.raises(ShardWriteError, match="is not UTF-8: rename it"):
        read_image_folder(tmp_path / "f")


# Weights


@pytest.mark.parametrize("name", ["weight", "weights", "answer_weight"])
@pytest.mark.parametrize("weights", [[0.9, 0.1], [9, 1]])
def test_weights_of_unique_answers_become_ten_answers(tmp_path, name, weights):
    entry = lavis_entry(answer=["yes", "no"], **{name: weights})
    (content,) = contents(read_lavis([file(tmp_path / "a.json", [entry])], tmp_path))
    assert content["answers"] == ["yes"] * 9 + ["no"]
    assert name not in content


@pytest.mark.parametrize(
    "weights", [[0.5], [0.5, 0.6], [0.33, 0.67], [1, -1], [NAN, 1], ["a", "b"], [0.9, 0.1, 0], [20, 1]]
)
def test_weights_that_make_no_ten_answers_are_refused(tmp_path, weights):
    path = file(tmp_path / "a.json", [lavis_entry(answer=["yes", "no"], weight=weights)])
    with pytest.raises(ShardWriteError, match=r"question_id 9000.*'weight' is"):
        read_lavis([path], tmp_path)


def test_a_weight_of_the_whole_entry_is_kept_as_it_is(tmp_path):
    (content,) = contents(read_lavis([file(tmp_path / "a.json", [lavis_entry(weight=0.5)])], tmp_path))
    assert (content["answers"], content["weight"]) == (["yes"], 0.5)


# Metadata of pictures


def segment(marker: int, payload: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + (len(payload) + 2).to_bytes(2, "big") + payload


def with_segment(data: bytes, marker: int, payload: bytes) -> bytes:
    return data[:2] + segment(marker, payload) + data[2:]


def exif(*tags: tuple[int, int, int, bytes], values: bytes = b"") -> bytes:
    import struct

    block = b"Exif\0\0II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags))
    block += b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in tags)
    return block + bytes(4) + values


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    import zlib

    sum_ = zlib.crc32(kind + data) if crc is None else crc
    return len(data).to_bytes(4, "big") + kind + data + sum_.to_bytes(4, "big")


GREEN = Image.new("RGB", (64, 48), (10, 200, 30))
ON_SIDE = (0x0112, 3, 1, b"\6\0\0\0")


def jpeg_with(marker: int, payload: bytes) -> bytes:
    return with_segment(made.encoded(GREEN, "jpeg"), marker, payload)


def png_with(*chunks: bytes) -> bytes:
    data = made.encoded(GREEN, "png")
    return data[:33] + b"".join(chunks) + data[33:]


BAD_RATIONAL = exif(ON_SIDE, (0x011A, 10, 1, b"\x26\0\0\0"), values=b"\xff" * 4 + bytes(4))
BAD_METADATA = {
    "a rational of -1/0": (jpeg_with(0xE1, BAD_RATIONAL), True),
    "EXIF cut off": (jpeg_with(0xE1, exif(ON_SIDE)[:18]), False),
    "EXIF of noise": (jpeg_with(0xE1, b"Exif\0\0" + b"\xff" * 40), False),
    "an orientation in text": (jpeg_with(0xE1, exif((0x0112, 2, 1, b"6\0\0\0"))), False),
    "an orientation of 99": (jpeg_with(0xE1, exif((0x0112, 3, 1, b"\x63\0\0\0"))), False),
    "an orientation of bytes": (jpeg_with(0xE1, exif((0x0112, 7, 1, b"\6\0\0\0"))), False),
    "a colour profile cut off": (jpeg_with(0xE2, b"ICC_PROFILE\0"), False),
    "a colour profile of noise": (jpeg_with(0xE2, b"ICC_PROFILE\0\1\1" + b"x" * 50), False),
    "XMP of noise": (jpeg_with(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x \xff"), False),
    "Adobe's segment cut off": (jpeg_with(0xEE, b"Adobe\0"), False),
    "JFIF cut off": (jpeg_with(0xE0, b"JFIF\0\1"), False),
    "PNG profile, wrong method": (png_with(chunk(b"iCCP", b"x\0\5junk")), False),
    "PNG text, wrong checksum": (png_with(chunk(b"tEXt", b"a\0b", 1)), False),
    "PNG pHYs cut off": (png_with(chunk(b"pHYs", b"\0")), False),
    "PNG gamma cut off": (png_with(chunk(b"gAMA", b"\0")), False),
    "PNG transparency cut off": (png_with(chunk(b"tRNS", b"\0")), False),
    "PNG animation cut off": (png_with(chunk(b"acTL", b"\0")), False),
    "PNG EXIF of noise": (png_with(chunk(b"eXIf", b"II*\0junkjunk")), False),
    "PNG raw profile of noise": (png_with(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 5\nzzzz")), False),
    "WebP EXIF of noise": (made.encoded(GREEN, "webp", exif=b"junkjunk", icc_profile=b"junk"), False),
}


@pytest.mark.parametrize("what", list(BAD_METADATA))
def test_bad_metadata_costs_no_picture_in_reading_verifying_and_resizing(tmp_path, what):
    data, turned = BAD_METADATA[what]
    image = ImageDecoder()(data)
    assert image.size == ((48, 64) if turned else (64, 48))
    assert np.abs(np.asarray(image).astype(int) - (10, 200, 30)).max() < 12
    path = tmp_path / "p"
    path.write_bytes(data)
    record = Record("k", (str(path),), b"{}")
    stored = encode_record(record, WriteOptions(verify=True), frozenset())
    assert isinstance(stored, dict)
    assert data in stored.values()
    smaller = encode_record(record, WriteOptions(resize=24, verify=True), frozenset())
    (reduced,) = [value for name, value in smaller.items() if name != "json"]
    again = ImageDecoder()(reduced)
    assert again.size == ((24, 32) if turned else (32, 24))
    assert np.abs(np.asarray(again).astype(int) - (10, 200, 30)).max() < 12


def test_verify_refuses_what_the_loader_would(tmp_path):
    import zlib

    lines = zlib.compress(b"\0" * 100)
    header = (10_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")
    for data, words in ((bomb, "bomb"), (made.jpg(1)[:200], "cannot be decoded")):
        (tmp_path / "p").write_bytes(data)
        result = encode_record(Record("k", (str(tmp_path / "p"),), b"{}"), WriteOptions(verify=True), frozenset())
        assert words in result.reason


def test_what_no_loader_would_take_is_not_written(tmp_path):
    asked = [
        Question(str(i), ("p.jpg",), {"question": "q" * 90_000, "answers": ["a"], "question_id": str(i)})
        for i in range(190)
    ]
    with pytest.raises(ShardWriteError, match=r"record 'p' of 190 questions: takes .* the limit is 16,777,216"):
        to_records(asked, grouped=True)
    many = VqaSample("k", made.png(1), "?", ["a"], "1", more_images=[made.png(1)] * 1000)
    with pytest.raises(ShardWriteError, match="1001 images in one record; it can hold 1000"):
        write_shards([many], tmp_path / "many")
    with open(tmp_path / "large.jpg", "wb") as stream:
        stream.truncate(3 << 30)
    large = encode_record(Record("k", (str(tmp_path / "large.jpg"),), b"{}"), WriteOptions(), frozenset())
    assert large.reason == "has 3,221,225,472 bytes, the limit is 268,435,456"
    (tmp_path / "p.png").write_bytes(made.encoded(Image.new("L", (8000, 8000)), "png"))
    five = Record("k", (str(tmp_path / "p.png"),) * 5, b"{}")
    assert "320,000,000 pixels together" in encode_record(five, WriteOptions(verify=True), frozenset()).reason


def test_a_shard_that_is_written_is_read_by_the_same_rules(tmp_path):
    """Text at the limits of writing is text at the limits of reading."""
    longest = VqaSample("k", made.png(1), "q" * 100_000, ["a" * 20_000], "1")
    (path,) = write_shards([longest], tmp_path)
    assert ShardDataset(path)[0].answers == longest.answers
    assert len(members(path.read_bytes())) == 2
    assert io.BytesIO(path.read_bytes()).getbuffer().nbytes == path.stat().st_size


def test_a_picture_number_that_no_file_can_have_is_a_missing_picture(tmp_path):
    asked = [{"question_id": 1, "image_id": "x" * 5000, "question": "q"}]
    given = [{"question_id": 1, "image_id": "x" * 5000, "answers": [{"answer": "a"}] * 10}]
    (tmp_path / "q.json").write_text(json.dumps({"data_subtype": "val2014", "questions": asked}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": given}))
    with pytest.raises(ShardWriteError, match="missing"):
        write_source(
            read_vqa([tmp_path / "q.json"], [tmp_path / "a.json"], tmp_path),
            tmp_path / "out",
            WriteOptions(),
            workers=0,
        )


def test_a_label_of_thousands_of_digits_is_named_with_its_line(tmp_path):
    (tmp_path / "list.txt").write_text(f"a/1.png 0\na/2.png {'9' * 5000}\n")
    with pytest.raises(ShardWriteError, match=r"list.txt, line 2: expected 'path label', got 'a/2.png 999") as raised:
        read_image_lists([tmp_path / "list.txt"], tmp_path)
    assert len(str(raised.value)) < 500
