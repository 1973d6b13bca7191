"""Every kind of damage is found, and repairing keeps good records only: none of them changed, none made of two."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import webdataset

from scale_digrap.data.index import Manifest, index_shards
from scale_digrap.data.repair import repair_shards
from scale_digrap.data.sample import VqaSample
from scale_digrap.data.shards import ShardWriteError, write_shards
from scale_digrap.data.store import ShardStore
from scale_digrap.data.validate import find_shards, validate_shards
from tests.data.damage import IN_RECORDS, STRUCTURAL, members, rewritten
from tests.data.published import jpeg

ALL = {**STRUCTURAL, **IN_RECORDS}
RECORDS = 12


def write(folder: Path, count: int = RECORDS, per_shard: int = 100) -> list[Path]:
    samples = [VqaSample(f"s{i:03d}", jpeg(i), f"what is {i}?", [str(i)], f"q{i}") for i in range(count)]
    return write_shards(samples, folder, samples_per_shard=per_shard)


def look(folder: Path, **options):
    store = ShardStore()
    return validate_shards(find_shards([folder], store), store, **options)


def mend(folder: Path, to: Path, **options):
    store = ShardStore()
    return repair_shards(find_shards([folder], store), store, to, **options)


def read(folder: Path) -> dict[str, tuple[bytes, bytes]]:
    """Key → (image, JSON), by plain webdataset."""
    shards = sorted(map(str, folder.glob("*.tar")))
    found = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert len({one["__key__"] for one in found}) == len(found)
    return {one["__key__"]: (one["jpg"], one["json"]) for one in found}


@pytest.mark.parametrize("kind", list(ALL))
def test_each_kind_of_damage_is_found_without_index_or_manifest(tmp_path, kind):
    first, second = write(tmp_path, 24, 12)
    second.write_bytes(ALL[kind](second.read_bytes()))
    whole, damaged = look(tmp_path)
    assert whole.ok
    assert (whole.records, whole.samples) == (12, 12)
    assert not damaged.ok
    assert damaged.damage
    if kind not in ("empty", "no tar"):
        assert damaged.offset is not None
    assert {path.suffix for path in tmp_path.iterdir()} == {".tar"}  # a look changes nothing
    assert first.name in whole.shard
    assert second.name in damaged.shard


def test_an_index_made_before_the_damage_is_not_trusted(tmp_path):
    (path,) = write(tmp_path)
    data, stat = path.read_bytes(), path.stat()
    index_shards([path])
    assert (tmp_path / "shard-000000.tar.idx").exists()
    path.write_bytes(STRUCTURAL["zeroed header"](data))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert not look(tmp_path)[0].ok


@pytest.mark.parametrize("kind", list(ALL))
def test_repair_keeps_whole_records_only(tmp_path, kind):
    (path,) = write(tmp_path / "in")
    before = read(tmp_path / "in")
    path.write_bytes(ALL[kind](path.read_bytes()))
    after_damage = path.read_bytes()
    if kind in ("empty", "no tar"):
        with pytest.raises(ShardWriteError, match="not one record"):
            mend(tmp_path / "in", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    (repair,) = mend(tmp_path / "in", tmp_path / "out")
    assert path.read_bytes() == after_damage
    kept = read(tmp_path / "out")
    # Nothing but whole records of the original, and every one that does not touch the damage.
    assert all(before[key] == content for key, content in kept.items())
    dropped = {one.key for one in repair.dropped}
    assert not dropped & set(kept)
    assert (repair.kept, repair.whole) == (len(kept), False)
    expected = {
        "cut at a member": range(4),
        "cut at a record": range(4),
        "cut in a header": range(4),
        "cut in data": range(3),
        "cut in the end": range(11),
        "corrupt header": [*range(4), *range(6, 12)],
        "zeroed header": [*range(4), *range(6, 12)],
        "zeroed to the end": range(4),
        "bytes after the end": range(11),
        "a stretch missing": [*range(4), *range(6, 12)],
    }.get(kind, [*range(4), *range(5, 12)])
    assert sorted(kept) == [f"s{i:03d}" for i in expected]
    assert all(report.ok for report in look(tmp_path / "out", decode=True))
    manifest = Manifest.load(tmp_path / "out" / "manifest.json")
    assert manifest.samples == len(kept)
    report = json.loads((tmp_path / "out" / "repaired.json").read_text())
    assert {one["key"] for one in report[0]["dropped"]} == dropped
    assert bool(report[0]["stretches"]) == (kind in STRUCTURAL)


def test_images_that_cannot_be_decoded(tmp_path):
    first, second = write(tmp_path / "in", 24, 12)
    data = second.read_bytes()
    bad = members(data)[4]
    assert bad.name == "s014.jpg"
    second.write_bytes(data[: bad.offset_data] + bytes(bad.size) + data[bad.offset_data + bad.size :])
    assert all(report.ok for report in look(tmp_path / "in"))
    reports = look(tmp_path / "in", decode=True)
    assert [report.ok for report in reports] == [True, False]
    assert [(one.key, one.offset) for one in reports[1].bad] == [("s014", bad.offset)]
    assert "cannot be decoded" in reports[1].bad[0].problem

    repairs = mend(tmp_path / "in", tmp_path / "out")
    assert [(repair.whole, repair.kept) for repair in repairs] == [(True, 12), (False, 11)]
    assert (tmp_path / "out" / first.name).read_bytes() == first.read_bytes()
    assert "s014" not in read(tmp_path / "out")
    assert len(read(tmp_path / "out")) == 23
    assert all(repair.whole for repair in mend(tmp_path / "in", tmp_path / "none", decode=False))
    assert not (tmp_path / "none").exists()


def test_what_the_manifest_says_is_compared(tmp_path):
    paths = write(tmp_path, 24, 8)
    index_shards(paths).save(tmp_path / "manifest.json")
    assert all(report.ok for report in look(tmp_path))
    data = paths[0].read_bytes()
    place = members(data)[0].offset_data + 5
    paths[0].write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    write_shards([VqaSample("x", jpeg(1), "?", ["a"], "x")], tmp_path, prefix="extra")
    paths[2].unlink()
    extra, flipped, whole, missing = look(tmp_path)
    assert whole.ok
    assert "sha256" in flipped.damage
    assert "is not in the manifest.json" in extra.damage
    assert "no such shard" in missing.damage
    assert look(tmp_path, checksums=False)[1].ok


def test_links_long_names_and_processes(tmp_path):
    (path,) = write(tmp_path / "in")
    long = "n" * 150
    data = rewritten(path.read_bytes(), lambda items: [(n.replace("s002", long), c) for n, c in items])
    buffer = io.BytesIO(data)
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        link = tarfile.TarInfo("zz.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        info = tarfile.TarInfo("zz.json")
        content = b'{"question": "?", "answers": ["a"], "question_id": 1}'
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    path.write_bytes(buffer.getvalue())
    (report,) = look(tmp_path / "in", workers=1)
    assert "zz.jpg" in report.damage
    (repair,) = mend(tmp_path / "in", tmp_path / "out", workers=1)
    assert [one.key for one in repair.dropped] == ["zz"]  # not a text-only sample
    assert long in read(tmp_path / "out")
    assert len(read(tmp_path / "out")) == RECORDS


def test_class_numbers_without_a_name(tmp_path):
    (path,) = write(tmp_path)
    data = rewritten(path.read_bytes(), lambda items: [(n.replace("json", "cls"), b"3") for n, _ in items[1::2]])
    path.write_bytes(data)
    manifest = index_shards([path])
    for classes, ok in ((["a", "b", "c", "d"], True), (["a", "b", "c"], False)):
        manifest.classes = classes
        manifest.save(tmp_path / "manifest.json")
        (report,) = look(tmp_path, decode=True)
        assert report.ok == ok
    assert "class 3, but the manifest names 3 classes" in report.bad[0].problem


def test_a_pickle_in_a_shard_is_carried_and_never_run(tmp_path):
    (path,) = write(tmp_path / "in")
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    names = ("s000.pyd", "s000.pth", "s000.pickle", "s000.npy")
    data = rewritten(path.read_bytes(), lambda items: [*items[:2], *((name, bomb) for name in names), *items[2:]])
    path.write_bytes(IN_RECORDS["bad json"](data))
    look(tmp_path / "in", decode=True)
    mend(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_where_repaired_shards_go(tmp_path):
    (path,) = write(tmp_path / "in")
    path.write_bytes(STRUCTURAL["zeroed header"](path.read_bytes()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ShardWriteError, match="holds files already"):
        mend(tmp_path / "in", tmp_path / "in")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert [one.name for one in tmp_path.iterdir()] == ["in"]
