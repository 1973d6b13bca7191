"""Stores: what arrives is what was sent, once per node, within a bound, within a time, and without telling secrets."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest

from scale_digrap.data.cache import CacheError
from scale_digrap.data.errors import DataError
from scale_digrap.data.index import ShardEntry
from scale_digrap.data.store import ShardStore
from scale_digrap.data.streams import FetchError
from scale_digrap.data.urls import cache_name, show
from tests.data.web import Site, serve

MIB = 1 << 20
SPAWN = multiprocessing.get_context("spawn")


def content(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def entry(name: str, data: bytes) -> ShardEntry:
    return ShardEntry(name=name, bytes=len(data), samples=1, sha256=hashlib.sha256(data).hexdigest())


def store(folder, **options) -> ShardStore:
    return ShardStore(**{"cache_dir": folder, "timeout_s": 0.5, "retries": 2, "backoff_s": 0.01, **options})


def shards_in(folder) -> set[str]:
    """The complete shards of a cache."""
    return {path.name.split("-", 1)[1] for path in folder.iterdir() if path.suffix == ".tar"}


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Over the web


def test_a_broken_transfer_goes_on_where_it_broke_off(tmp_path):
    data = content(1, 3 * MIB)
    faults = {"/a.tar": [("close", 1_000_000), ("status", 503), ("stall", 700_000)]}
    with serve(Site({"/a.tar": data}, faults)) as site:
        path = store(tmp_path, retries=3).path(site.url("/a.tar"), entry("a.tar", data))
        assert path.read_bytes() == data
        starts = [int(one.get("range", "bytes=0-")[6:-1]) for one in site.asked("/a.tar")]
        assert starts == [0, 1_000_000, 1_000_000, 1_700_000]
        # Another store on the same cache does not ask again.
        assert store(tmp_path).path(site.url("/a.tar"), entry("a.tar", data)) == path
        assert len(starts) == len(site.asked("/a.tar"))


@pytest.mark.parametrize("fault", [("close", 1000), ("stall", 1000), ("drip", 1000), ("status", 500)])
def test_a_server_that_keeps_failing_is_an_error_in_time_and_not_a_short_shard(tmp_path, fault):
    with serve(Site({"/a.tar": content(1, 50_000)}, {"/a.tar": [fault] * 20}, ranges=False)) as site:
        start = time.monotonic()
        with pytest.raises(FetchError, match=r"/a\.tar could not be fetched in 3 attempts") as raised:
            store(tmp_path).path(site.url("/a.tar"))
        assert time.monotonic() - start < 6
        words = {"close": "after 1000 of 50000", "stall": "stalled", "drip": "stalled", "status": "answers 500"}
        assert words[fault[0]] in str(raised.value)
        assert len(site.asked("/a.tar")) == 3
        assert not shards_in(tmp_path)
        assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_progress_starts_the_count_of_retries_anew(tmp_path):
    data = content(1, 8 * MIB)
    with serve(Site({"/a.tar": data}, {"/a.tar": [("close", MIB + 10)] * 7})) as site:
        assert store(tmp_path, retries=1).path(site.url("/a.tar")).read_bytes() == data


def test_two_versions_of_a_shard_are_never_joined(tmp_path):
    old, new = content(1, MIB), content(2, MIB)
    with serve(Site({"/a.tar": old}, {"/a.tar": [("close", 500_000)]})) as site:
        with pytest.raises(FetchError):
            store(tmp_path, retries=0).path(site.url("/a.tar"))
        assert [path.stat().st_size for path in tmp_path.glob("*.part")] == [500_000]
        site.files["/a.tar"], site.tags["/a.tar"] = new, '"two"'
        assert store(tmp_path).path(site.url("/a.tar")).read_bytes() == new


def test_a_wrong_checksum_is_fetched_anew_and_then_an_error(tmp_path):
    good, bad = content(1, 9000), content(2, 9000)
    line = entry("a.tar", good)
    with serve(Site({"/a.tar": bad})) as site:
        with pytest.raises(FetchError, match=r"sha256 is .* the manifest says"):
            store(tmp_path).path(site.url("/a.tar"), line)
        assert [one.get("range") for one in site.asked("/a.tar")] == [None, None, None]
        assert not shards_in(tmp_path)
        site.files["/a.tar"] = good
        assert store(tmp_path).path(site.url("/a.tar"), line).read_bytes() == good
        # The manifest has changed since: the copy in the cache is of no use any more.
        site.files["/a.tar"] = bad
        assert store(tmp_path).path(site.url("/a.tar"), entry("a.tar", bad)).read_bytes() == bad
        with pytest.raises(FetchError, match="has 9000 bytes, the manifest says 9001"):
            store(tmp_path, retries=0).path(site.url("/a.tar"), entry("a.tar", bad + b"x"))


def test_what_no_retry_mends_is_told_at_once(tmp_path):
    with serve(Site({"/b.tar": b"x" * 10}, {"/b.tar": [("no length",)], "/c.tar": [("status", 403)]})) as site:
        for path, words in (("/a.tar", "404"), ("/b.tar", "tells no length"), ("/c.tar", "403")):
            with pytest.raises(FetchError, match=words):
                store(tmp_path).path(site.url(path))
            assert len(site.asked(path)) == 1
    with pytest.raises(FetchError, match="not a URL that can be asked for"):
        store(tmp_path).path("http://127.0.0.1:1/a b.tar")
    with pytest.raises(FetchError, match="Connection refused"):
        store(tmp_path, retries=0).path(site.url("/a.tar"))


def test_equal_base_names_are_two_shards(tmp_path):
    one, two = content(1, 5000), content(2, 5000)
    with serve(Site({"/one/a.tar": one, "/two/a.tar": two})) as site:
        shards = store(tmp_path)
        assert shards.path(site.url("/one/a.tar")).read_bytes() == one
        assert shards.path(site.url("/two/a.tar")).read_bytes() == two
        assert shards.path(site.url("/one/a.tar")).read_bytes() == one


def test_credentials_are_sent_and_never_shown(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    data = content(1, 3000)
    with serve(Site({"/a.tar": data}, {"/a.tar": [("status", 503)], "/no.tar": [("status", 503)] * 9})) as site:
        secret = site.url("/a.tar?X-Amz-Signature=geheim2").replace("//", "//user:geheim@")
        path = store(tmp_path).path(secret)
        assert path.read_bytes() == data
        assert site.asked("/a.tar")[1]["authorization"] == "Basic dXNlcjpnZWhlaW0="
        with pytest.raises(FetchError) as raised:
            store(tmp_path).path(secret.replace("/a.tar", "/no.tar"))
        # A signature that has been renewed names the same shard.
        assert store(tmp_path).path(secret.replace("geheim2", "geheim3")) == path
        assert len(site.asked("/a.tar")) == 2
    texts = [str(raised.value), caplog.text, *map(str, tmp_path.rglob("*"))]
    texts += [file.read_text("latin-1") for file in tmp_path.iterdir() if not file.name.endswith(".tar")]
    assert not [text for text in texts if "geheim" in text]
    with pytest.raises(DataError, match="listed twice") as raised:
        store(tmp_path).expand([secret, secret.replace("geheim2", "geheim3")])
    assert "geheim" not in str(raised.value)


def test_a_redirect_to_another_host_gets_no_secrets(tmp_path):
    data = content(1, 3000)
    with serve(Site({"/a.tar": data})) as other, serve(Site({})) as site:
        site.faults["/a.tar"] = [("redirect", other.url("/a.tar"))]
        site.faults["/b.tar"] = [("redirect", "file:///etc/passwd")]
        shards = store(tmp_path, headers={"Authorization": "Bearer geheim", "X-Key": "geheim"})
        assert shards.path(site.url("/a.tar")).read_bytes() == data
        assert site.asked("/a.tar")[0]["authorization"] == "Bearer geheim"
        assert "geheim" not in str(other.asked("/a.tar"))
        with pytest.raises(FetchError, match="refused"):
            shards.path(site.url("/b.tar"))


def test_the_manifest_beside_remote_shards(tmp_path):
    lines = [{"name": f"a-{i}.tar", "bytes": 1, "samples": 1, "sha256": "0" * 64} for i in range(3)]
    file = tmp_path / "manifest.json"
    from scale_digrap.data.index import Manifest

    Manifest(version=1, shards=[ShardEntry(**line) for line in lines], classes=None).save(file)
    with serve(Site({"/x/manifest.json": file.read_bytes()})) as site:
        shards = store(tmp_path / "cache")
        assert shards.expand(site.url("/x/manifest.json")) == [site.url(f"/x/a-{i}.tar") for i in range(3)]
        assert [one.name for one in shards.manifest(site.url("/x/a-1.tar")).shards] == ["a-0.tar", "a-1.tar", "a-2.tar"]
        assert shards.manifest(site.url("/y/a-1.tar")) is None
        lines[1]["name"] = "ä b.tar"
        Manifest(version=1, shards=[ShardEntry(**line) for line in lines], classes=None).save(file)
        site.files |= {"/x/manifest.json": file.read_bytes(), "/x/%C3%A4%20b.tar": b"x"}
        (url,) = shards.expand(site.url("/x/manifest.json"))[1:2]
        assert shards.path(url).read_bytes() == b"x"
        for name in ("../a.tar", "/etc/passwd", ".."):
            lines[1]["name"] = name
            Manifest(version=1, shards=[ShardEntry(**line) for line in lines], classes=None).save(file)
            with pytest.raises(DataError, match="is not the name of a file beside it"):
                shards.expand(file)
        with pytest.raises(DataError, match="no such manifest"):
            shards.expand(site.url("/y/manifest.json"))


# Several processes on one cache


def fetch_in_process(folder, url, data_sha, start_at, queue):
    while time.time() < start_at:
        time.sleep(0.001)
    try:
        path = ShardStore(cache_dir=folder, timeout_s=5.0, retries=1, backoff_s=0.01).path(url)
        queue.put(hashlib.sha256(path.read_bytes()).hexdigest() == data_sha)
    except DataError as error:
        queue.put(str(error))


def race(folder, url, data, processes=3):
    queue, start = SPAWN.Queue(), time.time() + 1.0
    arguments = (folder, url, hashlib.sha256(data).hexdigest(), start, queue)
    running = [SPAWN.Process(target=fetch_in_process, args=arguments) for _ in range(processes)]
    for process in running:
        process.start()
    results = [queue.get(timeout=60) for _ in running]
    for process in running:
        process.join(30)
    return results


def test_processes_racing_for_a_shard_make_one_download(tmp_path):
    data = content(1, 2 * MIB)
    with serve(Site({"/a.tar": data}, {"/a.tar": [("wait", 1.5)]})) as site:
        assert race(tmp_path, site.url("/a.tar"), data) == [True] * 3
        assert len(site.asked("/a.tar")) == 1


def test_those_who_wait_for_a_failing_download_share_its_error(tmp_path):
    faults = {"/a.tar": [("late", 1.5, 500), *[("status", 500)] * 20]}
    with serve(Site({"/a.tar": b"x" * 1000}, faults)) as site:
        results = race(tmp_path, site.url("/a.tar"), b"x" * 1000)
        assert all("answers 500" in str(result) for result in results)
        assert len(site.asked("/a.tar")) == 2  # the attempts of one process, not those of three


def test_a_killed_download_is_taken_up_by_the_next_process(tmp_path):
    data = content(1, 2 * MIB)
    with serve(Site({"/a.tar": data}, {"/a.tar": [("stall", 1_500_000)]})) as site:
        queue = SPAWN.Queue()
        process = SPAWN.Process(target=fetch_in_process, args=(tmp_path, site.url("/a.tar"), "", 0, queue))
        process.start()
        deadline = time.monotonic() + 30
        while not any(p.stat().st_size >= 1_000_000 for p in tmp_path.glob("*.part")) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
        assert store(tmp_path).path(site.url("/a.tar")).read_bytes() == data
        assert int(site.asked("/a.tar")[1]["range"][6:-1]) >= 1_000_000


def hold_pin(folder, urls, ready, done):
    shards = ShardStore(cache_dir=folder, max_bytes=350_000)
    shards.pin(urls)
    ready.set()
    done.wait(30)


def test_pins_of_another_process_hold_and_end_with_it(tmp_path):
    data = {f"/{i}.tar": content(i, 100_000) for i in range(6)}
    with serve(Site(data)) as site:
        mine = store(tmp_path, max_bytes=350_000)
        urls = [site.url(f"/{i}.tar") for i in range(6)]
        mine.path(urls[0])
        ready, done = SPAWN.Event(), SPAWN.Event()
        other = SPAWN.Process(target=hold_pin, args=(tmp_path, urls[:1], ready, done))
        other.start()
        assert ready.wait(30)
        for url in urls[1:]:
            mine.path(url)
        assert shards_in(tmp_path) == {"0.tar", "4.tar", "5.tar"}
        os.kill(other.pid, signal.SIGKILL)
        other.join(10)
        mine.path(urls[1])
        assert "0.tar" not in shards_in(tmp_path)


def test_a_forked_process_has_its_own_pins(tmp_path):
    data = {f"/{i}.tar": content(i, 100_000) for i in range(4)}
    with serve(Site(data)) as site:
        urls = [site.url(f"/{i}.tar") for i in range(4)]
        mine = store(tmp_path, max_bytes=250_000)
        mine.pin(urls[:1])
        mine.path(urls[0])
        child = os.fork()
        if child == 0:
            status = 1
            try:
                mine.path(urls[1])
                mine.close()  # must not let the parent's pin go
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        for url in urls[1:]:
            mine.path(url)
        assert shards_in(tmp_path) == {"0.tar", "3.tar"}


# Bounds


def test_the_least_recently_used_shard_makes_room(tmp_path):
    data = {f"/{i}.tar": content(i, 100_000) for i in range(5)}
    with serve(Site(data)) as site:
        shards = store(tmp_path, max_bytes=300_000)
        for i in (0, 1, 2, 0, 3):
            shards.path(site.url(f"/{i}.tar"))
            time.sleep(0.01)
        assert shards_in(tmp_path) == {"0.tar", "2.tar", "3.tar"}
        shards.path(site.url("/4.tar"))
        assert shards_in(tmp_path) == {"0.tar", "3.tar", "4.tar"}


def test_a_window_that_does_not_fit_is_an_error_and_nothing_pinned_is_lost(tmp_path):
    data = {f"/{i}.tar": content(i, 100_000) for i in range(3)}
    with serve(Site(data)) as site:
        shards = store(tmp_path, max_bytes=250_000)
        urls = [site.url(f"/{i}.tar") for i in range(3)]
        shards.pin(urls[:2])
        for url in urls[:2]:
            shards.path(url)
        with pytest.raises(CacheError, match=r"no room for shard .*200000 of its 250000 bytes are pinned"):
            shards.path(urls[2])
        assert shards_in(tmp_path) == {"0.tar", "1.tar"}
        shards.pin(urls[1:])
        shards.path(urls[2])
        assert shards_in(tmp_path) == {"1.tar", "2.tar"}
        with pytest.raises(CacheError, match="more than the whole cache"):
            store(tmp_path / "small", max_bytes=1000).path(urls[0])


def test_prefetching_keeps_to_the_bound_and_gives_way_to_what_is_needed(tmp_path):
    data = {f"/{i}.tar": content(i, 100_000) for i in range(6)}
    with serve(Site(data)) as site:
        shards = store(tmp_path, max_bytes=350_000)
        urls = [site.url(f"/{i}.tar") for i in range(6)]
        shards.prefetch(urls[:5])
        wait_for(lambda: len(shards_in(tmp_path)) == 3)
        time.sleep(0.3)
        assert shards_in(tmp_path) == {"0.tar", "1.tar", "2.tar"}  # the first ones, and none given up for the later
        shards.path(urls[5])
        assert shards_in(tmp_path) == {"0.tar", "1.tar", "5.tar"}  # what was furthest ahead has made room
        shards.close()
        assert not shards.cache._pins


def test_what_one_process_fetched_ahead_makes_room_for_what_another_needs_now(tmp_path):
    data = {f"/{i}.tar": content(i, 100_000) for i in range(6)}
    with serve(Site(data)) as site:
        urls = [site.url(f"/{i}.tar") for i in range(6)]
        one, two = store(tmp_path, max_bytes=350_000), store(tmp_path, max_bytes=350_000)
        one.prefetch(urls[:3])
        wait_for(lambda: len(shards_in(tmp_path)) == 3)
        two.prefetch(urls[3:5])
        time.sleep(0.3)
        assert shards_in(tmp_path) == {"0.tar", "1.tar", "2.tar"}  # as little needed now as those
        two.path(urls[5])
        assert shards_in(tmp_path) == {"0.tar", "1.tar", "5.tar"}
        one.pin(urls[:2])
        with pytest.raises(CacheError, match="300000 of its 350000 bytes are pinned"):
            store(tmp_path, max_bytes=350_000).path(urls[4])
        one.close()
        two.close()


def test_prefetch_makes_a_later_path_immediate_and_hides_no_error(tmp_path, caplog):
    with serve(Site({"/0.tar": content(0, 1000)}, {"/1.tar": [("status", 500)] * 3})) as site:
        site.files["/1.tar"] = content(1, 1000)
        shards = store(tmp_path)
        shards.prefetch([site.url("/0.tar"), site.url("/1.tar")])
        wait_for(lambda: shards._thread is None)
        assert "fetching ahead" in caplog.text
        asked = len(site.requests)
        shards.path(site.url("/0.tar"))
        assert len(site.requests) == asked
        assert shards.path(site.url("/1.tar")).read_bytes() == site.files["/1.tar"]  # the server is well again


# Other places


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


def test_notes_of_the_cache_are_not_trusted_blindly(tmp_path):
    data = content(1, 5000)
    with serve(Site({"/a.tar": data})) as site:
        path = store(tmp_path).path(site.url("/a.tar"))
        path.write_bytes(data[:4000])  # a disk that was full, a copy of the folder cut short
        assert store(tmp_path).path(site.url("/a.tar")).read_bytes() == data
        note = path.with_name(path.name + ".note")
        note.write_text(json.dumps({"size": "?"}))
        assert store(tmp_path).path(site.url("/a.tar")).read_bytes() == data
        assert len(site.asked("/a.tar")) == 3


def bytes_in(folder) -> int:
    total = 0
    for path in folder.glob("*.tar"):
        with contextlib.suppress(FileNotFoundError):  # removed by another process meanwhile
            total += path.stat().st_size
    return total


def read_at_random(folder, urls, digests, seed, queue):
    """Read shards in random order for a while, as a loader does: path, open, read later."""
    random = np.random.default_rng(seed)
    shards = ShardStore(cache_dir=folder, max_bytes=450_000, timeout_s=10.0, backoff_s=0.01)
    largest, wrong = 0, 0
    try:
        for _ in range(60):
            window = [int(i) for i in random.choice(len(urls), 2, replace=False)]
            shards.prefetch([urls[i] for i in window])
            with open(shards.path(urls[window[0]]), "rb") as file:
                largest = max(largest, bytes_in(folder))
                wrong += hashlib.sha256(file.read()).hexdigest() != digests[window[0]]
        queue.put((wrong, largest))
    except BaseException as error:
        queue.put(repr(error))


def test_processes_that_share_a_small_cache_never_read_wrong_bytes_nor_pass_the_bound(tmp_path):
    data = {f"/{i}.tar": content(i, 100_000) for i in range(12)}
    digests = [hashlib.sha256(one).hexdigest() for one in data.values()]
    with serve(Site(data)) as site:
        queue = SPAWN.Queue()
        arguments = [(tmp_path, [site.url(path) for path in data], digests, seed, queue) for seed in range(3)]
        running = [SPAWN.Process(target=read_at_random, args=one) for one in arguments]
        for process in running:
            process.start()
        results = [queue.get(timeout=120) for _ in running]
        for process in running:
            process.join(30)
        assert [result for result in results if not isinstance(result, tuple)] == []
        assert [result[0] for result in results] == [0, 0, 0]
        assert max(largest for _, largest in results) <= 450_000
        assert len(site.requests) > 12  # the cache was too small for all: shards did go and come back
