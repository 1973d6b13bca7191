"""The loaders that a configuration means."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from scale_digrap.config import Config, DataConfig
from scale_digrap.data.dataset import ShardDataset
from scale_digrap.data.decode import ImageDecoder
from scale_digrap.data.faults import FaultPolicy
from scale_digrap.data.loader import Collate, TrainLoader
from scale_digrap.data.mixture import Mixture
from scale_digrap.data.store import ShardStore
from scale_digrap.runtime.text import home
from scale_digrap.training.engine import Engine


def fault_policy(config: DataConfig) -> FaultPolicy:
    """What ``data.max_bad``, ``data.max_bad_fraction`` and ``data.retries`` say."""
    return FaultPolicy(max_bad=config.max_bad, max_bad_fraction=config.max_bad_fraction, retries=config.retries)


def open_store(config: DataConfig) -> ShardStore:
    """Where shards come from: one for all data sets of a process."""
    return ShardStore(
        cache_dir=None if config.cache_dir is None else Path(home(config.cache_dir)),
        max_bytes=None if config.cache_gb is None else int(config.cache_gb * 1e9),
        timeout_s=config.store_timeout_s,
        retries=config.retries,
        allow_pipe=config.allow_pipe,
        storage_options=config.storage_options,
        cache_shared=config.cache_shared,
        redirect_hosts=config.redirect_hosts,
    )


def open_shards(config: DataConfig, shards: Sequence[str], store: ShardStore | None = None) -> ShardDataset:
    """A data set, with the configuration's decoder, cache and classes.

    Raises:
        DataError: see :class:`ShardDataset`.
    """
    store = open_store(config) if store is None else store
    return ShardDataset(
        shards,
        store=store,
        cache_dir=None if store.cache is None else store.cache.index_folder,
        classes=config.classes or None,
        class_question=config.class_question,
        decoder=ImageDecoder(target_size=config.image_size),
        faults=fault_policy(config),
    )


def train_loader(config: Config, engine: Engine, collate: Collate) -> TrainLoader:
    """This rank's training batches.

    Raises:
        DataError: see :class:`TrainLoader`.
    """
    data = config.data
    store = open_store(data)
    if data.mixture:
        sources = {name: open_shards(data, source.shards, store) for name, source in data.mixture.items()}
        weights = {name: source.weight for name, source in data.mixture.items()}
    else:
        sources, weights = {"train": open_shards(data, data.train, store)}, {"train": 1.0}
    on_this_host = int(os.environ.get("LOCAL_WORLD_SIZE", engine.world_size))
    return TrainLoader(
        Mixture(sources, weights, data.mixture_block, data.mixture_epoch),
        batch_size=config.training.batch_size,
        dp_rank=engine.dp_rank,
        dp_world_size=engine.dp_world_size,
        seed=config.training.seed,
        collate=collate,
        workers=data.workers,
        window=data.window,
        lanes=data.lanes,
        nodes=max(1, engine.world_size // on_this_host) if data.lanes > 1 else 1,
        faults=fault_policy(data),
        bad_log=Path(config.run_dir) / f"bad_samples.rank{engine.rank}.jsonl",
        timeout_s=data.timeout_s,
    )
