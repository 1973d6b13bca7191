"""What reads files from outside, by name."""

from __future__ import annotations

from tests.fuzz import mutate, run_readers, shard_readers
from tests.fuzz.cases import Target

TARGETS: dict[str, Target] = {
    "tar headers": Target(shard_readers.shards, {r".*\.tar": mutate.mutated_tar}, shard_readers.read_shards, cost=2),
    "shard indexes": Target(
        shard_readers.indexed, {r".*\.idx": mutate.mutated_index}, shard_readers.read_indexed, cost=2, refuses=False
    ),
    "shard manifests": Target(
        shard_readers.indexed, {r"manifest\.json": mutate.mutated_json}, shard_readers.read_manifest
    ),
    "annotation files": Target(
        shard_readers.annotations,
        {r"[^/]*\.json": mutate.mutated_json, "list.txt": mutate.mutated_bytes},
        shard_readers.read_annotations,
        cost=10,
    ),
    "checkpoint manifests": Target(
        run_readers.checkpoint, {r".*/manifest\.json": run_readers.sealed}, run_readers.read_checkpoint, cost=4
    ),
    "trainer.json": Target(
        run_readers.checkpoint, {r".*/trainer\.json": mutate.mutated_json}, run_readers.read_checkpoint, cost=4
    ),
    "checkpoint metadata": Target(
        run_readers.checkpoint,
        {r".*/state/(\.metadata|.*\.json)": mutate.mutated_bytes},
        run_readers.read_checkpoint,
        cost=4,
    ),
    "checkpoint tensors": Target(
        run_readers.checkpoint, {r".*/state/.*\.distcp": mutate.mutated_bytes}, run_readers.read_checkpoint, cost=5
    ),
    "logs": Target(run_readers.logs, {r".*\.jsonl": mutate.mutated_lines}, run_readers.read_logs, refuses=False),
    "train configurations": Target(
        lambda _: {"train.yaml": run_readers.TRAIN}, {r".*": mutate.mutated_yaml}, run_readers.read_train, cost=2
    ),
    "overrides": Target(
        lambda _: {"train.yaml": run_readers.TRAIN, "overrides": b"optimizer.lr=1e-3"},
        {"overrides": run_readers.overrides},
        run_readers.read_train,
        cost=2,
    ),
    "evaluate configurations": Target(
        lambda _: {"evaluate.yaml": run_readers.EVALUATE},
        {r".*": mutate.mutated_yaml},
        run_readers.read_evaluate,
        cost=2,
    ),
    "launch files": Target(
        lambda _: {"launch.yaml": run_readers.LAUNCH}, {r".*": mutate.mutated_yaml}, run_readers.read_launch, cost=2
    ),
    "results": Target(
        run_readers.results,
        {r".*\.jsonl": mutate.mutated_lines, r".*\.json": mutate.mutated_json},
        run_readers.read_results,
        cost=3,
    ),
    "parts of predictions": Target(
        run_readers.predictions,
        {r".*\.jsonl": mutate.mutated_lines, r".*\.json": mutate.mutated_json},
        run_readers.read_parts,
    ),
}
