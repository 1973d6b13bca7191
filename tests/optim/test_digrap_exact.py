"""DiGraP in one process against the float64 twin with its stored projection."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from scale_digrap import DiGraP
from tests.optim.reference import Layer

SHAPES = {
    "scalar": (),
    "one": (1,),
    "bias": (7,),
    "odd": (5, 13),
    "row": (1, 9),
    "column": (9, 1),
    "conv": (6, 3, 3, 3),
    "wide": (33, 129),
}


def swing(name: str, shape: tuple[int, ...], t: int, theta: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Gradient of a quadratic whose minimum swings about the start, with spells in which it jumps from side to side:
    there <g, δ> changes sign from step to step and ω rises, between them it falls. Deterministic in (name, t)."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)) * 1000)
    direction = torch.randn(shape, generator=generator, dtype=torch.float64)
    generator.manual_seed(sum(map(ord, name)) * 1000 + t + 1)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    jump = 1.5 * (-1) ** t if t % 50 > 15 else 0.0
    return theta.double() - start.double() - direction * (0.5 * math.sin(t / 9) + jump) + 0.1 * noise


def run_both(steps: int, twins: dict[str, Layer], params: dict[str, nn.Parameter], optimizer, lr_of, edit=None) -> dict:
    """Step the optimizer and the twins with the same gradients; the largest drift and ω of each layer on the way."""
    start = {name: twin.theta.clone() for name, twin in twins.items()}
    far = dict.fromkeys(twins, 0.0)
    worst_omega = 0.0
    # ω moves by a normalized step: a hypergradient that is wrong by a factor shows in its moment alone.
    moment, moment_error = dict.fromkeys(twins, 0.0), dict.fromkeys(twins, 0.0)
    for t in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_of(t)
        for name, twin in twins.items():
            gradient = swing(name, tuple(twin.theta.shape), t, twin.theta, start[name]).float()
            if edit is not None:
                gradient = edit(name, t, gradient)
            params[name].grad = gradient
            if gradient is not None:
                twin.step(gradient, lr_of(t))
                far[name] = max(far[name], (twin.theta - start[name]).norm().item())
        optimizer.step()
        for name, stats in optimizer.layer_stats().items():
            worst_omega = max(worst_omega, abs(stats.omega - twins[name].omega))
            ours = float(optimizer.state[params[name]]["omega_exp_avg"])
            moment[name] = max(moment[name], abs(twins[name].a))
            moment_error[name] = max(moment_error[name], abs(ours - twins[name].a))
    assert all(moment_error[name] <= 1e-3 * moment[name] for name in twins), (moment_error, moment)
    errors = {n: (params[n].detach().double() - twins[n].theta).norm().item() / far[n] for n in twins}
    return {"errors": errors, "omega": worst_omega}


@pytest.mark.parametrize(
    ("normalization", "weight_decay", "anchor", "project_when"),
    [
        *[(n, w, a, "conflict") for n in ("row", "tensor") for w in (0.0, 0.1) for a in ("initial", "zero", "mapping")],
        ("row", 0.1, "initial", "agree"),
        ("tensor", 0.0, "zero", "agree"),
    ],
)
def test_200_steps_equal_the_twin(normalization, weight_decay, anchor, project_when):
    torch.manual_seed(0)
    params = {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    anchors = {
        "initial": {n: p.detach().clone() for n, p in params.items()},
        "zero": {n: torch.zeros_like(p) for n, p in params.items()},
        "mapping": {n: p.detach() + 0.05 * torch.randn_like(p) for n, p in params.items()},
    }[anchor]
    options = {"normalization": normalization, "weight_decay": weight_decay, "project_when": project_when}
    optimizer = DiGraP(params.items(), omega_lr=0.05, anchor=anchors if anchor == "mapping" else anchor, **options)
    twins = {n: Layer(p.detach(), anchors[n], omega_lr=0.05, **options) for n, p in params.items()}

    def edit(name: str, t: int, gradient: torch.Tensor) -> torch.Tensor:
        if name == "wide" and 40 <= t < 80:
            gradient[3:9] = 0  # rows without a gradient for a while
        return gradient

    result = run_both(200, twins, params, optimizer, lambda t: 1e-2 * (0.6 + 0.4 * math.cos(t / 30)), edit)
    # With "agree" and ω = 1 next to nothing of g is left, and Adam scales its rounding up: the twin's own formulas in
    # float32, projection stored, are up to 2.4e-4 away from float64 on this run.
    assert max(result["errors"].values()) <= (1e-4 if project_when == "conflict" else 1e-3), result
    assert result["omega"] <= 1e-3
    # The run says nothing unless the method did something in it.
    stats = optimizer.layer_stats()
    for name, twin in twins.items():
        assert 0.05 < twin.conflicts / 200 < 0.95, name
        assert stats[name].conflict_rate == pytest.approx(twin.conflicts / 200, abs=0.011), name
        drift = (twin.theta - twin.anchor).norm().item()
        assert stats[name].drift == pytest.approx(drift, rel=0.2, abs=0.02), name
    assert sum(max(twin.omegas) > 0.05 for twin in twins.values()) >= 6


def test_layers_without_gradient_keep_their_own_step_count():
    torch.manual_seed(1)
    params = {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    optimizer = DiGraP(params.items(), omega_lr=0.05)
    twins = {n: Layer(p.detach(), p.detach(), omega_lr=0.05) for n, p in params.items()}

    def edit(name: str, t: int, gradient: torch.Tensor) -> torch.Tensor | None:
        skip = (name == "odd" and (t < 3 or t % 4 == 0)) or (name == "bias" and t % 2)
        return None if skip else gradient

    result = run_both(120, twins, params, optimizer, lambda t: 1e-2, edit)
    assert max(result["errors"].values()) <= 1e-4, result
    assert result["omega"] <= 1e-3
    assert optimizer.state[params["odd"]]["step"] == twins["odd"].t < 120


def test_groups_with_their_own_options():
    torch.manual_seed(2)
    params = {name: nn.Parameter(torch.randn(4, 6)) for name in ("a", "b", "c", "head")}
    per_group = {
        "a": {"normalization": "tensor", "omega_lr": 0.2},
        "b": {"anchor": "zero", "omega_max": 0.3, "omega_betas": (0.8, 0.99)},
        "c": {"project_when": "agree", "weight_decay": 0.05},
        "head": {"anchor": None},
    }
    groups = [{"params": [(n, params[n])], **options} for n, options in per_group.items()]
    optimizer = DiGraP(groups, omega_lr=0.05)
    twins = {}
    for name, options in per_group.items():
        options = {"omega_lr": 0.05} | options
        kind = options.pop("anchor", "initial")
        start = params[name].detach()
        anchor = {"initial": start, "zero": torch.zeros_like(start), None: None}[kind]
        twins[name] = Layer(start, anchor, **options)
    result = run_both(150, twins, params, optimizer, lambda t: 1e-2)
    agree = result["errors"].pop("c")
    assert agree <= 1e-3
    assert max(result["errors"].values()) <= 1e-4, result
    assert result["omega"] <= 1e-3
    assert set(optimizer.layer_stats()) == {"a", "b", "c"}, "a layer without an anchor has no drift to tell of"
    assert max(twins["b"].omegas) == pytest.approx(0.3), "the bound of its own was reached"


def test_layers_without_anchor_are_adamw():
    torch.manual_seed(3)
    ours = nn.Parameter(torch.randn(5, 4))
    theirs = nn.Parameter(ours.detach().clone())
    a = DiGraP([ours], lr=1e-2, weight_decay=0.1, anchor=None)
    b = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, fused=True)
    for _ in range(20):
        ours.grad = torch.randn(5, 4)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    assert torch.equal(ours, theirs)
    assert set(a.state[ours]) >= {"step", "exp_avg", "exp_avg_sq"}
    assert "anchor" not in a.state[ours]


def test_channels_last_weights_are_updated_in_place():
    torch.manual_seed(4)
    plain = {"conv": nn.Parameter(torch.randn(6, 3, 3, 3)), "linear": nn.Parameter(torch.randn(4, 5))}
    strided = {
        "conv": nn.Parameter(plain["conv"].detach().clone(memory_format=torch.channels_last)),
        "linear": nn.Parameter(plain["linear"].detach().t().contiguous().t()),
    }
    strided["conv"].data = strided["conv"].data.contiguous(memory_format=torch.channels_last)
    assert not strided["conv"].is_contiguous()
    assert not strided["linear"].is_contiguous()
    for normalization in ("row", "tensor"):
        results = []
        for params in (plain, strided):
            copies = {n: nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for n, p in params.items()}
            optimizer = DiGraP(copies.items(), lr=1e-2, omega_lr=0.05, normalization=normalization)
            for t in range(60):
                for name, param in copies.items():
                    gradient = swing(name, tuple(param.shape), t, param.detach(), plain[name].detach())
                    param.grad = torch.empty_like(param).copy_(gradient)
                optimizer.step()
            assert max(stats.omega for stats in optimizer.layer_stats().values()) >= 0
            results.append({n: p.detach() for n, p in copies.items()})
        for name in plain:
            travelled = (results[0][name] - plain[name]).norm()
            assert (results[0][name] - results[1][name]).norm() <= 1e-5 * travelled


def test_large_layers_are_cut_into_blocks_without_a_trace():
    """Layers larger than one block: the sums must not depend on where they are cut."""
    torch.manual_seed(5)
    shapes = {"matrix": (700, 777), "vector": (600_001,), "one long row": (1, 300_001), "long rows": (2, 270_000)}
    params = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    for normalization in ("row", "tensor"):
        copies = {n: nn.Parameter(p.detach().clone()) for n, p in params.items()}
        options = {"normalization": normalization, "omega_lr": 0.05}
        twins = {n: Layer(p.detach(), p.detach(), **options) for n, p in copies.items()}
        optimizer = DiGraP(copies.items(), lr=1e-2, **options)
        result = run_both(26, twins, copies, optimizer, lambda t: 1e-2)
        assert max(result["errors"].values()) <= 2e-5
        assert result["omega"] <= 1e-3
        assert all(max(twin.omegas) > 0.05 for twin in twins.values()), "sums that are never used show nothing"
