"""DeepSpeed ZeRO on two ranks against FSDP2 on two ranks and against one process: the same model from the same data."""

import pytest
import torch

from tests.models import tiny
from tests.training import runs

pytestmark = pytest.mark.distributed

LORA = {"enabled": True, "rank": 2}
DIGRAP = {"name": "digrap", "lr": 1e-2, "omega_lr": 2.0}


def zero(stage, **options):
    # Below DeepSpeed's threshold ZeRO-3 keeps parameters whole, and a tiny model has no others.
    threshold = {"param_persistence_threshold": 0} if stage == 3 else {}
    return {"engine": "deepspeed", "zero": {"stage": stage, **threshold, **options}}


def series(folder, model, shards, cases):
    """Several runs, one after another, on one rank."""
    from deepspeed.utils import groups

    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # DeepSpeed makes hpZ's groups only once in a process
    return [runs.run(model, shards, f"{folder}/{i}", **sections) for i, sections in enumerate(cases)]


def compare(dist_pool, folder, model, shards, reference, shardings, *, tolerance=1e-4, batch=4, **start):
    """Every way of sharding against FSDP2 on two ranks and one process; returns FSDP2's outcome."""
    training = {"steps": 3, **reference.get("training", {})}
    common = {"schedule": {"name": "constant"}, **{k: v for k, v in reference.items() if k != "training"}}
    one = runs.run(model, shards, folder / "one", training={**training, "batch_size": 2 * batch}, **common)
    cases = [{"sharding": sharding, "training": {**training, "batch_size": batch}, **common} for sharding in shardings]
    ranks = dist_pool(2).run(series, str(folder / "two"), model, shards, [{**cases[0], "sharding": {}}, *cases])
    fsdp = ranks[0][0]
    way = runs.travelled(one, runs.initial(model, **start))
    assert way > 1e-3
    for sharding, first, second in zip(shardings, ranks[0][1:], ranks[1][1:], strict=True):
        assert first["loss"] == second["loss"], sharding
        assert first["grad_norm"] == second["grad_norm"], sharding
        for other in (fsdp, one):
            assert first["loss"] == pytest.approx(other["loss"], rel=1e-5), sharding
            assert first["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4), sharding
            assert first["trained"] == other["trained"]
            assert runs.distance(first["parameters"], other["parameters"]) < tolerance * way, sharding
    return fsdp


STAGES = [zero(stage) for stage in range(4)]
SETTINGS = [
    *STAGES,
    zero(1, round_robin_gradients=True, allgather_bucket_size=1000, reduce_bucket_size=500),
    zero(2, offload_optimizer="cpu", overlap_comm=False, extra={"zero_optimization": {"contiguous_gradients": False}}),
    zero(3, sub_group_size=700, param_persistence_threshold=40, reduce_bucket_size=1000, prefetch_bucket_size=500),
    zero(3, offload_optimizer="cpu", offload_param="cpu"),
    zero(3, param_persistence_threshold=100_000),
    zero(3, hpz_partition_size=2, max_live_parameters=1000),
]


@pytest.mark.parametrize("optimizer", ["adamw", "digrap"])
def test_every_setting_trains_the_same_model(dist_pool, checkpoint, shards, tmp_path, optimizer):
    sections = {"optimizer": DIGRAP if optimizer == "digrap" else {"weight_decay": 0.1}, "training": {"clip_norm": 1.0}}
    fsdp = compare(
        dist_pool, tmp_path, checkpoint("paligemma"), shards, sections, SETTINGS,
        tolerance=2e-3 if optimizer == "digrap" else 1e-4,
    )  # fmt: skip
    assert min(fsdp["grad_norm"]) > 1.0, "nothing was clipped"
    if optimizer == "digrap":
        assert fsdp["history"][-1]["omega_mean"] > 0.1
        assert 0.1 < fsdp["history"][-1]["conflict_rate"] < 0.9


OPTIONS = {
    "accumulation": (STAGES, {"training": {"gradient_accumulation": 3, "clip_norm": 0.5}}),
    "recomputation": (STAGES[2:], {"training": {"gradient_accumulation": 2, "activation_checkpointing": True}}),
    "lora": (STAGES[1:], {"lora": LORA, "optimizer": {"name": "digrap"}}),
    "lora-whole-module": (
        STAGES[3:],
        {"lora": {**LORA, "train": ["multi_modal_projector.linear$"]}, "optimizer": {"name": "digrap"}},
    ),
    "lora-recomputation": (STAGES[3:], {"lora": LORA, "training": {"activation_checkpointing": True}}),
    "freeze": (STAGES[1:], {"model": {"freeze": ["vision_tower", "layers.0.*bias"]}}),
    "new-layers": (
        STAGES[2:],
        {"model": {"new_layers": ["multi_modal_projector"]}, "optimizer": {"name": "digrap"}},
    ),
    "all-ranks-load": ([{**zero(3), "load_sharded": False}], {}),
    "ftp": (STAGES[1:], {"optimizer": {"name": "ftp"}}),
    "spd": (STAGES[1:], {"optimizer": {"name": "spd", "strength": 1.0}}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_train_the_same_model(dist_pool, checkpoint, shards, tmp_path, name):
    shardings, sections = OPTIONS[name]
    start = {"lora": sections["lora"]} if "lora" in sections else {}
    tolerance = 2e-3 if "optimizer" in sections else 1e-4
    compare(dist_pool, tmp_path, checkpoint("paligemma"), shards, sections, shardings, tolerance=tolerance, **start)


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family != "paligemma"])
def test_every_family(dist_pool, checkpoint, shards, tmp_path, family):
    compare(dist_pool, tmp_path, checkpoint(family), shards, {}, STAGES[3:])


def test_ranks_without_images(dist_pool, checkpoint, mixed_shards, tmp_path):
    """Two samples of three have no image and a micro-batch is one sample: mostly, a rank or both have none."""
    compare(
        dist_pool, tmp_path, checkpoint("paligemma"), mixed_shards, {"training": {"steps": 6}}, STAGES,
        tolerance=1e-3, batch=1,
    )  # fmt: skip


def narrow(model, shards, folder, cases):
    """Dtypes of parameters, and the final model, of bf16 runs."""
    outcomes = []
    for i, sections in enumerate(cases):
        ran = runs.run(model, shards, f"{folder}/{i}", checkpoint={"save_final": True}, **sections)
        ran["dtypes"] = {name: value.dtype for name, value in ran["parameters"].items()}
        outcomes.append(ran)
    return outcomes


@pytest.mark.parametrize("optimizer", ["adamw", "digrap"])
def test_bf16_has_fp32_masters(dist_pool, checkpoint, shards, tmp_path, optimizer):
    from scale_digrap.config import ModelConfig
    from scale_digrap.models import load_model

    model = checkpoint("paligemma")
    # steps below the rounding of bf16 weights: without masters most weights would never move
    common = {"optimizer": {"name": optimizer, "lr": 1e-5, "eps": 1e-8}, "schedule": {"name": "constant"}}
    training = {"steps": 4, "batch_size": 4, "precision": "bf16", "clip_norm": 1.0}
    shardings = [{}, *STAGES]
    cases = [{**common, "training": training, "sharding": sharding} for sharding in shardings]
    ranks = dist_pool(2).run(narrow, model, shards, str(tmp_path), cases)
    start = runs.initial(model)
    fsdp = ranks[0][0]
    for i, ran in enumerate(ranks[0][1:], start=1):
        assert set(ran["dtypes"].values()) == {torch.bfloat16}
        assert ran["loss"] == pytest.approx(fsdp["loss"], rel=0.03)
        assert ran["loss"] == ranks[1][i]["loss"]
        final = load_model(ModelConfig(path=str(tmp_path / str(i) / "final"))).model.named_parameters()
        masters = {name: value.detach() for name, value in final}
        assert all(value.dtype == torch.float32 for value in masters.values())
        way = {name: float((value - start[name]).abs().max()) for name, value in masters.items()}
        assert 2e-5 < max(way.values()) < 5e-5
        moved = sum(int((value != value.bfloat16()).sum()) for value in masters.values())
        assert moved > 0.5 * sum(value.numel() for value in masters.values())
        for name, value in masters.items():
            assert torch.equal(value.bfloat16(), ran["parameters"][name]), name


def test_lora_in_bf16_has_fp32_adapters_over_a_bf16_base(dist_pool, checkpoint, shards, tmp_path):
    common = {"lora": LORA, "schedule": {"name": "constant"}, "optimizer": {"name": "digrap"}}
    training = {"steps": 3, "batch_size": 4, "precision": "bf16"}
    cases = [{**common, "training": training, "sharding": sharding} for sharding in [{}, *STAGES]]
    fsdp, *others = dist_pool(2).run(narrow, checkpoint("llava"), shards, str(tmp_path), cases)[0]
    for ran in others:
        assert ran["dtypes"] == {n: torch.float32 if "lora_" in n else torch.bfloat16 for n in ran["dtypes"]}
        assert ran["loss"] == pytest.approx(fsdp["loss"], rel=0.02)


def poisoned(model, shards, folder, cases):
    """Runs in which rank 1's loss is NaN in the second step."""
    from scale_digrap.training import loop

    original = loop.answer_loss
    outcomes = []
    for i, sections in enumerate(cases):
        calls = iter(range(100))

        def loss(*args, calls=calls):
            bad = next(calls) == 1 and torch.distributed.get_rank() == 1
            return original(*args) * (float("nan") if bad else 1.0)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "answer_loss", loss)
            outcomes.append(runs.run(model, shards, f"{folder}/{i}", **sections))
    return outcomes


@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "fp32"), ("digrap", "fp32"), ("digrap", "bf16")])
def test_a_step_with_a_non_finite_gradient_is_skipped_by_all(
    dist_pool, checkpoint, shards, tmp_path, optimizer, precision
):
    training = {"steps": 4, "batch_size": 4, "precision": precision}
    common = {"optimizer": {"name": optimizer}, "schedule": {"name": "constant"}, "training": training}
    cases = [{**common, "sharding": sharding} for sharding in [{}, *STAGES]]
    ranks = dist_pool(2).run(poisoned, checkpoint("llava"), shards, str(tmp_path), cases)
    fsdp = ranks[0][0]
    for first, second in zip(*ranks, strict=True):
        assert first["skipped"] == second["skipped"] == 1
        assert [line["skipped_steps"] for line in first["history"]] == [0, 1, 1, 1]
        for i in (0, 2, 3):
            assert first["loss"][i] == pytest.approx(fsdp["loss"][i], rel=1e-5 if precision == "fp32" else 0.03)
        assert first["grad_norm"][1] != first["grad_norm"][1]
        assert all(bool(torch.isfinite(value).all()) for value in first["parameters"].values())
