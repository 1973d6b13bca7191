"""Shards as people make them: pictures under other names, sidecars, other packers, text and sizes that cannot be.

Whatever is found is said the same way by `validate`, `repair`, the index and the data set.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scale_digrap.data.dataset import ShardDataset
from scale_digrap.data.decode import ImageDecoder
from scale_digrap.data.describe import peek
from scale_digrap.data.errors import DataError, SampleError, ShardDamage
from scale_digrap.data.evaluation import EvalLoader
from scale_digrap.data.faults import BadSample, BadSampleLog
from scale_digrap.data.index import index_shards, load_index, scan_shard
from scale_digrap.data.loader import TrainLoader
from scale_digrap.data.repair import repair_shards
from scale_digrap.data.shards import ShardWriteError
from scale_digrap.data.store import ShardStore
from scale_digrap.data.validate import find_shards, validate_shards
from tests.data import made

RED = Image.new("RGB", (32, 24), (200, 30, 30))


def picture(kind: str) -> bytes:
    return made.encoded(RED, kind, **({"lossless": True} if kind == "WEBP" else {}))


JPEG = picture("JPEG")


def question(number: int, **more) -> bytes:
    return json.dumps({**made.meta(number), **more}).encode()


def look(path: Path, **options):
    store = ShardStore()
    return validate_shards(find_shards([path], store), store, **options)


def mend(path: Path, to: Path, **options):
    store = ShardStore()
    return repair_shards(find_shards([path], store), store, to, **options)


# Pictures under other names


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jpe", "JPEG"),
        ("a.jfif", "JPEG"),
        ("a.JPG", "JPEG"),
        ("a.PNG", "PNG"),
        ("a.left.jpg", "JPEG"),
        ("a.image.png", "PNG"),
        ("a.img", "JPEG"),
        ("a.image", "WEBP"),
        ("a.picture", "PNG"),
        ("a.tif", "JPEG"),
        ("a.0.jpe", "JPEG"),
    ],
)
def test_a_picture_is_read_under_every_name_that_says_so(tmp_path, name, kind):
    path = made.tar(tmp_path / "s.tar", [(name, picture(kind)), ("a.json", question(1))])
    (sample,) = list(ShardDataset(path))
    assert sample.image is not None
    assert sample.image.size == (32, 24)
    assert np.abs(np.asarray(sample.image).astype(int) - np.asarray(RED).astype(int)).max() < 8
    assert look(path, decode=True)[0].ok
    ((seen, _),) = peek(find_shards([path], ShardStore()), ShardStore())
    assert [(one["width"], one["height"]) for one in seen.images] == [(32, 24)]


UNREAD = {
    "a.gif": (picture("GIF"), r"\.gif is a GIF picture"),
    "a.bmp": (picture("BMP"), r"\.bmp is a BMP picture"),
    "a.tif": (picture("TIFF"), r"\.tif is a TIFF picture"),
    "a.tiff": (picture("TIFF"), r"\.tiff is a TIFF picture"),
    "a.ppm": (picture("PPM"), r"\.ppm is a PNM picture"),
    "a.avif": (b"\0\0\0\x1cftypavif" + bytes(40), r"\.avif is a AVIF picture"),
    "a.heic": (b"\0\0\0\x1cftypheic" + bytes(40), r"\.heic is a HEIF picture"),
    "a.img": (bytes(100), r"\.img is no picture in a known format"),
    "a.bin": (JPEG, r"\.bin is a JPEG picture under a name that is not read"),
    "a.left": (picture("PNG"), r"\.left is a PNG picture under a name that is not read"),
    "a.data": (picture("WEBP"), r"\.data is a WebP picture under a name that is not read"),
    "a.dat": (picture("GIF"), r"\.dat is a GIF picture under a name"),
    "a": (JPEG, "member 'a' is a JPEG picture without an extension"),
    "dir/a": (JPEG, "member 'dir/a' is a JPEG picture without an extension"),
}


@pytest.mark.parametrize("name", list(UNREAD))
def test_a_picture_that_no_loader_reads_is_an_error_everywhere_not_a_question_without_a_picture(tmp_path, name):
    data, words = UNREAD[name]
    key = "dir/a" if "/" in name else "a"
    (tmp_path / "in").mkdir()
    members = [("0.jpg", JPEG), ("0.json", question(0)), (name, data), (f"{key}.json", question(1))]
    path = made.tar(tmp_path / "in" / "s.tar", members)
    with pytest.raises(ShardDamage, match=words):
        scan_shard(path)
    with pytest.raises(ShardDamage, match=words):
        index_shards([path])
    with pytest.raises(ShardDamage, match=words):
        TrainLoader(path, batch_size=1, collate=list)
    with pytest.raises(ShardDamage, match=words):
        EvalLoader(path, batch_size=1, collate=list)
    (report,) = look(path)
    assert not report.ok
    (repaired,) = mend(path, tmp_path / "out")
    assert (repaired.kept, {one.key for one in repaired.dropped}) == (1, {key})
    assert [sample.key for sample in ShardDataset(tmp_path / "out")] == ["0"]


def test_several_pictures_of_one_record_are_named_unless_they_are_numbered(tmp_path):
    both = [(f"{key}.{side}.jpg", JPEG) for key in "a" for side in ("left", "right")]
    path = made.tar(tmp_path / "s.tar", [*both, ("a.json", question(1))])
    with pytest.raises(ShardDamage, match=r"more than one image: left\.jpg, right\.jpg; name them \.0\.jpg, \.1\.jpg"):
        scan_shard(path)
    mask = made.tar(tmp_path / "m.tar", [("a.jpg", JPEG), ("a.seg.png", picture("PNG")), ("a.json", question(1))])
    with pytest.raises(ShardDamage, match=r"more than one image: jpg, seg\.png"):
        scan_shard(mask)
    numbered = [("a.1.jfif", JPEG), ("a.0.png", picture("PNG")), ("a.json", question(1))]
    assert len(ShardDataset(made.tar(tmp_path / "n.tar", numbered))[0].images) == 2


def test_pictures_that_are_not_read_are_counted_over_the_shard(tmp_path):
    members = [
        (f"{i}.{kind}", data) for i in range(5) for kind, data in (("gif", picture("GIF")), ("json", question(i)))
    ]
    path = made.tar(tmp_path / "s.tar", [*members, ("x.left", JPEG), ("x.json", question(9))])
    (report,) = look(path)
    assert "sample '0': its .gif" in report.damage
    assert report.damage.endswith("in this shard: .gif in 5 records, .left in 1 records")


def test_members_that_nothing_reads_are_said_and_never_run(tmp_path, caplog):
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    others = [(f"a.{kind}", bomb) for kind in ("npy", "pyd", "pkl", "pth", "txt")]
    path = made.tar(tmp_path / "s.tar", [("a.jpg", JPEG), ("a.json", question(1)), *others])
    (report,) = look(path, decode=True)
    assert report.ok
    (note,) = report.notes
    for kind in ("npy", "pyd", "pkl", "pth", "txt"):
        assert f".{kind} (1 records)" in note
    with caplog.at_level(logging.WARNING):
        data = ShardDataset(path)
        assert data[0].image is not None
        assert data[0].question == "number 1"
    assert caplog.text.count("members that are not read: .npy, .pkl, .pth, .pyd, .txt") == 1
    assert not (tmp_path / "ran").exists()


def test_an_index_from_before_these_rules_is_made_anew(tmp_path):
    path = made.tar(tmp_path / "s.tar", [("a.jpg", JPEG), ("a.json", question(1))])
    load_index(path)
    stored = Path(f"{path}.idx")
    old = stored.read_bytes().replace(b'"rules": ', b'"older": ')
    assert old != stored.read_bytes()
    stored.write_bytes(old)
    load_index(path)
    assert b'"rules": ' in stored.read_bytes()


# Sidecars

SIDECAR = b"\x00\x05\x16\x07" + bytes(200)


@pytest.mark.parametrize(
    "sidecars",
    [
        ["train/._0.jpg", "train/._0.json", "train/._1.json"],
        ["train/.DS_Store", "._train", ".DS_Store"],
        ["__MACOSX/train/._0.jpg", "__MACOSX/._train"],
        ["train/Thumbs.db", "train/desktop.ini", "Thumbs.db"],
        ["./train/._0.jpg", "train/.hidden.json", "train/.hidden.jpg"],
    ],
)
def test_sidecars_below_a_folder_are_left_out_and_counted(tmp_path, sidecars):
    records = [(f"train/{i}.{kind}", data) for i in range(2) for kind, data in (("jpg", JPEG), ("json", question(i)))]
    members = []
    for number, record in enumerate(records):  # between the members of a record too
        members += [(name, SIDECAR) for name in sidecars[number : number + 1]] + [record]
    (tmp_path / "in").mkdir()
    path = made.tar(tmp_path / "in" / "s.tar", members)
    index = scan_shard(path)
    assert (list(index.keys), index.fields) == (["train/0", "train/1"], ("json", "jpg"))
    assert index.ignored == (tuple(sidecars[:3]), len(sidecars))
    assert [sample.image.size for sample in ShardDataset(path)] == [(32, 24)] * 2
    (report,) = look(path, decode=True)
    assert report.ok
    assert f"{len(sidecars)} members belong to no sample" in report.notes[0]
    assert mend(tmp_path / "in", tmp_path / "none")[0].whole
    # Where something else is wrong, repairing keeps the good records.
    made.tar(path, [*members, ("train/2.jpg", JPEG)])
    (repaired,) = mend(tmp_path / "in", tmp_path / "out")
    assert (repaired.kept, [one.key for one in repaired.dropped]) == (2, ["train/2"])


def test_a_sidecar_beside_shards_is_no_shard(tmp_path):
    made.write(tmp_path, 3)
    (tmp_path / "._shard-000000.tar").write_bytes(SIDECAR)
    (report,) = look(tmp_path)
    assert (report.ok, report.samples) == (True, 3)


# Other packers


def test_a_compressed_shard_is_refused_for_what_it_is(tmp_path):
    whole = made.tar(tmp_path / "w.tar", [("a.json", question(1))]).read_bytes()
    for name, data, words in (
        ("gz", gzip.compress(whole), r"is compressed \(gzip\).*gunzip"),
        ("zst", b"\x28\xb5\x2f\xfd" + bytes(600), r"is compressed \(zstd\)"),
        ("html", b"<!DOCTYPE html>" + b" " * 600, "a web page"),
        ("zip", b"PK\x03\x04" + bytes(600), "a zip archive"),
        ("lfs", b"version https://git-lfs.github.com/spec/v1\n" + b"oid sha256:0\n" * 50, "Git LFS pointer"),
    ):
        path = tmp_path / f"{name}.tar"
        path.write_bytes(data)
        with pytest.raises(ShardDamage, match=words):
            scan_shard(path)


def test_members_out_of_order_and_dots_in_keys_are_refused_with_the_reason_and_the_fix(tmp_path):
    apart = [(f"{i}.jpg", JPEG) for i in range(3)] + [(f"{i}.json", question(i)) for i in range(3)]
    path = made.tar(tmp_path / "o.tar", apart)
    with pytest.raises(ShardDamage, match=r"members of key '0' do not lie together: '0\.json'.*--sort=name"):
        scan_shard(path)
    dots = [(f"22.{i:02d}.{kind}", data) for i in (5, 6) for kind, data in (("jpg", JPEG), ("json", question(i)))]
    path = made.tar(tmp_path / "d.tar", dots)
    with pytest.raises(ShardDamage, match=r"no \.json, but \.05\.json: a key ends at the first dot.*Replace the other"):
        scan_shard(path)


# Text

LONE = b'{"question": "x \\ud83d y", "answers": ["y"], "question_id": 1}'


def in_answer(answer: str) -> bytes:
    return json.dumps({"question": "?", "answers": ["no", answer], "question_id": 1}).encode()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LONE, "its question holds half a character"),
        (in_answer("\udc80"), "its answer holds half a character"),
        (json.dumps({**made.meta(1), "question_id": "\ud800"}).encode(), "its question_id holds half a character"),
        (
            json.dumps({**made.meta(1), "question": "word " * 500_000}).encode(),
            "2,500,000 characters, the limit is 100,000",
        ),
        (in_answer("a" * 20_001), "its answer has 20,001 characters, the limit is 20,000"),
        (json.dumps({**made.meta(1), "answers": ["a"] * 10_001}).encode(), "10,001 answers, the limit is 10,000"),
        (json.dumps({"questions": [made.meta(0), json.loads(LONE)]}).encode(), "holds half a character"),
    ],
)
def test_text_that_cannot_be_used_is_a_bad_sample_like_a_picture_that_cannot(tmp_path, text, words):
    (tmp_path / "in").mkdir()
    path = made.tar(
        tmp_path / "in" / "s.tar", [("a.jpg", JPEG), ("a.json", text), ("b.jpg", JPEG), ("b.json", question(2))]
    )
    data = ShardDataset(path)
    with pytest.raises(SampleError, match=f"sample 'a.*{words}"):
        [data[0], data[1]]
    (report,) = look(path)
    assert [one.key for one in report.bad] == ["a"]
    assert words in report.bad[0].problem
    loader = TrainLoader(path, batch_size=2, collate=lambda samples: [sample.key for sample in samples])
    batch = next(iter(loader))
    assert len(batch) == 2
    assert "a" not in batch
    batches = list(EvalLoader(path, batch_size=8, collate=len))
    assert [(error.key[0], words in error.reason) for batch in batches for error in batch.errors] == [("a", True)]
    (repaired,) = mend(tmp_path / "in", tmp_path / "out")
    assert [one.key for one in repaired.dropped] == ["a"]
    json.loads((tmp_path / "out" / "repaired.json").read_bytes().decode("utf-8"))


def test_a_key_that_is_not_utf8_beside_a_bad_picture_is_named_in_every_file(tmp_path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "s.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        members = (
            ("na\xefve.jpg", JPEG[:200]),
            ("na\xefve.json", question(1)),
            ("ok.jpg", JPEG),
            ("ok.json", question(2)),
        )
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    log = BadSampleLog(tmp_path / "bad.jsonl")
    (report,) = look(path, decode=True)
    log.write([BadSample(0, str(path), report.bad[0].key, report.bad[0].problem)])
    assert json.loads((tmp_path / "bad.jsonl").read_text("utf-8"))["key"] == "na\udcefve"
    (repaired,) = mend(tmp_path / "in", tmp_path / "out")
    assert repaired.kept == 1
    assert json.loads((tmp_path / "out" / "repaired.json").read_text("utf-8"))[0]["dropped"][0]["key"] == "na\udcefve"


def test_validate_counts_text_that_models_take_for_a_signal(tmp_path):
    texts = ["what is <image> here?", "an <|im_end|> and", "</s>", "is a < b > c?", "<b>bold</b>"]
    members = [(f"{i}.json", question(i, question=text)) for i, text in enumerate(texts)]
    (report,) = look(made.tar(tmp_path / "s.tar", members))
    assert report.ok
    assert report.notes == [
        "3 records hold text that models take for a signal, such as '<image>' in sample '0': it is read as plain text"
    ]


def test_numbers_that_json_does_not_have_are_refused(tmp_path):
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        text = b'{"question": "?", "answers": ["a"], "question_id": 1, "score": %s}' % number.encode()
        with pytest.raises(ShardDamage, match="not a finite number"):
            scan_shard(made.tar(tmp_path / "s.tar", [("a.json", text)]))


def test_a_byte_order_mark_before_json_is_no_damage(tmp_path):
    path = made.tar(tmp_path / "s.tar", [("a.json", b"\xef\xbb\xbf" + question(7))])
    assert ShardDataset(path)[0].question_id == "7"


# Sizes


def sparse(path: Path, name: str, size: int) -> Path:
    """A shard on almost no disk with a member of `size` zeros, and a whole record after it."""
    with open(path, "wb") as file:
        for member, content in ((name, size), ("b.json", question(1))):
            info = tarfile.TarInfo(member)
            info.size = content if isinstance(content, int) else len(content)
            file.write(info.tobuf())
            if isinstance(content, int):
                file.seek(-(-content // 512) * 512, os.SEEK_CUR)
            else:
                file.write(content.ljust(-(-len(content) // 512) * 512, b"\0"))
        file.write(bytes(10240))
    return path


LOOK = """
import resource, sys
from pathlib import Path
from scale_digrap.data.errors import DataError
from scale_digrap.data.repair import repair_shards
from scale_digrap.data.scan import scan_shard
from scale_digrap.data.store import ShardStore
from scale_digrap.data.validate import find_shards, validate_shards
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (400 << 20),) * 2)
store = ShardStore()
for report in validate_shards(find_shards([sys.argv[1]], store), store, decode=True):
    print(report.damage, [one.problem for one in report.bad])
