"""Folders that are kept between runs: private, never through links, also where there is no home."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from scale_digrap.data import places
from scale_digrap.data.dataset import ShardDataset
from scale_digrap.data.errors import DataError
from scale_digrap.data.index import load_index
from scale_digrap.data.store import ShardStore
from scale_digrap.data.urls import cache_name
from scale_digrap.errors import ScaleDigrapError
from tests.data import made
from tests.data.remote import MIB, content, entry, store
from tests.data.web import Site, serve

GOOD, EVIL = content(1, 3000), content(2, 3000)


@pytest.fixture
def site():
    with serve(Site({"/a.tar": GOOD})) as served:
        yield served


def plant(folder: Path, url: str, data: bytes, claimed: bytes | None = None, **more) -> Path:
    """A shard with a note beside it, as a cache would have them, that nobody has fetched."""
    file = folder / cache_name(url)
    file.write_bytes(data)
    sha256 = hashlib.sha256(data if claimed is None else claimed).hexdigest()
    file.with_name(file.name + ".note").write_text(json.dumps({"size": len(data), "sha256": sha256, **more}))
    return file


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o2775])
def test_a_cache_folder_that_others_can_write_to_is_refused(tmp_path, mode, site):
    folder = tmp_path / "cache"
    folder.mkdir()
    plant(folder, site.url("/a.tar"), EVIL)
    folder.chmod(mode)
    with pytest.raises(DataError, match=r"cache is not private: others can write to it.*data\.cache_shared=true"):
        store(folder)
    made.write(tmp_path, 5)
    shard = tmp_path / "shard-000000.tar"
    (tmp_path / "shard-000000.tar.idx").mkdir()  # nothing can be stored beside it
    with pytest.raises(DataError, match=r"folder for indexes .* is not private"):
        load_index(shard, cache_dir=folder)
    assert store(folder / "own").path(site.url("/a.tar")).read_bytes() == GOOD
    assert (folder / "own").stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="gives a folder to another user")
def test_a_cache_folder_of_another_user_is_refused(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o755)
    os.chown(folder, 12345, -1)
    with pytest.raises(DataError, match="belongs to user 12345"):
        store(folder)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_a_planted_shard_is_never_used_in_place_of_the_one_that_was_asked_for(tmp_path, site, shared, listed):
    url = site.url("/a.tar")
    plant(tmp_path, url, EVIL, claimed=GOOD)  # the size and the checksum of the manifest, other bytes
    line = entry("a.tar", GOOD) if listed else None
    assert store(tmp_path, cache_shared=shared).path(url, line).read_bytes() == GOOD


@pytest.mark.skipif(os.getuid() != 0, reason="gives a folder to another user")
def test_users_who_share_a_cache_keep_their_own_indexes(tmp_path):
    made.write(tmp_path, 5)
    folder = tmp_path / "cache"
    (folder / "index").mkdir(parents=True, mode=0o700)
    (folder / "index-12345").mkdir(mode=0o700)
    for name in ("index", "index-12345"):
        os.chown(folder / name, 12345, -1)
    folder.chmod(0o777)
    with serve(Site({"/a.tar": (tmp_path / "shard-000000.tar").read_bytes()})) as site:
        data = ShardDataset(site.url("/a.tar"), store=store(folder, cache_shared=True))
        assert [sample.key for sample in data] == [f"s{number:05d}" for number in range(5)]
    assert len(list((folder / f"index-{os.getuid()}").iterdir())) == 1
    assert list((folder / "index").iterdir()) == []


def test_a_copied_cache_is_read_once_and_then_used(tmp_path, site):
    url, line = site.url("/a.tar"), entry("a.tar", GOOD)
    plant(tmp_path, url, GOOD)
    hashed = []
    for _ in range(2):
        store_ = store(tmp_path)
        assert store_.path(url, line).read_bytes() == GOOD
        hashed.append(json.loads((tmp_path / f"{cache_name(url)}.note").read_text())["file"])
    assert hashed[0] == hashed[1] == list(places.identity(tmp_path / cache_name(url)))
    assert site.asked("/a.tar") == []


def test_a_shard_that_rots_in_the_cache_is_fetched_again(tmp_path, site, caplog):
    url, line = site.url("/a.tar"), entry("a.tar", GOOD)
    path = store(tmp_path).path(url, line)
    path.write_bytes(EVIL)
    assert store(tmp_path).path(url, line).read_bytes() == GOOD
    assert len(site.asked("/a.tar")) == 2
    assert "not what was fetched" in caplog.text


def test_a_shard_that_was_rewritten_without_a_manifest_is_noticed(tmp_path, site, caplog):
    url = site.url("/a.tar")
    plant(tmp_path, url, EVIL, version='"zero"')
    assert store(tmp_path).path(url).read_bytes() == GOOD
    assert "was rewritten since it was cached" in caplog.text
    plant(tmp_path, url, EVIL[:2000], version='"one"')
    assert store(tmp_path).path(url).read_bytes() == GOOD, "its size is another"


@pytest.mark.parametrize("kind", ["link", "hard link"])
def test_links_in_a_cache_overwrite_nothing(tmp_path, site, kind):
    """Every name that the cache writes to, planted as a link to a file of the user's."""
    url = site.url("/a.tar")
    victim = tmp_path / "victim"
    folder = tmp_path / "cache"
    folder.mkdir()
    victim.write_bytes(b"precious")
    name = cache_name(url)
    ends = ["", ".part", ".part.json", ".part.json.tmp", ".claim", ".claim.tmp", ".note", ".note.tmp", ".error"]
    for end in [*ends, ".error.tmp", ".idx"]:
        if kind == "link":
            (folder / f"{name}{end}").symlink_to(victim)
        else:
            os.link(victim, folder / f"{name}{end}")
    shards = store(folder, max_bytes=MIB)
    assert shards.path(url, entry("a.tar", GOOD)).read_bytes() == GOOD
    with pytest.raises(DataError):
        shards.path(site.url("/none.tar"))
    assert victim.read_bytes() == b"precious"
    assert not (folder / name).is_symlink()
    for end in (".lock", ".pin"):
        (folder / f"{name}{end}").unlink()
        (folder / f"{name}{end}").symlink_to(victim)
        with pytest.raises(DataError, match=r"is a link, and links in a cache are not followed"):
            store(folder, max_bytes=MIB).path(url, entry("a.tar", EVIL))
        (folder / f"{name}{end}").unlink()


