"""The harness itself: a distributed test that cannot fail would be worth nothing."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.dist_pool import DistPool, RankError


def _sum_of_ranks(scale: int) -> float:
    value = torch.tensor(float(dist.get_rank() * scale))
    dist.all_reduce(value)
    return value.item()


def _fail_on_last() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("seven is missing")
    dist.barrier()


def _wait_for_ever() -> None:
    if dist.get_rank() == 0:
        dist.recv(torch.zeros(1), src=1)


@pytest.mark.distributed
def test_results_errors_and_time_limits():
    pool = DistPool(2)
    try:
        assert pool.run(_sum_of_ranks, 10) == [10.0, 10.0]
        with pytest.raises(RankError, match=r"rank 1 of 2(.|\n)*seven is missing"):
            pool.run(_fail_on_last)
        assert pool.run(_sum_of_ranks, 1) == [1.0, 1.0]  # started anew
        with pytest.raises(TimeoutError, match=r"ranks \[0\]"):
            pool.run(_wait_for_ever, timeout=3)
    finally:
        pool.close()
