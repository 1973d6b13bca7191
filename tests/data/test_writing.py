"""Writing: the same input is the same bytes whoever writes it, a killed writer leaves nothing half, limits hold."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import signal
import tarfile
import time
from pathlib import Path

import pytest
import webdataset

from scale_digrap.data.index import Manifest, index_shards
from scale_digrap.data.sample import VqaSample
from scale_digrap.data.shards import ShardFile, ShardWriteError, encode_sample, write_shards
from scale_digrap.data.sources.records import Source
from scale_digrap.data.sources.vqa import read_vqa
from scale_digrap.data.writing import write_source
from scale_digrap.data.written import WriteOptions
from tests.data.published import jpeg, vqav2

SPAWN = multiprocessing.get_context("spawn")


def vqa(folder: Path, **options) -> Source:
    if not (folder / "images").exists():
        files = vqav2(folder, **options)
        (folder / "files.json").write_text(json.dumps(files))
    files = json.loads((folder / "files.json").read_text())
    return read_vqa([files["questions"]], [files["annotations"]], files["images"])


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}


def keys(folder: Path) -> list[str]:
    shards = sorted(map(str, folder.glob("*.tar")))
    return [one["__key__"] for one in webdataset.WebDataset(shards, shardshuffle=False)]


def test_bytes_are_those_of_webdataset_s_writer(tmp_path):
    samples = [
        VqaSample(f"x/s{i}", jpeg(i), "what?", ["ü"], str(i), more_images=[jpeg(9, kind="PNG")] * (i % 2))
        for i in range(50)
    ]
    (path,) = write_shards(samples, tmp_path)
    reference = io.BytesIO()
    with webdataset.TarWriter(reference, user="root", group="root", mtime=0, encoder=False) as tar:
        for sample in samples:
            tar.write({"__key__": sample.key, **encode_sample(sample)})
    assert path.read_bytes() == reference.getvalue()


def test_the_number_of_processes_does_not_show_in_the_bytes(tmp_path):
    source = vqa(tmp_path, images=12)
    options = WriteOptions(max_count=7, resize=24)
    write_source(source, tmp_path / "one", options)
    write_source(source, tmp_path / "two", options, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 6
    write_source(source, tmp_path / "other", WriteOptions(max_count=7, resize=24, shuffle_seed=1))
    assert contents(tmp_path / "one") != contents(tmp_path / "other")
    assert sorted(keys(tmp_path / "one")) == sorted(keys(tmp_path / "other"))
    assert keys(tmp_path / "one") != sorted(keys(tmp_path / "one"))


def test_the_manifest_is_that_of_an_independent_look_at_the_shards(tmp_path):
    written = write_source(vqa(tmp_path), tmp_path / "out", WriteOptions(max_count=4))
    manifest = Manifest.load(tmp_path / "out" / "manifest.json")
    assert {entry.name: entry.sha256 for entry in manifest.shards} == contents(tmp_path / "out")
    assert [entry.samples for entry in manifest.shards] == [4, 4, 4, 4, 2]
    assert (written.samples, written.records, written.bytes) == (18, 18, sum(e.bytes for e in manifest.shards))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    shards = {f"shard-{i:06d}.tar" for i in range(5)}
    assert names == shards | {f"{name}.idx" for name in shards} | {"manifest.json", "written.json"}
    stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.idx")}
    assert index_shards(sorted((tmp_path / "out").glob("*.tar"))) == manifest
    assert stored == {path: path.stat().st_mtime_ns for path in stored}  # the indexes were taken as they were


@pytest.mark.parametrize("limit", [10240, 20480, 51200])
def test_shards_are_as_large_as_the_limit_allows(tmp_path, limit):
    write_source(vqa(tmp_path), tmp_path / "out", WriteOptions(max_size=limit, shuffle_seed=None))
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert all(path.stat().st_size <= limit for path in shards)
    for first, second in itertools.pairwise(shards):
        with tarfile.open(first) as a, tarfile.open(second) as b:
            end = sum(512 + -(-member.size // 512) * 512 for member in a.getmembers())
            more = sum(512 + -(-member.size // 512) * 512 for member in b.getmembers()[:2])
        assert end + more + 1024 > limit  # the next record would not have fitted
    with pytest.raises(
        ShardWriteError, match=r"record '\d+' alone makes a shard of 10240 bytes, more than max_size 999"
    ):
        write_source(vqa(tmp_path), tmp_path / "small", WriteOptions(max_size=999))


def write_slowly(folder: str, count: int) -> None:
    write_source(vqa(Path(folder), images=count), Path(folder) / "out", WriteOptions(max_count=10, resize=30))


@pytest.mark.parametrize("change", [False, True])
def test_a_killed_writer_goes_on_or_starts_over_and_leaves_no_mixture(tmp_path, change):
    source = vqa(tmp_path, images=120)
    for path in (tmp_path / "images").rglob("*.jpg"):
        path.write_bytes(jpeg(1, (640, 480)))
    process = SPAWN.Process(target=write_slowly, args=(str(tmp_path), 120))
    process.start()
    staging = tmp_path / ".out.writing"
    deadline = time.monotonic() + 60
    while len(list(staging.glob("*.tar"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    assert not (tmp_path / "out").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in sorted(staging.glob("*.tar"))[:-1]}
    assert len(kept) >= 3
    (staging / "shard-999999.tar").write_bytes(b"left by something else")

    options = WriteOptions(max_count=10, resize=30 - change)
    written = write_source(source, tmp_path / "out", options)
    write_source(source, tmp_path / "whole", options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not staging.exists()
    taken_over = {name for name, t in kept.items() if (tmp_path / "out" / name).stat().st_mtime_ns == t}
    assert (written.resumed, taken_over) == ((0, set()) if change else (written.resumed, set(kept)))
    assert written.resumed >= (0 if change else 3)


def test_a_finished_folder_is_not_written_again_and_never_mixed(tmp_path):
    source = vqa(tmp_path)
    first = write_source(source, tmp_path / "out", WriteOptions())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert write_source(source, tmp_path / "out", WriteOptions()) == first
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ShardWriteError, match="other records or with other options"):
        write_source(source, tmp_path / "out", WriteOptions(shuffle_seed=3))
    (tmp_path / "out" / "shard-000000.tar").write_bytes(b"")
    with pytest.raises(ShardWriteError, match="has another size now"):
        write_source(source, tmp_path / "out", WriteOptions())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(ShardWriteError, match="holds files already"):
        write_source(source, tmp_path / "full", WriteOptions())
    (tmp_path / "empty").mkdir()
    assert write_source(source, tmp_path / "empty", WriteOptions()).samples == 18


def test_two_writers_of_one_folder(tmp_path):
    import fcntl

    source = vqa(tmp_path)
    (tmp_path / ".out.writing").mkdir()
    with open(tmp_path / ".out.writing" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ShardWriteError, match="another process is writing"):
            write_source(source, tmp_path / "out", WriteOptions())


def test_missing_pictures_are_an_error_before_any_work_or_are_counted(tmp_path):
    source = vqa(tmp_path)
    pictures = sorted((tmp_path / "images").rglob("*.jpg"))
    pictures[0].unlink()
    pictures[3].unlink()
    with pytest.raises(ShardWriteError, match=r"2 of 6 images do not exist, such as .*; 6 records need them"):
        write_source(source, tmp_path / "out", WriteOptions(allow_missing=1))
    assert not list(tmp_path.glob("*out*"))
    written = write_source(source, tmp_path / "out", WriteOptions(allow_missing=2, max_count=5))
    assert written.samples == len(keys(tmp_path / "out")) == 12
    assert len(written.left_out) == 6
    assert {one["image"] for one in written.left_out} == {str(pictures[0]), str(pictures[3])}
    on_disk = json.loads((tmp_path / "out" / "written.json").read_text())
    assert on_disk["left_out"] == written.left_out
    assert not {one["key"] for one in written.left_out} & set(keys(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["cut", "text", "gif"])
@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_pictures(tmp_path, kind, workers):
    source = vqa(tmp_path)
    picture = sorted((tmp_path / "images").rglob("*.jpg"))[2]
    bad = {"cut": picture.read_bytes()[:-400], "text": b"<html>not found</html>", "gif": jpeg(1, kind="GIF")}[kind]
    picture.write_bytes(bad)
    with pytest.raises(ShardWriteError, match=r"\.jpg: .*record '41\d+'.*missing or unreadable: 1, allowed: 0"):
        write_source(source, tmp_path / "out", WriteOptions(verify=True, max_count=2), workers=workers)
    # The finished shards are taken up, though more is allowed now.
    written = write_source(source, tmp_path / "out", WriteOptions(verify=True, max_count=2, allow_missing=1))
    assert written.samples == 15
    assert len(written.left_out) == 3
    whole = write_source(source, tmp_path / "whole", WriteOptions(verify=True, max_count=2, allow_missing=1))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert written.left_out == whole.left_out
    if kind == "cut":  # is stored as it is where nobody asks: decoding is the loader's part
        assert write_source(source, tmp_path / "unchecked", WriteOptions()).samples == 18
    if kind == "gif":
        assert write_source(source, tmp_path / "converted", WriteOptions(resize=1000)).samples == 18


def test_a_full_disk_is_one_error_and_the_work_is_kept(tmp_path, monkeypatch):
    source, add, calls = vqa(tmp_path), ShardFile.add, []

    def full(self, key, fields):
        calls.append(key)
        if len(calls) == 11:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, key, fields)

    monkeypatch.setattr(ShardFile, "add", full)
    with pytest.raises(ShardWriteError, match=r"No space left on device.*the same command goes on"):
        write_source(source, tmp_path / "out", WriteOptions(max_count=3))
    assert write_source(source, tmp_path / "out", WriteOptions(max_count=3)).resumed == 3
    monkeypatch.undo()
    write_source(source, tmp_path / "whole", WriteOptions(max_count=3))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_read_is_not_a_missing_one(tmp_path, workers):
    source = vqa(tmp_path)
    picture = sorted((tmp_path / "images").rglob("*.jpg"))[2]
    data = picture.read_bytes()
    picture.unlink()
    picture.symlink_to("/proc/self/mem")  # opens, and fails to read
    with pytest.raises(ShardWriteError, match=r"cannot read .*Input/output error"):
        write_source(source, tmp_path / "out", WriteOptions(allow_missing=5, max_count=1), workers=workers)
    picture.unlink()
    picture.write_bytes(data)
    written = write_source(source, tmp_path / "out", WriteOptions(allow_missing=5, max_count=1))
    assert (written.samples, written.left_out) == (18, [])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_count": 0}, "max_count must be at least 1, got 0"),
        ({"resize": -1}, "resize must be at least 1"),
        ({"resize_side": "wide"}, "'shortest' or 'longest', got 'wide'"),
        ({"quality": 101}, "quality"),
        ({"prefix": "a/b"}, "prefix"),
        ({"allow_missing": -1}, "allow_missing"),
    ],
)
def test_options_that_make_no_sense(tmp_path, options, words):
    with pytest.raises(ShardWriteError, match=words):
        write_source(vqa(tmp_path), tmp_path / "out", WriteOptions(**options))