def test_a_fifo_in_a_cache_or_beside_a_shard_does_not_hang(tmp_path, site):
    url = site.url("/a.tar")
    folder = tmp_path / "cache"
    folder.mkdir()
    for end in (".part", ".note", ".claim"):
        os.mkfifo(folder / f"{cache_name(url)}{end}")
    assert store(folder, max_bytes=MIB).path(url).read_bytes() == GOOD
    made.write(tmp_path, 5)
    os.mkfifo(tmp_path / "shard-000000.tar.idx")
    assert load_index(tmp_path / "shard-000000.tar").samples == 5
    assert (tmp_path / "shard-000000.tar.idx").is_file()


def test_the_default_folder_for_indexes(tmp_path, monkeypatch, caplog):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(places, "_chosen", {})
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert places.default_cache() == tmp_path / ".cache/scale_digrap/index"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification says to ignore
    assert places.default_cache() == tmp_path / ".cache/scale_digrap/index"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert places.default_cache() == tmp_path / "x/scale_digrap/index"
    assert caplog.text == ""
    (tmp_path / "x/scale_digrap").chmod(0o777)
    monkeypatch.setattr(places, "_chosen", {})
    own = temporary / f"scale_digrap-{os.getuid()}"
    assert [places.default_cache(), places.default_cache()] == [own, own]
    assert caplog.text.count("no cache folder at home") == 1
    assert own.stat().st_mode & 0o777 == 0o700
    # Somebody else was first, with a link to a folder of this user's.
    own.rmdir()
    (tmp_path / "private").mkdir(mode=0o700)
    own.symlink_to(tmp_path / "private")
    monkeypatch.setattr(places, "_chosen", {})
    assert places.default_cache().parent == temporary
    assert places.default_cache().resolve() != tmp_path / "private"


CODE = """
import logging, os, sys
from pathlib import Path
from scale_digrap.data.index import index_shards, load_index
logging.basicConfig()
os.setgid(54321), os.setuid(54321)  # not earlier: this user may be unable to read the interpreter's own files
folder = Path(sys.argv[1])
shards = sorted(folder.glob("*.tar"))
print(sum(load_index(path).samples for path in shards), index_shards(shards).samples)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="becomes a user without a passwd entry")
def test_a_user_without_a_home_or_a_passwd_entry_reads_shards_of_a_read_only_place():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        os.chmod(folder, 0o755)
        shards, temporary = Path(folder, "shards"), Path(folder, "tmp")
        shards.mkdir()
        temporary.mkdir()
        temporary.chmod(0o1777)
        made.write(shards, 20)
        environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME")}
        environment["TMPDIR"] = str(temporary)
        done = subprocess.run(
            [sys.executable, "-c", CODE, str(shards)], env=environment, capture_output=True, text=True, check=False
        )
        assert (done.stdout, done.returncode) == ("20 20\n", 0), done.stderr
        assert done.stderr.count("no cache folder at home") == 1
        own = temporary / "scale_digrap-54321"
        assert (own.stat().st_uid, own.stat().st_mode & 0o777, len(list(own.iterdir()))) == (54321, 0o700, 2)


def test_a_home_that_cannot_be_found_is_one_line(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    with pytest.raises(ScaleDigrapError, match="no home folder is known for '~no_such_user'"):
        ShardStore().expand("~no_such_user/x")


def test_paths_of_a_person_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "shards").mkdir()
    made.write(tmp_path / "shards", 15)
    names = [str(tmp_path / "shards" / f"shard-00000{i}.tar") for i in (0, 1)]
    shards = ShardStore(cache_dir=Path("~/cache"))
    assert shards.cache.folder == tmp_path / "cache"
    for pattern in (
        "~/shards",
        "~/shards/*.tar",
        "~/shards/shard-{000000..000001}.tar",
        "{~/shards/*0,~/shards/*1}.tar",
    ):
        assert shards.expand(pattern) == names
    (tmp_path / "shards" / "shard-000000.tar.idx").mkdir()  # nothing can be stored beside it
    load_index(tmp_path / "shards" / "shard-000000.tar", cache_dir=Path("~/index"))
    assert len(list((tmp_path / "index").iterdir())) == 1
    assert not Path("~").exists()
