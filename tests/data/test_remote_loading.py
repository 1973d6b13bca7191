"""Loaders over a web server: the same stream as from local files, through a cache that holds a part of the shards."""

import pytest

from scale_digrap.data.dataset import ShardDataset
from scale_digrap.data.errors import DataError
from scale_digrap.data.index import index_shards
from scale_digrap.data.loader import EvalLoader, TrainLoader
from scale_digrap.data.store import ShardStore
from tests.data import made
from tests.data.made import flat, numbers, take
from tests.data.web import Site, serve

SAMPLES, PER_SHARD = 60, 5


@pytest.fixture
def site(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    made.write(folder, SAMPLES, PER_SHARD)
    index_shards(sorted(folder.glob("*.tar"))).save(folder / "manifest.json")
    with serve(Site({f"/{p.name}": p.read_bytes() for p in folder.iterdir() if p.suffix != ".idx"})) as served:
        yield served


def remote(site, cache, **options):
    size = len(site.files["/shard-000000.tar"])
    options = {"max_bytes": 8 * size, "timeout_s": 2, "retries": 2, "backoff_s": 0.01, **options}
    store = ShardStore(cache_dir=cache, **options)
    return ShardDataset(site.url("/manifest.json"), store=store)


def fetched(site):
    return {path for path, _ in site.requests if path.endswith(".tar")}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_that_of_local_files(site, tmp_path, workers):
    local = str(tmp_path / "served" / "*.tar")
    options = {"batch_size": 5, "collate": numbers, "window": 3, "seed": 2}
    whole = take(TrainLoader(local, **options), 30)
    data = remote(site, tmp_path / "cache")
    assert fetched(site) == set(), "the manifest tells how many samples there are"
    loader = TrainLoader(data, workers=workers, **options)
    assert take(loader, 14) == whole[:14]
    state = loader.state_dict()
    loader.close()
    resumed = TrainLoader(remote(site, tmp_path / "cache"), workers=workers, **options)
    resumed.load_state_dict(state)
    assert take(resumed, 16) == whole[14:]
    resumed.close()
    sizes = [path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")]
    assert sum(sizes) <= 8 * max(sizes), "12 shards went through a cache for 8"


def test_a_rank_fetches_only_its_lane(site, tmp_path):
    options = {"batch_size": 1, "dp_world_size": 2, "lanes": 2, "nodes": 2, "window": 2, "collate": numbers}
    loader = TrainLoader(remote(site, tmp_path / "cache", max_bytes=None), dp_rank=1, **options)
    own = {f"/shard-{number // PER_SHARD:06d}.tar" for batch in take(loader, 3 * SAMPLES // 2) for number in batch}
    loader.close()
    assert len(own) == SAMPLES // PER_SHARD // 2
    assert fetched(site) == own


def test_evaluation_over_the_web(site, tmp_path):
    loader = EvalLoader(remote(site, tmp_path / "cache"), batch_size=7, collate=numbers, workers=1)
    seen = flat([n for n, valid in zip(batch.inputs, batch.valid, strict=True) if valid] for batch in loader)
    assert seen == list(range(SAMPLES))
    loader.verify_coverage()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_cannot_be_had_ends_the_run(site, tmp_path, workers):
    site.faults["/shard-000004.tar"] = [("stall", 100)] * 50
    data = remote(site, tmp_path / "cache", timeout_s=0.2)
    loader = TrainLoader(data, batch_size=5, collate=numbers, workers=workers, window=3)
    with pytest.raises(DataError, match=r"shard-000004\.tar"):
        take(loader, 12)
    loader.close()


def test_a_damaged_shard_behind_a_true_checksum_ends_the_run(site, tmp_path):
    """The manifest was made from the damaged bytes, by someone who did not look."""
    import hashlib
    import json

    name = "/shard-000002.tar"
    broken = made.damaged(site.files[name], "zeroed kilobyte")
    manifest = json.loads(site.files["/manifest.json"])
    manifest["shards"][2].update(sha256=hashlib.sha256(broken).hexdigest(), bytes=len(broken))
    site.files |= {name: broken, "/manifest.json": json.dumps(manifest).encode()}
    loader = TrainLoader(remote(site, tmp_path / "cache"), batch_size=5, collate=numbers)
    with pytest.raises(DataError, match=r"shard-000002\.tar"):
        take(loader, 12)
    loader.close()


def test_without_a_manifest_shards_are_fetched_to_be_counted(site, tmp_path):
    del site.files["/manifest.json"]
    store = ShardStore(cache_dir=tmp_path / "cache", timeout_s=2, retries=1, backoff_s=0.01)
    data = ShardDataset(site.url("/shard-{000000..000002}.tar"), store=store)
    assert len(data) == 15
    assert data[7].key == "s00007"
    assert len(list((tmp_path / "cache" / "index").iterdir())) == 3
    store.close()
