"""Fetching over http: what arrives is what was sent, in time, and without telling secrets."""

from __future__ import annotations

import logging
import pickle
import time

import pytest

from scale_digrap.data.errors import DataError
from scale_digrap.data.index import ShardEntry
from scale_digrap.data.streams import FetchError
from tests.data.remote import MIB, content, entry, shards_in, store
from tests.data.web import Site, serve


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
        secrets = {"Authorization": "Bearer geheim", "X-Key": "geheim"}
        shards = store(tmp_path, headers=secrets, redirect_hosts=[f"127.0.0.1:{other.port}"])
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
