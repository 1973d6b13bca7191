"""Stores: names and patterns, local shards, fsspec, commands."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time

import fsspec
import pytest

from scale_digrap.data.errors import DataError
from scale_digrap.data.index import ShardEntry
from scale_digrap.data.store import ShardStore
from scale_digrap.data.streams import FetchError
from scale_digrap.data.urls import cache_name, show
from tests.data.remote import MIB, content, entry, store


def test_fsspec_file_systems(tmp_path):
    system = fsspec.filesystem("memory")
    data = content(1, 3 * MIB)
    for name in ("a-0.tar", "a-1.tar"):
        system.pipe(f"/bucket/{name}", data)
    shards = store(tmp_path)
    assert shards.expand("memory://bucket/a-*.tar") == ["memory:///bucket/a-0.tar", "memory:///bucket/a-1.tar"]
    assert shards.expand("memory://bucket/a-{0..1}.tar") == [f"memory://bucket/a-{i}.tar" for i in range(2)]
    assert shards.path("memory://bucket/a-0.tar", entry("a-0.tar", data)).read_bytes() == data
    with pytest.raises(FetchError, match="no such object"):
        shards.path("memory://bucket/none.tar")
    with pytest.raises(DataError, match="no object matches"):
        shards.expand("memory://bucket/b-*.tar")
    with pytest.raises(FetchError, match="nosuch"):
        shards.path("nosuch://bucket/a.tar")


def test_a_hanging_file_system_is_an_error_in_time(tmp_path, monkeypatch):
    system = fsspec.filesystem("memory")
    system.pipe("/bucket/slow.tar", b"x" * 1000)
    monkeypatch.setattr(type(system), "info", lambda *_: time.sleep(30))
    start = time.monotonic()
    with pytest.raises(FetchError, match=r"stalled: no data for 0\.2 s"):
        store(tmp_path, timeout_s=0.2).path("memory://bucket/slow.tar")
    assert time.monotonic() - start < 5


def test_an_unfinished_copy_from_fsspec_is_resumed_only_for_the_same_version(tmp_path, monkeypatch):
    system = fsspec.filesystem("memory")
    data = content(1, 3 * MIB)
    system.pipe("/bucket/a.tar", data)
    from fsspec.implementations.memory import MemoryFile

    real, calls = MemoryFile.read, []

    def failing(self, size=-1):
        calls.append(self.tell())
        if len(calls) == 2:
            raise OSError("connection reset")
        return real(self, size)

    monkeypatch.setattr(MemoryFile, "read", failing)
    assert store(tmp_path).path("memory://bucket/a.tar").read_bytes() == data
    assert calls[:3] == [0, MIB, MIB]


def test_commands_run_only_where_allowed(tmp_path):
    url = f"pipe:echo ran >> {tmp_path}/ran; cat {tmp_path}/source"
    (tmp_path / "source").write_bytes(b"x" * 5000)
    for refused in (lambda: store(tmp_path / "c").path(url), lambda: store(tmp_path / "c").expand([url])):
        with pytest.raises(DataError, match="refused") as raised:
            refused()
        assert str(tmp_path) not in str(raised.value)
    assert not (tmp_path / "ran").exists()
    allowed = store(tmp_path / "c", allow_pipe=True)
    assert allowed.expand([url]) == [url]
    assert allowed.path(url).read_bytes() == b"x" * 5000
    with pytest.raises(FetchError, match="exit status 3"):
        allowed.path("pipe:echo half; exit 3")
    start = time.monotonic()
    with pytest.raises(FetchError, match="stalled"):
        allowed.path(f"pipe:echo $$ > {tmp_path}/pid; sleep 30")
    assert time.monotonic() - start < 6
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_local_shards_are_read_where_they_lie(tmp_path, monkeypatch):
    data = content(1, 1000)
    for i in range(3):
        (tmp_path / f"a-{i}.tar").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    shards = ShardStore()
    assert shards.expand("a-{0..2}.tar") == shards.expand(["a-*.tar"]) == ["a-0.tar", "a-1.tar", "a-2.tar"]
    assert shards.expand(str(tmp_path)) == [str(tmp_path / f"a-{i}.tar") for i in range(3)]
    assert shards.path(f"file://{tmp_path}/a-1.tar", entry("a-1.tar", data)) == tmp_path / "a-1.tar"
    for wrong, words in (
        ([], "no shards given"),
        ("b-*.tar", "no file matches"),
        ("a-{0..9}.tar", "no such shard: a-3.tar, a-4.tar, a-5.tar and 4 more"),
        (["a-0.tar", "a-*.tar"], "'a-0.tar' is listed twice"),
        ("http://host/a.tar", "set cache_dir"),
        (str(tmp_path / "empty"), "holds neither"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=words):
            shards.expand(wrong)
    with pytest.raises(DataError, match="1000 bytes, the manifest says 1001"):
        shards.path("a-0.tar", entry("a-0.tar", data + b"x"))
    with pytest.raises(DataError, match="a web server cannot be asked"):
        store(tmp_path / "c").expand("http://host/a-*.tar")


def test_a_folder_is_its_manifest(tmp_path):
    from scale_digrap.data.index import Manifest

    for i in range(3):
        (tmp_path / f"a-{i}.tar").write_bytes(b"x")
    Manifest(1, [ShardEntry(f"a-{i}.tar", 1, 1, "0" * 64) for i in (2, 0)], None).save(tmp_path / "manifest.json")
    assert ShardStore().expand(tmp_path) == [str(tmp_path / "a-2.tar"), str(tmp_path / "a-0.tar")]


def test_a_store_is_pickled_without_its_locks(tmp_path):
    shards = pickle.loads(pickle.dumps(store(tmp_path, max_bytes=10**6, headers={"A": "b"})))
    assert (shards.cache.folder, shards.cache.max_bytes, shards.options.headers) == (tmp_path, 10**6, {"A": "b"})


@pytest.mark.parametrize(
    ("url", "shown", "file"),
    [
        ("https://user:pw@host:80/x/a.tar?sig=s#f", "https://host:80/x/a.tar?…", "a.tar"),
        ("s3://bucket/x#1/a.tar", "s3://bucket/x#1/a.tar", "a.tar"),
        ("abfs://container@account/a.tar", "abfs://container@account/a.tar", "a.tar"),
        ("https://host/..%2F..%2Fetc", "https://host/..%2F..%2Fetc", "etc"),
        ("https://host/a/..", "https://host/a/..", "shard"),
    ],
)
def test_names(url, shown, file):
    assert show(url) == shown
    name = cache_name(url)
    assert name.split("-", 1)[1] == file
    assert "/" not in name


def test_object_stores_tell_containers_and_keys_apart():
    urls = ["abfs://one@acc/a.tar", "abfs://two@acc/a.tar", "s3://b/a#1.tar", "s3://b/a#2.tar", "s3://c/a#2.tar"]
    urls += ["https://h/a.tar?part=1", "https://h/a.tar?part=2"]
    assert len({cache_name(url) for url in urls}) == len(urls)


def test_the_data_tools_do_not_wait_for_torch():
    code = "import sys, scale_digrap.data.store as s; sys.exit(3 if {'torch', 'webdataset'} & set(sys.modules) else 0)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