for repair in repair_shards(find_shards([sys.argv[1]], store), store, sys.argv[2]):
    print(repair.kept, [one.problem for one in repair.dropped])
"""


@pytest.mark.parametrize(("name", "limit"), [("a.json", "16,777,216"), ("a.cls", "64"), ("a.jpg", "268,435,456")])
def test_a_member_of_gigabytes_is_refused_before_memory_is_taken(tmp_path, name, limit):
    path = sparse(tmp_path / "s.tar", name, 3 << 30)
    if name == "a.jpg":
        path = sparse(tmp_path / "s.tar", "b.jpg", 3 << 30)
        name = "b.jpg"
    command = [sys.executable, "-c", LOOK, str(path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    field = name.partition(".")[2]
    assert f"its .{field} has 3,221,225,472 bytes, the limit is {limit}" in done.stdout, done.stderr
    if field != "jpg":
        assert done.returncode == 0, done.stderr
        assert "1 [" in done.stdout  # the good record is kept
    assert "Memory" not in done.stderr


def test_a_header_that_claims_gigabytes_is_refused(tmp_path):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 3 << 30
    path = tmp_path / "s.tar"
    path.write_bytes(info.tobuf() + bytes(20480))
    with pytest.raises(ShardDamage, match="a header of 3221225472 bytes"):
        scan_shard(path)
    many = tarfile.TarInfo("././@LongLink")
    many.type, many.size = tarfile.GNUTYPE_LONGNAME, 2
    path.write_bytes((many.tobuf() + b"x\0".ljust(512, b"\0")) * 5000 + bytes(10240))
    with pytest.raises(ShardDamage):
        scan_shard(path)


def test_json_that_is_nested_without_end_is_refused(tmp_path):
    deep = b'{"question": "?", "answers": ["a"], "question_id": 1, "x": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    with pytest.raises(ShardDamage, match="nested deeper than 64 levels"):
        scan_shard(made.tar(tmp_path / "s.tar", [("a.json", deep)]))


def test_many_large_pictures_of_one_record_are_refused_together(tmp_path):
    large = made.encoded(Image.new("L", (8000, 8000)), "png")  # 64 Mpx in a few kilobytes
    members = [(f"a.{i}.png", large) for i in range(5)]
    path = made.tar(tmp_path / "s.tar", [*members, ("a.json", question(1))])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        SampleError, match=r"its 5 images have 320,000,000 pixels together, more than max_record_pixels"
    ):
        ShardDataset(path)[0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    small = ShardDataset(path, decoder=ImageDecoder(max_record_pixels=10))
    with pytest.raises(SampleError, match="max_record_pixels=10"):
        small[0]


@pytest.mark.parametrize("samples", [2, 4, 10**6, 10**18, 10**40])
def test_wrong_counts_in_a_manifest_are_one_clear_error(tmp_path, samples):
    path = made.tar(tmp_path / "s.tar", [(f"{i}.json", question(i)) for i in range(3)])
    manifest = index_shards([path])
    manifest.save(tmp_path / "manifest.json")
    content = json.loads((tmp_path / "manifest.json").read_text())
    content["shards"][0]["samples"] = samples
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"s\.tar.*(has 3 samples, its manifest says|which cannot be)|manifest"):
        next(iter(TrainLoader(tmp_path, batch_size=1, collate=list)))


def test_nothing_good_is_said_as_such(tmp_path):
    path = made.tar(tmp_path / "s.tar", [("a.gif", picture("GIF")), ("a.json", question(1))])
    with pytest.raises(ShardWriteError, match=r"not one record .*s\.tar, 'a': its \.gif is a GIF picture"):
        mend(path, tmp_path / "out")
