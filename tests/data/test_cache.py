"""The shard cache: one download per node, within a bound, whatever the processes do that share it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time

import numpy as np
import pytest

from scale_digrap.data.cache import CacheError
from scale_digrap.data.errors import DataError
from scale_digrap.data.store import ShardStore
from tests.data.remote import MIB, SPAWN, content, shards_in, store, wait_for
from tests.data.web import Site, serve


def fetch_in_process(folder, url, data_sha, barrier, queue):
    if barrier is not None:
        barrier.wait(60)
    try:
        path = ShardStore(cache_dir=folder, timeout_s=5.0, retries=1, backoff_s=0.01).path(url)
        queue.put(hashlib.sha256(path.read_bytes()).hexdigest() == data_sha)
    except DataError as error:
        queue.put(str(error))


def race(folder, url, data, processes=3):
    queue = SPAWN.Queue()
    arguments = (folder, url, hashlib.sha256(data).hexdigest(), SPAWN.Barrier(processes), queue)
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
        process = SPAWN.Process(target=fetch_in_process, args=(tmp_path, site.url("/a.tar"), "", None, queue))
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


def read_at_random(folder, urls, digests, seed, queue):
    """Read shards in random order for a while, as a loader does: path, open, read later."""
    random = np.random.default_rng(seed)
    shards = ShardStore(cache_dir=folder, max_bytes=450_000, timeout_s=10.0, backoff_s=0.01)
    largest, wrong = 0, 0
    try:
        for _ in range(40):
            window = [int(i) for i in random.choice(len(urls), 2, replace=False)]
            shards.prefetch([urls[i] for i in window])
            with open(shards.path(urls[window[0]]), "rb") as file:
                with shards.cache.exclusive("evict"):  # else what is removed and what comes would both be counted
                    largest = max(largest, sum(path.stat().st_size for path in folder.glob("*.tar")))
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
