"""DiGraP on real gloo ranks against one process, for every kind of sharding it supports."""

from __future__ import annotations

import numpy as np
import pytest

from tests.optim.sharded_problem import train_alone, train_sharded, worst_error

pytestmark = pytest.mark.distributed


def check(results: list[dict], reference: dict, tolerance: float) -> None:
    for result in results:
        assert worst_error(result, reference) <= tolerance
        # Bitwise the same ω, moments, signs and counts on every rank and replica.
        assert np.array_equal(result["packed"], results[0]["packed"])
        assert repr(result["stats"]) == repr(results[0]["stats"])  # repr: NaN equals NaN
        assert result["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
        assert set(result["collectives"]) == {1}, "one all-reduce per step, for all layers"
    for name, stats in reference["stats"].items():
        assert results[0]["stats"][name].omega == pytest.approx(stats.omega, abs=1e-4), name
        assert results[0]["stats"][name].drift == pytest.approx(stats.drift, rel=1e-4), name


@pytest.mark.parametrize(("world", "normalization"), [(2, "row"), (4, "row"), (2, "tensor")])
def test_fsdp2_200_steps(dist_pool, world, normalization):
    options = {"normalization": normalization, "weight_decay": 0.05}
    reference = train_alone(world, 200, options)
    results = dist_pool(world).run(train_sharded, "fsdp2", 200, options)
    check(results, reference, 1e-5)
    assert results[0]["peak_omega"] > 0.05, "without ω > 0 nothing was projected and the run says nothing"
    assert any(0.1 < stats.conflict_rate < 0.9 for stats in results[0]["stats"].values())


@pytest.mark.parametrize(
    ("kind", "world", "options", "accumulate"),
    [
        ("fsdp2", 2, {}, 3),
        ("columns", 2, {}, 1),
        ("columns", 4, {"normalization": "tensor"}, 1),
        ("columns", 4, {"weight_decay": 0.1}, 1),
        ("hsdp", 4, {}, 1),
        ("ddp", 2, {}, 1),
        ("ddp", 4, {}, 2),
        ("fsdp1", 2, {}, 1),
        ("fsdp1", 4, {"weight_decay": 0.05}, 2),
        ("fsdp1", 4, {"normalization": "tensor"}, 1),
    ],
)
def test_short_runs(dist_pool, kind, world, options, accumulate):
    reference = train_alone(world, 30, options, accumulate)
    results = dist_pool(world).run(train_sharded, kind, 30, options, accumulate)
    check(results, reference, 1e-6)
    assert results[0]["peak_omega"] > 0.01


def test_mixed_precision_with_fp32_parameters(dist_pool):
    """Compute in bf16, parameters and reduction in fp32: as one process that rounds the weights itself."""
    reference = train_alone(2, 30, {}, mixed=True)
    results = dist_pool(2).run(train_sharded, "mixed", 30, {})
    check(results, reference, 1e-6)
