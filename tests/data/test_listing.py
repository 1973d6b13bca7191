"""What names and manifests mean, and what they can never mean."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from scale_digrap.data.dataset import ShardDataset
from scale_digrap.data.errors import DataError
from scale_digrap.data.index import Manifest, index_shards, load_index
from scale_digrap.data.plan import Plan
from scale_digrap.data.store import ShardStore
from scale_digrap.data.streams import FetchError
from scale_digrap.data.validate import find_shards
from tests.data import made
from tests.data.remote import content, store
from tests.data.web import Site, serve


def test_a_file_or_a_line_of_a_manifest_that_is_called_pipe_runs_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    name = "pipe:touch ran; cat s.tar"
    (folder / "s.tar").write_bytes(b"x" * 600)
    (folder / f"{name}.tar").write_bytes(b"x" * 600)
    for write in (False, True):
        if write:
            line = {"name": name + ".tar", "bytes": 600, "samples": 1, "sha256": "", "layout": ""}
            (folder / "manifest.json").write_text(json.dumps({"version": 1, "shards": [line]}))
        allowed = store(tmp_path / "cache", allow_pipe=True)
        for pattern in (".", "manifest.json", "*.tar", "p*.tar"):
            if pattern == "manifest.json" and not write:
                continue
            for url in allowed.expand(pattern):
                assert allowed.path(url).read_bytes() == b"x" * 600
        for shard in find_shards(["."], allowed):
            assert allowed.path(shard.url).read_bytes() == b"x" * 600
    assert not (folder / "ran").exists()
    assert allowed.expand(["pipe:touch ran"]) == ["pipe:touch ran"], "the configuration may name commands"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("http://localhost:{other}/a.tar", "another host, localhost"),
        ("http://127.0.0.1:{other}/a.tar", r"another host, 127\.0\.0\.1:"),
        ("http://169.254.169.254/latest/meta-data", r"another host, 169\.254\.169\.254"),
        ("file:///etc/passwd", "refused"),
        ("ftp://127.0.0.1/a.tar", "refused"),
        ("//user:geheim@10.0.0.1/a.tar?token=geheim", r"another host, 10\.0\.0\.1"),
    ],
)
def test_redirects_lead_nowhere_else(tmp_path, target, words):
    data = content(1, 3000)
    with serve(Site({"/a.tar": data})) as other, serve(Site({"/b.tar": data})) as site:
        site.faults["/a.tar"] = [("redirect", target.format(other=other.port))] * 9
        with pytest.raises(FetchError, match=words) as raised:
            store(tmp_path).path(site.url("/a.tar"))
        assert "geheim" not in str(raised.value)
        assert other.requests == []
        site.faults["/a.tar"] = [("redirect", site.url("/b.tar"))]
        assert store(tmp_path).path(site.url("/a.tar")).read_bytes() == data


def test_what_a_mac_leaves_beside_shards_and_folders_called_tar_are_left_out_and_said(tmp_path, caplog):
    made.write(tmp_path, 10, per_shard=5)
    (tmp_path / "._shard-000000.tar").write_bytes(b"\0" * 4096)
    (tmp_path / "old.tar").mkdir()
    names = [str(tmp_path / f"shard-00000{number}.tar") for number in range(2)]
    assert ShardStore().expand(tmp_path) == names
    assert "2 left out, which are hidden or folders, not shards: ._shard-000000.tar, old.tar" in caplog.text
    assert ShardStore().expand(f"{tmp_path}/*.tar") == names
    assert [shard.url for shard in find_shards([tmp_path], ShardStore())] == names
    assert run("shards", "index", str(tmp_path)).returncode == 0
    assert [entry.name for entry in Manifest.load(tmp_path / "manifest.json").shards] == [
        os.path.basename(n) for n in names
    ]


def test_braces_in_names(tmp_path):
    folder = tmp_path / "run{1"
    folder.mkdir()
    made.write(folder, 5)
    name = str(folder / "shard-000000.tar")
    assert ShardStore().expand(name) == [name]
    assert ShardStore().expand(str(folder)) == [name]
    with pytest.raises(DataError, match="braces are not balanced"):
        ShardStore().expand(str(tmp_path / "a{b.tar"))
    with pytest.raises(DataError, match=r"mean 99,999,999,999 names, more than 1,000,000"):
        ShardStore().expand("a-{1..99999999999}.tar")


def run(*arguments, **options):
    command = [sys.executable, "-m", "scale_digrap", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    made.write(tmp_path, 400)
    command = f"{sys.executable} -m scale_digrap shards peek {tmp_path} -n 400 | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.stderr, done.stdout.split()[-1]) == ("", "141")
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = run("shards", "peek", str(tmp_path), "-n", "1", env=ascii_only)
    assert (done.returncode, done.stderr) == (0, "")
    assert r"\xd7" in done.stdout, "the sign between width and height"


LINE = {"name": "shard-000000.tar", "bytes": 10240, "samples": 5, "sha256": "", "layout": ""}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": -1}, "its 'samples' is -1"),
        ({"samples": 10**18}, "no more samples than its 10240 bytes"),
        ({"samples": 10**30}, "its 'samples' is 1000"),
        ({"samples": "5"}, "its 'samples' is '5'"),
        ({"samples": 5.0}, r"its 'samples' is 5\.0"),
        ({"samples": True}, "its 'samples' is True"),
        ({"samples": None}, "its 'samples' is None"),
        ({"bytes": "many"}, "its 'bytes' is 'many'"),
        ({"bytes": 1 << 63}, "its 'bytes' is 9223372036854775808"),
        ({"sha256": "x"}, "its 'sha256' is 'x'"),
        ({"sha256": None}, "its 'sha256' is None"),
        ({"layout": 5}, "its 'layout' is 5"),
        ({"name": ""}, "its 'name' is ''"),
        ({"name": 7}, "its 'name' is 7"),
    ],
)
def test_wrong_numbers_in_a_manifest_are_one_line_that_names_the_shard(tmp_path, change, words):
    made.write(tmp_path, 5)
    line = {**LINE, "bytes": (tmp_path / "shard-000000.tar").stat().st_size, **change}
    words = words.replace("10240", str(line["bytes"]))
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 1, "shards": [line]}))
    with pytest.raises(DataError, match=words) as raised:
        ShardDataset(tmp_path)
    assert "shards index" in str(raised.value)
    assert str(tmp_path / "manifest.json") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_manifests_that_lack_something_or_repeat_themselves(tmp_path):
    path = tmp_path / "manifest.json"
    for text, words in (
        ('{"version": 1}', "no list of 'shards'"),
        ('{"version": 1, "shards": 5}', "no list of 'shards'"),
        ('{"version": 1, "shards": [5]}', "entry 0 is not an object"),
        ('{"version": 1, "shards": [{"bytes": 1}]}', "its 'name' is nothing"),
        ('{"version": NaN, "shards": []}', "is not a manifest"),
        ("[" * 100_000, "is not a manifest"),
        (json.dumps({"version": 1, "shards": [LINE, LINE]}), "lists shard 'shard-000000.tar' twice"),
        ("\ufeff" + json.dumps({"version": 1, "shards": [LINE]}), None),
    ):
        path.write_text(text, encoding="utf-8")
        if words is None:
            assert Manifest.load(path).samples == 5
            continue
        with pytest.raises(DataError, match=words):
            Manifest.load(path)


def test_a_count_that_is_off_by_one_is_found_when_the_shard_is_opened(tmp_path):
    made.write(tmp_path, 10, per_shard=5)
    manifest = index_shards(sorted(tmp_path.glob("*.tar")))
    manifest.shards[1].samples = 6
    manifest.save(tmp_path / "manifest.json")
    with pytest.raises(DataError, match=r"shard-000001\.tar: has 5 samples, its manifest says 6: index the folder"):
        [sample.key for sample in ShardDataset(tmp_path)]


def test_a_window_that_no_memory_holds_is_refused():
    with pytest.raises(DataError, match=r"a window of 2 shards can hold 600,000,000 samples.*data\.window"):
        Plan([300_000_000, 300_000_000], seed=0, window=9)


def forged(path, change):
    """The index with one array changed and nothing else."""
    index = load_index(path)
    data = bytearray((path.parent / (path.name + ".idx")).read_bytes())
    arrays = {"spans": index.spans, "ends": index.keys.ends, "questions": index.questions, "text": index.keys.text}
    name, value = change
    for other in ("text", "questions", "ends", "spans"):
        start = len(data) - sum(
            a.nbytes for n, a in arrays.items() if list(arrays).index(n) >= list(arrays).index(other)
        )
        if other == name:
            kind = np.dtype(arrays[name].dtype)
            data[start : start + kind.itemsize] = np.array([value], dtype=kind).tobytes()
    (path.parent / (path.name + ".idx")).write_bytes(bytes(data))


@pytest.mark.parametrize("change", [("questions", 0), ("questions", 7), ("spans", 1 << 60), ("ends", -5), ("text", 65)])
def test_an_index_that_has_rotted_is_made_again_and_no_sample_is_lost(tmp_path, change, caplog):
    made.write(tmp_path, 6)
    path = tmp_path / "shard-000000.tar"
    expected = load_index(path)
    forged(path, change)
    found = load_index(path)
    assert "is damaged" in caplog.text
    assert "made again" in caplog.text
    assert (found.samples, found.layout, list(found.keys)) == (6, expected.layout, list(expected.keys))
    assert np.array_equal(found.spans, expected.spans)
    caplog.clear()
    assert load_index(path).samples == 6
    assert caplog.text == ""


def test_an_index_of_an_earlier_version_is_made_again_and_that_is_said(tmp_path, caplog, monkeypatch):
    from scale_digrap.data import index as module

    monkeypatch.setattr(module, "_said", set())
    made.write(tmp_path, 6)
    path = tmp_path / "shard-000000.tar"
    place = tmp_path / "shard-000000.tar.idx"
    load_index(path)
    place.write_bytes(place.read_bytes().replace(b"shard index 2", b"shard index 1", 1))
    assert load_index(path).samples == 6
    assert "indexes of another version of this package" in caplog.text
    assert place.read_bytes().startswith(b"scale_digrap shard index 2\n")
