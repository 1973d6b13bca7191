"""Shards in an S3 store: ranges, broken connections, credentials from everywhere that they may come from."""

from __future__ import annotations

import json
import logging

import pytest

from scale_digrap.data.dataset import ShardDataset
from scale_digrap.data.errors import DataError
from scale_digrap.data.index import index_shards
from scale_digrap.data.loader import TrainLoader
from scale_digrap.data.streams import FetchError
from tests.data import made
from tests.data.made import numbers, take
from tests.data.remote import MIB, content, entry, store

pytest.importorskip("s3fs")
pytest.importorskip("moto")
from tests.data.s3 import serve_bucket

BIG = content(1, 20 * MIB)
URL = "s3://shards/a/big.tar"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    made.write(folder, 40, per_shard=10)
    index_shards(sorted(folder.glob("*.tar"))).save(folder / "manifest.json")
    return folder


@pytest.fixture
def bucket(shards, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    objects = {f"set/{path.name}": path.read_bytes() for path in shards.iterdir() if path.suffix != ".idx"}
    with serve_bucket({"a/big.tar": BIG, **objects}) as served:
        yield served


def patient(folder, bucket, **options):
    return store(folder, **{"timeout_s": 20.0, "storage_options": bucket.options(), **options})


def test_a_shard_is_read_in_ranges_and_a_connection_that_breaks_goes_on(bucket, tmp_path):
    bucket.faults = [("GET", "reset")] * 3
    assert patient(tmp_path, bucket).path(URL, entry("big.tar", BIG)).read_bytes() == BIG
    ranges = [span for method, path, span, _ in bucket.requests if method == "GET" and path.endswith("big.tar")]
    assert bucket.faults == []
    assert len(ranges) >= 5
    assert all(span.startswith("bytes=") for span in ranges)
    firsts = [int(span.removeprefix("bytes=").partition("-")[0]) for span in ranges]
    assert max(firsts) > 8 * MIB, "not all of it in one request"


def test_training_reads_from_an_object_store_with_forked_loader_processes(bucket, shards, tmp_path):
    options = {"batch_size": 5, "collate": numbers, "window": 2, "seed": 3}
    expected = take(TrainLoader(str(shards), **options), 12)
    data = ShardDataset("s3://shards/set/manifest.json", store=patient(tmp_path, bucket, max_bytes=MIB))
    loader = TrainLoader(data, workers=2, **options)
    assert take(loader, 12) == expected
    loader.close()
    globbed = patient(tmp_path / "other", bucket).expand("s3://shards/set/shard-*.tar")
    assert globbed == [f"s3://shards/set/shard-{number:06d}.tar" for number in range(4)]


def test_a_shard_of_another_size_than_the_manifest_says_is_refused(bucket, tmp_path):
    with pytest.raises(FetchError, match=rf"it has {len(BIG)} bytes, the manifest says {len(BIG) - 1}"):
        patient(tmp_path, bucket).path(URL, entry("big.tar", BIG[:-1]))
    assert not list(tmp_path.glob("*-big.tar"))


def test_an_object_that_is_rewritten_meanwhile_is_never_joined_with_the_old_one(bucket, tmp_path):
    other = content(2, len(BIG))
    shards = patient(tmp_path, bucket)
    assert shards.path(URL).read_bytes() == BIG
    bucket.put("a/big.tar", other)
    from scale_digrap.data import store as module

    module._checked.clear()  # the next run
    assert patient(tmp_path, bucket).path(URL).read_bytes() == other


@pytest.mark.parametrize("code", ["ExpiredToken", "SignatureDoesNotMatch", "InvalidAccessKeyId"])
def test_credentials_that_are_no_good_are_one_line_at_once(bucket, tmp_path, code, caplog):
    caplog.set_level(logging.INFO)
    bucket.refuse = code
    words = {"ExpiredToken": "credentials have expired", "SignatureDoesNotMatch": "secret key is wrong"}
    shards = patient(tmp_path, bucket, storage_options=bucket.options(token="geheimes token"))
    for call in (
        lambda: shards.path(URL),
        lambda: shards.expand("s3://shards/set/*.tar"),
        lambda: ShardDataset("s3://shards/set/manifest.json", store=shards),
    ):
        with pytest.raises(DataError, match=words.get(code, "does not know this access key")) as raised:
            call()
        assert "Renew them" in str(raised.value)
        assert "geheim" not in str(raised.value) + caplog.text
        assert "\n" not in str(raised.value)
    assert len(bucket.requests) < 12, "no retry mends it"


def test_a_plain_403_may_mean_that_there_is_none(bucket, tmp_path):
    bucket.refuse = "AccessDenied"
    with pytest.raises(FetchError, match="access denied: these credentials may not read it, or it does not exist"):
        patient(tmp_path, bucket).path(URL)
    bucket.refuse = None
    with pytest.raises(FetchError, match=r"s3://shards/a/none\.tar: no such object"):
        patient(tmp_path, bucket).path("s3://shards/a/none.tar")


def test_credentials_come_from_the_environment_or_a_profile(bucket, tmp_path, monkeypatch):
    bucket.keys = {"from environment", "from profile"}
    bare = {"endpoint_url": bucket.endpoint}
    line = entry("big.tar", BIG)
    with pytest.raises(DataError, match="no credentials"):
        patient(tmp_path / "0", bucket, storage_options=bare).path(URL, line)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "from environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "geheim")
    # fsspec keeps file systems by their options, also one that has found no credentials
    options = {**bare, "skip_instance_cache": True}
    assert patient(tmp_path / "1", bucket, storage_options=options).path(URL, line).read_bytes() == BIG
    assert bucket.requests[-1][3] == "from environment"
    (tmp_path / "aws-credentials").write_text(
        "[lab]\naws_access_key_id = from profile\naws_secret_access_key = geheim\n"
    )
    named = {"s3": {**bare, "profile": "lab"}, "gs": {"token": "anon"}}
    assert patient(tmp_path / "2", bucket, storage_options=named).path(URL, line).read_bytes() == BIG
    assert bucket.requests[-1][3] == "from profile"
    with pytest.raises(DataError, match="there is no such profile"):
        patient(tmp_path / "3", bucket, storage_options={**bare, "profile": "none"}).path(URL, line)


def test_a_configuration_names_them(bucket, tmp_path, monkeypatch):
    from scale_digrap.config import load_config
    from scale_digrap.training.data import open_shards

    monkeypatch.setenv("STORE_SECRET", "geheim")
    file = tmp_path / "train.yaml"
    file.write_text(
        json.dumps(
            {
                "run_dir": str(tmp_path / "run"),
                "model": {"path": "none"},
                "data": {
                    "train": ["s3://shards/set/manifest.json"],
                    "cache_dir": str(tmp_path / "cache"),
                    "storage_options": {
                        "endpoint_url": bucket.endpoint,
                        "key": "known",
                        "secret": "${oc.env:STORE_SECRET}",
                    },
                },
            }
        )
    )
    config = load_config(file)
    bucket.keys = {"known"}
    assert len(open_shards(config.data, config.data.train)) == 40
    assert "geheim" not in repr(open_shards(config.data, config.data.train).store.options)


@pytest.mark.parametrize(
    "url", ["s3://KEY:geheim@shards/a.tar", "s3://KEY:ge/heim+=@shards/a.tar", "ftp://u:geheim@h/a"]
)
def test_credentials_in_the_url_of_a_store_are_refused_and_not_shown(tmp_path, url):
    with pytest.raises(DataError, match=r"credentials in a URL are refused.*data\.storage_options") as raised:
        store(tmp_path).expand(url)
    assert not any(word in str(raised.value) for word in ("geheim", "ge/heim", "KEY"))


def test_the_command_line_reaches_the_store_too(bucket, tmp_path, capsys):
    from scale_digrap.cli import main

    url = "s3://shards/set/shard-000000.tar"
    call = ["shards", "info", url, "--cache-dir", str(tmp_path / "c"), "--store", f"endpoint_url={bucket.endpoint}"]
    (tmp_path / "aws-credentials").write_text("[lab]\naws_access_key_id = known\naws_secret_access_key = geheim\n")
    assert main([*call, "--store", "profile=lab"]) == 0
    assert "samples    10" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*call, "--store", "secret=geheim"])
    assert "put it into the environment or a profile" in capsys.readouterr().err.replace("\n", " ")
