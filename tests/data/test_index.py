"""Indexes and manifests: against webdataset and tarfile, and against every kind of damage."""

import json
import os
import tarfile

import numpy as np
import pytest
import webdataset

from scale_digrap.data.errors import DataError, ShardDamage
from scale_digrap.data.index import Manifest, ShardEntry, index_shards, load_index, scan_shard
from tests.data import made


def record(number, **more):
    return json.dumps(made.meta(number, **more)).encode()


def test_offsets_are_where_webdataset_finds_the_bytes(tmp_path):
    made.write(tmp_path, 25, per_shard=25, text_only={3})
    path = tmp_path / "shard-000000.tar"
    index, data = scan_shard(path), path.read_bytes()
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert list(index.keys) == [sample["__key__"] for sample in theirs]
    assert index.fields == ("json", "png")
    for row, sample in enumerate(theirs):
        for column, name in enumerate(index.fields):
            offset, size = index.spans[row, column].tolist()
            assert (data[offset : offset + size] if size >= 0 else None) == sample.get(name), (row, name)
    assert index.spans[3, 1].tolist() == [-1, -1]
    assert (index.samples, index.size) == (25, len(data))


def test_keys_are_cut_as_webdataset_cuts_them(tmp_path):
    names = [
        "a/b.c/x.JPG",
        "a/b.c/x.json",
        "y.json",
        "y.0.png",
        "y.1.png",
        "with space.json",
        "ünï.json",
        "l" * 150 + ".json",
    ]
    extra = ["__meta__/info.json", "README", ".hidden.json", "__about__"]
    text = ("json", "README", "__about__")
    members = [(name, record(i) if name.endswith(text) else made.png(i)) for i, name in enumerate(extra + names)]
    path = made.tar(tmp_path / "a.tar", members)
    index = scan_shard(path)
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert list(index.keys) == [sample["__key__"] for sample in theirs]
    for row, sample in enumerate(theirs):
        fields = {name for column, name in enumerate(index.fields) if index.spans[row, column, 1] >= 0}
        assert fields == {name for name in sample if not name.startswith("__")}
    assert index.ignored == (("__meta__/info.json", "README", ".hidden.json"), 4)


def test_questions_of_grouped_records_are_counted(tmp_path):
    group = {"questions": [made.meta(i) for i in range(3)], "image_id": 1}
    path = made.tar(tmp_path / "a.tar", [("a.json", json.dumps(group).encode()), ("b.json", record(9))])
    index = scan_shard(path)
    assert index.questions.tolist() == [3, 1]
    assert index.samples == 4


def test_a_shard_without_samples_is_whole(tmp_path):
    made.write(tmp_path, 0)
    index = load_index(tmp_path / "shard-000000.tar")
    again = load_index(tmp_path / "shard-000000.tar")
    assert (index.samples, again.samples, list(again.keys)) == (0, 0, [])


@pytest.mark.parametrize("where", made.DAMAGE)
def test_damage_is_found_and_placed(tmp_path, where):
    made.write(tmp_path, 10)
    path = tmp_path / "shard-000000.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        member = archive.getmembers()[9]
    path.write_bytes(made.damaged(whole, where))
    with pytest.raises(ShardDamage, match=r"shard-000000\.tar, byte") as caught:
        scan_shard(path)
    assert caught.value.shard == str(path)
    if where.startswith(("cut at a", "cut in a", "cut in data", "random", "one bit", "zeroed")):
        assert caught.value.offset == member.offset
    with pytest.raises(ShardDamage):
        load_index(path)
    assert not os.path.exists(f"{path}.idx")


def test_a_cut_anywhere_is_found(tmp_path):
    made.write(tmp_path, 4)
    path = tmp_path / "shard-000000.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512 + 1024  # what follows is padding of the padding
    step = 97
    for size in (*range(0, end, step), end - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ShardDamage):
            scan_shard(path)
    path.write_bytes(whole[:end])
    assert scan_shard(path).samples == 4


PNG = made.png(1)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.json", record(1)), ("b.json", record(2)), ("a.png", PNG)], "'a' do not lie together"),
        ([("a.json", record(1)), ("b.json", record(2)), ("a.json", record(1))], "'a' do not lie together"),
        ([("a.json", record(1)), ("a.JSON", record(1))], r"'a' has two members \.json"),
        ([("a.png", PNG)], r"'a' has no \.json"),
        ([("a.json", record(1)), ("b.png", PNG)], r"'b' has no \.json"),
        ([("img.v1.jpg", PNG), ("img.v2.jpg", PNG)], r"'img' has no \.json"),
        ([(f"a.x{i}", b"") for i in range(70)], "different extensions"),
        ([("a.json", record(1)), ("a.png", PNG), ("a.jpg", PNG)], "more than one image"),
        ([("a.json", record(1)), ("a.png", PNG), ("a.0.jpg", PNG)], "more than one image"),
        ([("a.json", record(1)), ("a.0.png", PNG), ("a.2.jpg", PNG)], r"numbered \[0, 2\]"),
        ([("a.json", b"{")], "'a'.*not valid JSON"),
        ([("a.json", b"[" * 100_000)], "'a'.*nested deeper than 64"),
        ([("a.json", b"[]")], "'a'.*must be an object"),
        ([("a.json", json.dumps({**made.meta(1), "question": 3}).encode())], "'question' has type int"),
        ([("a.json", b'{"question": "q", "answers": ["a"]}')], "lacks 'question_id'"),
        ([("a.json", json.dumps({**made.meta(1), "answers": []}).encode())], "one or more strings"),
        ([("a.json", b'{"questions": []}')], "one or more questions"),
        ([("a.json", b'{"questions": [{"question": "q"}]}')], "question 0.*lacks 'answers'"),
        ([("a.cls", b"x")], "decimal class number"),
    ],
)
def test_records_that_are_not_whole_are_refused(tmp_path, members, words):
    path = made.tar(tmp_path / "a.tar", members)
    with pytest.raises(ShardDamage, match=words) as caught:
        scan_shard(path)
    assert f"{path}, byte" in str(caught.value)


