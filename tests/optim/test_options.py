"""What constructors and parameter groups accept: as torch's optimizers do, or refused by name."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

from scale_digrap import AdamFTP, DiGraP
from scale_digrap.bounds import OPTION_BOUNDS
from scale_digrap.config import load_config
from tests.optim.test_changing_options import TWINS, gradient, make, run, starts

HABITS = {
    "foreach": None, "fused": None, "capturable": False, "maximize": False, "amsgrad": False, "differentiable": False,
}  # fmt: skip


@pytest.mark.parametrize("name", TWINS)
def test_keywords_of_adamw_at_their_defaults(name):
    method, _, _ = TWINS[name]
    optimizer = method([nn.Parameter(torch.ones(2))], lr=0.1, **HABITS)
    assert not set(HABITS) & set(optimizer.param_groups[0])
    method([nn.Parameter(torch.ones(2))], fused=True)
    method([nn.Parameter(torch.ones(2))], foreach=False)
    for key in ("amsgrad", "maximize", "capturable", "differentiable"):
        with pytest.raises(ValueError, match=f"{method.__name__} does not support {key}=True"):
            method([nn.Parameter(torch.ones(2))], **{key: True})
        with pytest.raises(ValueError, match=f"{method.__name__} does not support {key}=True"):
            method([{"params": [nn.Parameter(torch.ones(2))], key: True}])
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'betass'; did you mean 'betas'"):
        method([nn.Parameter(torch.ones(2))], betass=(0.9, 0.99))


@pytest.mark.parametrize("name", TWINS)
def test_foreign_keys_of_groups_are_carried_along(name, caplog):
    method, _, _ = TWINS[name]
    foreign = {"lr_mult": 0.1, "lr_scale": 2.0, "fused": None, "group_name": "decay", "max_lr": 1.0, "layer": 3}
    parameter = nn.Parameter(torch.ones(2))
    with caplog.at_level(logging.INFO):
        optimizer = method([{"params": [("w", parameter)], **foreign}], lr=0.1)
    assert "lr_mult, lr_scale, group_name" in caplog.text
    saved = copy.deepcopy(optimizer.state_dict())
    assert {key: saved["param_groups"][0][key] for key in foreign} == foreign
    optimizer.load_state_dict(saved)
    assert {key: optimizer.param_groups[0][key] for key in foreign} == foreign
    assert set(optimizer.param_groups[0]) == set(saved["param_groups"][0]), "no key appears after loading"
    again = copy.deepcopy(optimizer)
    assert set(again.param_groups[0]) == set(saved["param_groups"][0])
    plain = nn.Parameter(torch.ones(2))
    other = method([("w", plain)], lr=0.1)
    for p, o in ((parameter, optimizer), (plain, other)):
        p.grad = torch.tensor([1.0, -2.0])
        o.step()
    assert torch.equal(parameter, plain)


@pytest.mark.parametrize("name", TWINS)
def test_what_is_no_group_or_no_number(name):
    method, _, _ = TWINS[name]
    parameter = nn.Parameter(torch.ones(2))
    optimizer: Any = method([parameter])
    with pytest.raises(TypeError, match="param_group must be a dict, but got <class 'list'>"):
        optimizer.add_param_group([nn.Parameter(torch.ones(2))])
    assert len(optimizer.param_groups) == 1
    for options, message in (
        ({"lr": "1e-3"}, "Invalid learning rate: '1e-3' .must be a number, not str"),
        ({"lr": None}, "Invalid learning rate: None"),
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
        ({"lr": torch.tensor([0.1, 0.2])}, "Tensor lr must be 1-element"),
        ({"betas": ("0.9", 0.99)}, r"Invalid betas\[0\]: '0.9'"),
        ({"betas": 0.9}, "Invalid betas: 0.9 .must be a pair"),
        ({"weight_decay": "0.1"}, "Invalid weight_decay value: '0.1'"),
    ):
        with pytest.raises(ValueError, match=message):
            method([parameter], **options)
        with pytest.raises(ValueError, match=message):
            method([{"params": [parameter], **options}])


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("lr", [torch.tensor(0.02, dtype=torch.float64), torch.tensor([0.02], dtype=torch.float64)])
def test_a_tensor_as_learning_rate(name, lr):
    results = []
    for rate in (0.02, lr):
        parameters, optimizer = make(name, starts())
        for group in optimizer.param_groups:
            group["lr"] = rate
        for t in range(6):
            for index, p in enumerate(parameters):
                p.grad = gradient(t, index)
            optimizer.step()
        results.append(parameters)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bounds_are_data_that_the_configuration_reads():
    assert DiGraP.bounds is OPTION_BOUNDS
    assert "omega_max" in DiGraP.bounds
    assert AdamFTP.bounds["k"].high == 1
    for text in ("optimizer.omega_lr=0", "optimizer.omega_max=1000000.0", "optimizer.omega_max=0"):
        load_config(None, [text, "data.train=[a.tar]", "run_dir=runs/bounds"])
    with pytest.raises(Exception, match=r"optimizer.omega_max must be at least 0, got -1"):
        load_config(None, ["optimizer.omega_max=-1", "data.train=[a.tar]", "run_dir=runs/bounds"])


def test_omega_above_one_and_a_rate_of_zero():
    """κ > 1 is legal, and ω gets there; with μ = 0 it stays."""
    parameters, optimizer = make("digrap", starts())
    for group in optimizer.param_groups:
        group["omega_max"] = 1e6
        group["omega_lr"] = 5.0
    run(parameters, optimizer, range(30))
    assert max(stats.omega for stats in optimizer.layer_stats().values()) > 1
    held, still = make("digrap", starts())
    for group in still.param_groups:
        group["omega_lr"] = 0.0
    run(held, still, range(30))
    assert {stats.omega for stats in still.layer_stats().values()} == {0.0}


def test_ftp_with_a_zero_anchor_says_what_its_first_step_does(caplog):
    a = nn.Parameter(torch.randn(3, 4))
    optimizer = AdamFTP([{"params": [("q.lora_A", a)], "anchor": "zero"}], lr=1e-3)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            a.grad = torch.ones(3, 4)
            optimizer.step()
    said = [record.getMessage() for record in caplog.records if "AdamFTP" in record.getMessage()]
    assert len(said) == 1
    assert "'q.lora_A'" in said[0]
    assert "anchor='initial'" in said[0]
    caplog.clear()
    AdamFTP([nn.Parameter(torch.randn(3))]).init_state()
    assert not caplog.records
