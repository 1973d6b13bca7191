"""Parameters that a library shards after the optimizer was made are followed; what cannot be followed is refused."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from scale_digrap import DiGraP
from scale_digrap.optim.anchored import UnattachedError
from tests.optim.test_changing_options import TWINS, make, run, starts

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_accelerates_fsdp2_is_one_process(tmp_path: Path):
    """Made before sharding, with and without state; saved and loaded by Accelerate on the way."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    command += ["--master_port", str(port), str(ROOT / "tests" / "optim" / "accelerate_launched.py"), str(tmp_path)]
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    assert "DiGraP follows 21 of 21 parameters that were replaced" in done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 8
    for case, figures in found.items():
        # FTP holds the layers near θ0: a rounding of θ is more of a shorter way
        assert figures["error"] <= (5e-5 if "FTP" in case else 1e-5), case
        assert figures["omega"] <= 1e-4, case
        assert figures["largest"] <= 64 * 32 // 2, f"{case}: state was made whole"
        assert figures["kinds"] == ["DTensor"], case
    assert found["DiGraP"]["resumed"] == 0.0


def replace(optimizer: DiGraP, new: list[nn.Parameter]) -> None:
    at = iter(new)
    for group in optimizer.param_groups:
        group["params"] = [next(at) for _ in group["params"]]


def with_gradients(values: Sequence[torch.Tensor]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(value.detach().clone()) for value in values]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return parameters


@pytest.mark.parametrize("name", TWINS)
def test_replaced_parameters_are_followed_by_order_and_shape(name, caplog):
    straight, first = make(name, starts())
    run(straight, first, range(10))

    parameters, optimizer = make(name, starts())
    optimizer.init_state()
    new = [nn.Parameter(p.detach().clone()) for p in parameters]
    replace(optimizer, new)
    with caplog.at_level(logging.INFO):
        run(new, optimizer, range(10))
    assert caplog.text.count("follows 3 of 3 parameters") == 1
    assert "'p0'" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(new, straight, strict=True))
    assert list(optimizer.layer_stats()) == ["p0", "p1", "p2"]
    assert set(optimizer.state) == set(new), "nothing is kept for the old ones"


def test_parameters_that_were_given_are_not_kept_in_memory():
    parameters, optimizer = make("digrap", starts())
    gone = weakref.ref(parameters[0])
    replace(optimizer, [nn.Parameter(p.detach().clone()) for p in parameters])
    del parameters
    assert gone() is None


def test_what_cannot_be_followed_is_refused_by_cause():
    parameters, optimizer = make("digrap", starts())
    replace(optimizer, with_gradients([torch.zeros(6, 4), *parameters[1:]]))
    with pytest.raises(UnattachedError, match=r"where 'p0' \(torch.float32 \(6, 5\)\) stood, there is torch.float32"):
        optimizer.step()

    parameters, optimizer = make("digrap", starts())
    run(parameters, optimizer, range(3))
    replace(optimizer, with_gradients(parameters))
    with pytest.raises(UnattachedError, match="it has taken 3 steps before"):
        optimizer.step()

    parameters, optimizer = make("digrap", starts())
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": [torch.zeros(61, requires_grad=True)]}]
    optimizer.param_groups[0]["params"][0].grad = torch.ones(61)
    with pytest.raises(UnattachedError, match=r"there are 1 of them.*scale_digrap\.deepspeed\.attach\(engine\)"):
        optimizer.step()


def sharded_in_mid_run() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = DiGraP(model.named_parameters(), lr=0.01)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    fully_shard(model)
    replace(optimizer, list(model.parameters()))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(UnattachedError, match=r"taken 1 steps before.*sharded after the optimizer was made"):
        optimizer.step()

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = DiGraP([{"params": model[0].named_parameters("0")}, {"params": model[1].named_parameters("1")}])
    fully_shard(model)
    optimizer.param_groups[1]["params"] = list(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(UnattachedError, match=r"there are 6 of them.*sharded after the optimizer was made"):
        optimizer.step()
    dist.barrier()


@pytest.mark.distributed
def test_a_model_sharded_in_mid_run_is_refused_as_such(dist_pool):
    dist_pool(2).run(sharded_in_mid_run)