def test_links_and_required_images_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("a.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(ShardDamage, match="a link"):
        scan_shard(path)
    made.tar(path, [("a.json", record(1))])
    assert load_index(path).samples == 1
    with pytest.raises(ShardDamage, match=r"has no \.image"):
        load_index(path, require=("json", "image"))  # not satisfied by the stored index, which did not look


def test_stored_indexes_are_used_until_the_shard_changes(tmp_path, monkeypatch):
    from scale_digrap.data import index as module

    made.write(tmp_path, 10)
    path = tmp_path / "shard-000000.tar"
    scans = []
    monkeypatch.setattr(module, "scan_shard", lambda *a, **k: scans.append(1) or scan_shard(*a, **k))
    first, second = load_index(path), load_index(path)
    assert scans == [1]
    assert np.array_equal(first.spans, second.spans)
    assert (list(first.keys), first.keys[3], first.keys[-1]) == (list(second.keys), second.keys[3], second.keys[-1])
    assert (first.layout, first.fields, first.require) == (second.layout, second.fields, second.require)
    os.utime(path, ns=(0, 0))
    load_index(path)
    assert scans == [1, 1]
    for broken in (b"", b"x", (tmp_path / "shard-000000.tar.idx").read_bytes()[:-5]):
        (tmp_path / "shard-000000.tar.idx").write_bytes(broken)
        assert load_index(path).samples == 10
    assert len(scans) == 5


def test_indexes_of_a_read_only_place_go_to_the_cache(tmp_path, monkeypatch):
    from scale_digrap.data import index as module

    folder, cache = tmp_path / "shards", tmp_path / "cache"
    folder.mkdir()
    made.write(folder, 10)
    made_file = module._replace_file

    def read_only(path, parts):  # a mode would not stop root
        if path.parent == folder:
            raise PermissionError(13, "read-only")
        made_file(path, parts)

    monkeypatch.setattr(module, "_replace_file", read_only)
    load_index(folder / "shard-000000.tar", cache_dir=cache)
    assert os.listdir(folder) == ["shard-000000.tar"]
    assert [name[16:] for name in os.listdir(cache)] == ["-shard-000000.tar.idx"]
    monkeypatch.setattr(module, "scan_shard", None)
    assert load_index(folder / "shard-000000.tar", cache_dir=cache).samples == 10


@pytest.mark.parametrize("workers", [0, 2])
def test_a_manifest_describes_the_set(tmp_path, workers):
    import hashlib

    made.write(tmp_path, 25)
    paths = sorted(tmp_path.glob("*.tar"))
    manifest = index_shards(paths, workers=workers)
    assert [(e.name, e.bytes, e.samples, e.sha256) for e in manifest.shards] == [
        (p.name, p.stat().st_size, n, hashlib.sha256(p.read_bytes()).hexdigest())
        for p, n in zip(paths, (10, 10, 5), strict=True)
    ]
    manifest.classes = ["ä", "b"]
    manifest.save(tmp_path / "manifest.json")
    assert Manifest.load(tmp_path / "manifest.json") == manifest
    paths[1].write_bytes(made.damaged(paths[1].read_bytes(), "zeroed kilobyte"))
    with pytest.raises(ShardDamage, match=r"shard-000001\.tar"):
        index_shards(paths, workers=workers)


def test_indexing_again_reads_only_what_is_new(tmp_path, monkeypatch):
    import builtins

    made.write(tmp_path, 30)
    paths = sorted(tmp_path.glob("*.tar"))
    first = index_shards(paths[:2])
    opened = []
    monkeypatch.setattr(builtins, "open", lambda p, *a, _open=open, **k: opened.append(str(p)) or _open(p, *a, **k))
    second = index_shards(paths)
    assert second.shards[:2] == first.shards
    assert {name for name in opened if name.endswith(".tar")} == {str(paths[2])}


def test_manifests_that_make_no_sense_are_refused(tmp_path):
    (tmp_path / "b").mkdir()
    made.write(tmp_path, 10)
    made.write(tmp_path / "b", 10)
    one, two = tmp_path / "shard-000000.tar", tmp_path / "b" / "shard-000000.tar"
    with pytest.raises(DataError, match="have the same name"):
        index_shards([one, two])
    (tmp_path / "b" / "copy.tar").write_bytes(one.read_bytes())
    with pytest.raises(DataError, match=r"shard-000000\.tar and copy\.tar hold the same samples"):
        index_shards([one, tmp_path / "b" / "copy.tar"])
    path = tmp_path / "manifest.json"
    for text, words in (
        ("", "is not a manifest"),
        ("[]", "is not a manifest"),
        ('{"version": 7, "shards": []}', "version 7, expected 1"),
        ('{"version": 1, "shards": [{"name": "a"}]}', "is not a manifest"),
        ('{"version": 1, "shards": [{"name": "a", "bytes": -1, "samples": 1, "sha256": ""}]}', "no valid name"),
        ('{"version": 1, "shards": [], "classes": [1]}', "list of names"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            Manifest.load(path)
    with pytest.raises(DataError, match="cannot read"):
        Manifest.load(tmp_path / "none.json")
    Manifest(shards=[ShardEntry("a", 1, 1, "")]).save(path)
    values = json.loads(path.read_text())
    values["shards"][0]["from a later version"] = 1
    path.write_text(json.dumps(values))
    assert Manifest.load(path).samples == 1
