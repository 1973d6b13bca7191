"""DiGraP as users of torch.optim.AdamW expect it, and what it refuses."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

import scale_digrap
from scale_digrap import DiGraP, LayerStats


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def loss_of(net: nn.Module, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (net(torch.randn(8, 6, generator=generator)) - torch.randn(8, 4, generator=generator)).square().mean()


def test_public_names():
    assert scale_digrap.DiGraP is DiGraP
    assert {"DiGraP", "LayerStats"} <= set(dir(scale_digrap))
    with pytest.raises(AttributeError, match="no attribute 'Digrap'"):
        scale_digrap.Digrap  # noqa: B018


@pytest.mark.parametrize("form", ["parameters", "pairs", "groups", "groups of pairs", "generator"])
def test_forms_of_params_train_alike(form):
    net = model()
    params = {
        "parameters": lambda: list(net.parameters()),
        "pairs": lambda: list(net.named_parameters()),
        "groups": lambda: [{"params": net[0].parameters()}, {"params": net[2].parameters()}],
        "groups of pairs": lambda: [{"params": net[0].named_parameters("0")}, {"params": net[2].named_parameters("2")}],
        "generator": lambda: net.named_parameters(),
    }[form]()
    optimizer = DiGraP(params, lr=1e-2)
    for seed in range(5):
        optimizer.zero_grad()
        loss_of(net, seed).backward()
        optimizer.step()
    names = list(optimizer.layer_stats())
    assert names == (["0.weight", "0.bias", "2.weight", "2.bias"] if "pairs" in form or form == "generator" else names)
    assert len(names) == 4

    expected = model()
    plain = DiGraP(expected.named_parameters(), lr=1e-2)
    for seed in range(5):
        plain.zero_grad()
        loss_of(expected, seed).backward()
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), expected.parameters(), strict=True))


def test_steady_drift_is_adamw():
    """ω stays 0 under a constant direction: then DiGraP is AdamW, bit for bit."""
    ours, theirs = nn.Parameter(torch.randn(4, 3)), None
    theirs = nn.Parameter(ours.detach().clone())
    a, b = DiGraP([ours], lr=1e-3, weight_decay=0.0), torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.0, fused=True)
    for _ in range(30):
        ours.grad, theirs.grad = torch.ones(4, 3), torch.ones(4, 3)
        a.step()
        b.step()
    assert torch.equal(ours, theirs)
    (stats,) = a.layer_stats().values()
    assert stats == LayerStats(
        omega=0.0,
        conflict=True,  # −g points on along the drift, away from the start
        conflict_rate=pytest.approx(29 / 30),
        drift=stats.drift,
        relative_drift=stats.relative_drift,
        cosine=pytest.approx(-1.0, rel=1e-6),
        grad_norm=pytest.approx(math.sqrt(12)),
    )
    assert a.grad_norm() == pytest.approx(math.sqrt(12))


def test_closure_hooks_schedulers_and_zero_grad():
    net = model()
    optimizer = DiGraP(net.named_parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        return loss

    losses = []
    for _ in range(10):
        losses.append(float(optimizer.step(closure)))
        schedule.step()
    assert losses[-1] < losses[0]
    assert calls == ["before", "after"] * 10
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_lr_of_zero_at_the_start_of_a_warm_up_counts_as_a_step():
    parameter = nn.Parameter(torch.randn(3, 3))
    optimizer = DiGraP([parameter], lr=1e-2)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: t / 10)
    parameter.grad = torch.ones(3, 3)
    optimizer.step()
    assert optimizer.state[parameter]["step"] == 1


def test_tensor_lr_equals_float_lr():
    results = []
    for lr in (1e-2, torch.tensor(1e-2, dtype=torch.float64)):
        net = model()
        optimizer = DiGraP(net.named_parameters(), lr=lr)
        for seed in range(5):
            optimizer.zero_grad()
            loss_of(net, seed).backward()
            optimizer.step()
        results.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_add_param_group_in_mid_run_and_unfreezing():
    net = model()
    net[2].bias.requires_grad_(False)
    optimizer = DiGraP(net[0].named_parameters("0"), lr=1e-2)
    loss_of(net).backward()
    optimizer.step()
    optimizer.add_param_group({"params": net[2].named_parameters("2"), "lr": 1e-3, "anchor": "zero"})
    before = net[2].bias.detach().clone()
    for seed in range(3):
        optimizer.zero_grad()
        loss_of(net, seed).backward()
        optimizer.step()
    assert torch.equal(net[2].bias, before)
    assert optimizer.state[net[0].weight]["step"] == 4
    assert optimizer.state[net[2].weight]["step"] == 3
    assert "2.bias" not in optimizer.layer_stats()
    net[2].bias.requires_grad_(True)
    loss_of(net).backward()
    optimizer.step()
    assert optimizer.state[net[2].bias]["step"] == 1
    assert not torch.equal(net[2].bias, before)


def test_grad_scaler_and_clipping():
    net = model()
    optimizer = DiGraP(net.named_parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(net)).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.grad_norm() == pytest.approx(0.1, rel=1e-3), "as it was given: after clipping"


def test_gradients_are_not_written_to():
    parameter = nn.Parameter(torch.randn(4, 4))
    optimizer = DiGraP([parameter], lr=1e-2, omega_lr=0.0)
    optimizer.init_state()
    optimizer.state[parameter]["omega"].fill_(1.0)
    for seed in range(4):
        torch.manual_seed(seed)
        gradient = torch.randn(4, 4)
        parameter.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize(
    ("values", "anchor_dtype", "expected"),
    [
        (torch.tensor([1.0, 0.5, -2.0]), "auto", torch.bfloat16),
        (torch.tensor([1.0, 0.1, -2.0]), "auto", torch.float32),
        (torch.tensor([1.0, 0.5, -2.0]), "float32", torch.float32),
        (torch.tensor([1.0, 0.5, -2.0]), torch.bfloat16, torch.bfloat16),
    ],
)
def test_anchor_dtype(values, anchor_dtype, expected):
    parameter = nn.Parameter(values)
    optimizer = DiGraP([parameter], anchor_dtype=anchor_dtype)
    optimizer.init_state()
    assert optimizer.state[parameter]["anchor"].dtype == expected
    assert torch.equal(optimizer.state[parameter]["anchor"].float(), values)


def test_memory_of_the_state():
    """2 bytes a parameter over AdamW for an exact bf16 anchor, next to nothing for LoRA."""
    sizes = {}
    for anchor in ("initial", "zero", None):
        parameter = nn.Parameter(torch.randn(300, 200).bfloat16().float())
        optimizer = DiGraP([parameter], anchor=anchor)
        optimizer.init_state()
        tensors = optimizer.state[parameter].values()
        sizes[anchor] = sum(x.numel() * x.element_size() for x in tensors) / parameter.numel()
    assert sizes["initial"] == pytest.approx(10.0, abs=0.01)
    assert sizes["zero"] == pytest.approx(8.0, abs=0.01)
    assert sizes[None] == pytest.approx(8.0, abs=0.01)


def test_non_finite_gradient_skips_all_layers_and_is_counted(caplog):
    net = model()
    optimizer = DiGraP(net.named_parameters(), lr=1e-2)
    for seed in range(4):
        optimizer.zero_grad()
        loss_of(net, seed).backward()
        optimizer.step()
    before = [p.detach().clone() for p in net.parameters()]
    packed = optimizer._packed.clone()
    for bad in (math.nan, math.inf, 1e30):
        net[2].weight.grad[1, 1] = bad
        with caplog.at_level(logging.WARNING):
            optimizer.step()
        assert "non-finite sums in 1 of 4 layers, first 2.weight" in caplog.text
        caplog.clear()
    assert optimizer.skipped_steps == 3
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    assert torch.equal(optimizer._packed, packed), "ω and its moments must never see the sum"
    optimizer.zero_grad()
    loss_of(net).backward()
    optimizer.step()
    assert not torch.equal(net[0].weight, before[0])


def _nan_on_one_rank() -> tuple[int, bool]:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    net = model()
    fully_shard(net)
    optimizer = DiGraP(net.named_parameters(), lr=1e-2)
    optimizer.init_state()
    before = [p.full_tensor().detach() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    grad = net[0].weight.grad
    assert isinstance(grad, DTensor)
    if dist.get_rank() == 1:
        grad.to_local()[0, 0] = math.nan
    optimizer.step()
    return optimizer.skipped_steps, all(
        torch.equal(a, b.full_tensor()) for a, b in zip(before, net.parameters(), strict=True)
    )


@pytest.mark.distributed
def test_nan_on_one_rank_skips_the_step_on_all(dist_pool):
    assert dist_pool(2).run(_nan_on_one_rank) == [(1, True)] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"betas": (1.0, 0.9)}, r"Invalid betas\[0\]: 1.0"),
        ({"omega_betas": (0.9, -0.1)}, r"Invalid omega_betas\[1\]: -0.1"),
        ({"eps": -1e-8}, "Invalid epsilon"),
        ({"weight_decay": -0.1}, "Invalid weight_decay"),
        ({"omega_lr": -0.5}, "Invalid omega_lr"),
        ({"omega_max": -0.5}, r"Invalid omega_max: -0.5 \(must be at least 0\)"),
        ({"normalization": "rows"}, "Invalid normalization: 'rows' .use 'row' or 'tensor'"),
        ({"project_when": "always"}, "Invalid project_when: 'always'"),
        ({"anchor": "pretrained"}, "Invalid anchor: 'pretrained'"),
        ({"anchor_dtype": torch.float16}, "Invalid anchor_dtype: 'float16'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DiGraP([nn.Parameter(torch.zeros(2, 2))], **options)
    with pytest.raises(ValueError, match=message):  # per group as well
        DiGraP([{"params": [nn.Parameter(torch.zeros(2, 2))], **options}])


def test_unknown_options_are_refused_with_the_nearest_name():
    with pytest.raises(TypeError, match="omega_learning_rate"):
        DiGraP([nn.Parameter(torch.zeros(2))], omega_learning_rate=0.5)
    with pytest.raises(ValueError, match=r"unknown option 'omega_lrs' in a parameter group; did you mean 'omega_lr'"):
        DiGraP([{"params": [nn.Parameter(torch.zeros(2))], "omega_lrs": 0.5}])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_refused_before_the_first_step(dtype):
    parameter = nn.Parameter(torch.zeros(2, 2, dtype=dtype))
    optimizer = DiGraP([("proj.weight", parameter)])
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match=r"'proj.weight' is torch\.\w+16.*float32.*autocast"):
        optimizer.step()
    assert not parameter.any()
    frozen = nn.Parameter(torch.zeros(2, 2, dtype=dtype), requires_grad=False)
    DiGraP([frozen, nn.Parameter(torch.zeros(2))]).init_state()  # a frozen base may be in any precision


def test_sparse_and_complex_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = DiGraP(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients are not supported.*sparse=False"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"parameter phase is complex"):
        DiGraP([("phase", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))])


def test_anchor_mappings_are_checked():
    net = model()
    anchors = {name: p.detach() + 1 for name, p in net.named_parameters()}
    with pytest.raises(ValueError, match=r"lacks 1 of 4 layers, among them '2.bias'"):
        DiGraP(net.named_parameters(), anchor={k: v for k, v in anchors.items() if k != "2.bias"})
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(6, 5\), the layer has \(5, 6\)"):
        DiGraP(net.named_parameters(), anchor=anchors | {"0.weight": torch.zeros(6, 5)})
    with pytest.raises(ValueError, match="needs named parameters"):
        DiGraP(net.parameters(), anchor=anchors)
    optimizer = DiGraP(net.named_parameters(), anchor=anchors)
    optimizer.init_state()
    for name, p in net.named_parameters():
        assert torch.equal(optimizer.state[p]["anchor"].float(), anchors[name])
        anchors[name].zero_()
        assert optimizer.state[p]["anchor"].any(), "the optimizer keeps values of its own"
    assert optimizer.state_dict()["param_groups"][0]["anchor"] == "mapping", "no tensors in the groups of a checkpoint"


def test_inexact_bfloat16_anchor_is_refused():
    with pytest.raises(ValueError, match=r"'w' is not exact in bfloat16"):
        DiGraP([("w", nn.Parameter(torch.tensor([0.1])))], anchor_dtype="bfloat16").init_state()


def test_two_layers_of_one_name_are_refused():
    groups = [{"params": [("w", nn.Parameter(torch.zeros(2)))]}, {"params": [("w", nn.Parameter(torch.zeros(2)))]}]
    with pytest.raises(ValueError, match="two layers are named 'w'"):
        DiGraP(groups).init_state()


def test_telemetry_before_the_first_step_is_an_error():
    optimizer = DiGraP(model().named_parameters())
    with pytest.raises(RuntimeError, match="no step has been taken"):
        optimizer.layer_stats()
    with pytest.raises(RuntimeError, match="no step has been taken"):
        optimizer.grad_norm()


def test_relative_drift():
    start = torch.tensor([[3.0, 4.0]])
    parameter = nn.Parameter(start.clone())
    optimizer = DiGraP([("w", parameter)], lr=0.1)
    for _ in range(2):
        parameter.grad = torch.ones(1, 2)
        optimizer.step()
    drift = optimizer.layer_stats()["w"].drift
    assert drift == pytest.approx(0.1 * math.sqrt(2), rel=1e-4), "before the second update: one Adam step of lr each"
    assert optimizer.layer_stats()["w"].relative_drift == pytest.approx(drift / 5)
    lora = DiGraP([("b", nn.Parameter(torch.zeros(2, 2)))], anchor="zero")
    lora.param_groups[0]["params"][0].grad = torch.ones(2, 2)
    lora.step()
    assert math.isnan(lora.layer_stats()["b"].relative_drift)


def test_telemetry_of_a_layer_that_took_no_part():
    a, b = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3, 3))
    optimizer = DiGraP([("a", a), ("b", b)], lr=1e-2)
    for _ in range(3):
        a.grad, b.grad = torch.ones(3, 3), torch.ones(3, 3)
        optimizer.step()
    before = optimizer.layer_stats()["b"]
    b.grad = None
    optimizer.step()
    after = optimizer.layer_stats()["b"]
    assert after.drift == before.drift > 0, "it has not moved back to its anchor"
    assert (after.grad_norm, after.cosine, after.conflict) == (0.0, 0.0, False)
    assert after.conflict_rate == before.conflict_rate


def test_devices_without_a_fused_kernel_step_alike(monkeypatch):
    from scale_digrap.optim import functional

    results = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(functional, "_FUSED_DEVICES", frozenset())
        net = model()
        optimizer = DiGraP(net.named_parameters(), lr=1e-2, weight_decay=0.1, omega_lr=0.0)
        optimizer.init_state()
        for p in net.parameters():
            optimizer.state[p]["omega"].fill_(0.5)
        for seed in range(20):
            optimizer.zero_grad()
            loss_of(net, seed).backward()
            optimizer.step()
        results.append([p.detach().clone() for p in net.parameters()])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_float64_beside_float32():
    torch.manual_seed(0)
    singles = [("s", nn.Parameter(torch.randn(4, 3))), ("s2", nn.Parameter(torch.randn(2, 3)))]
    doubles = [("d", nn.Parameter(singles[0][1].detach().double()))]
    optimizer = DiGraP(singles + doubles, lr=1e-2, omega_lr=0.05)
    for t in range(30):
        generator = torch.Generator().manual_seed(t)
        for _, p in singles + doubles:
            p.grad = torch.randn(4, 3, generator=generator.manual_seed(t))[: len(p)].to(p.dtype)
        optimizer.step()
    assert doubles[0][1].dtype == torch.float64
    assert torch.allclose(singles[0][1].double(), doubles[0][1], atol=1e-5)
