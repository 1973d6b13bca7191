from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from scale_digrap.evaluation.drift import layer_drift
from scale_digrap.evaluation.wise import WiseError, interpolate
from tests.evaluation.tiny import shard_fsdp2, tiny_collator, tiny_model, with_lora


def _finetuned(sharded: bool):
    """A model, its pre-trained weights as full tensors, and the model moved away from them."""
    model = tiny_model(tiny_collator())
    anchors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    tuned = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return (shard_fsdp2(model) if sharded else model), anchors, tuned


def _full(model) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }


def _inputs():
    return {
        "input_ids": torch.tensor([[1206] * 0 + [2, 7, 8]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.long),
        "token_type_ids": torch.zeros(1, 3, dtype=torch.long),
    }


def _check_full(sharded: bool) -> None:
    model, anchors, tuned = _finetuned(sharded)
    reference = tiny_model(tiny_collator()).eval()
    model.eval()
    with torch.no_grad():
        model(**_inputs())  # FSDP2's root keeps its gathered weights after a forward pass without a backward one
    for alpha in (0.0, 0.3, 1.0):
        with interpolate(model, alpha, anchors):
            with torch.no_grad():
                logits = model(**_inputs()).logits
                for name, parameter in reference.named_parameters():
                    parameter.copy_((1 - alpha) * anchors[name].double() + alpha * tuned[name].double())
                torch.testing.assert_close(logits, reference(**_inputs()).logits, rtol=1e-4, atol=1e-4)
            from scale_digrap.evaluation.wise import reshard

            reshard(model)
            mixed = _full(model)
            for name in anchors:
                exact = {0.0: anchors, 1.0: tuned}.get(alpha)
                if exact is not None:
                    assert torch.equal(mixed[name], exact[name]), name
                else:
                    torch.testing.assert_close(mixed[name], 0.7 * anchors[name] + 0.3 * tuned[name])
        for name, value in _full(model).items():
            assert torch.equal(value, tuned[name]), f"{name} was not restored"
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(tuned[name])
        torch.testing.assert_close(model(**_inputs()).logits, reference(**_inputs()).logits, rtol=1e-4, atol=1e-4)


def _check_lora(sharded: bool) -> None:
    model = with_lora(tiny_model(tiny_collator())).eval()
    if sharded:
        model = shard_fsdp2(model)
    before = _full(model)
    with interpolate(model, 0.25):
        inside = _full(model)
    for name, value in before.items():
        assert torch.equal(inside[name], value * 0.25 if "lora_B" in name else value), name
    after = _full(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def _check_drift(sharded: bool) -> dict[str, tuple[float, float]]:
    model, anchors, tuned = _finetuned(sharded)
    drift = layer_drift(model, anchors)
    for name in anchors:
        expected = (tuned[name].double() - anchors[name].double()).norm().item()
        assert drift[name].drift == pytest.approx(expected, rel=1e-9)
        norm = anchors[name].double().norm().item()
        if norm:
            assert drift[name].relative_drift == pytest.approx(expected / norm, rel=1e-9)
        else:
            assert drift[name].relative_drift is None
    lora = with_lora(tiny_model(tiny_collator()))
    weights = {name: module for name, module in lora.named_modules() if hasattr(module, "get_delta_weight")}
    expected = {
        f"{name}.weight": (module.get_delta_weight("default").norm() / module.get_base_layer().weight.norm()).item()
        for name, module in weights.items()
    }
    lora_drift = layer_drift(shard_fsdp2(lora) if sharded else lora)
    assert set(lora_drift) == set(expected)
    for name, value in expected.items():
        assert lora_drift[name].relative_drift == pytest.approx(value, rel=1e-5)
    return {name: (value.drift, value.relative_drift) for name, value in {**drift, **lora_drift}.items()}


def test_full_weights_on_one_process():
    _check_full(sharded=False)


def test_lora_on_one_process():
    _check_lora(sharded=False)


def test_drift_on_one_process():
    _check_drift(sharded=False)


@pytest.mark.distributed
def test_full_weights_on_shards(dist_pool):
    dist_pool(2).run(_check_full, True)


@pytest.mark.distributed
def test_lora_on_shards(dist_pool):
    dist_pool(2).run(_check_lora, True)


@pytest.mark.distributed
def test_drift_on_shards_is_equal_on_all_ranks(dist_pool):
    first, second = dist_pool(2).run(_check_drift, True)
    assert first == second


def _check_anchor_forms() -> None:
    model, anchors, _ = _finetuned(sharded=True)
    pristine = shard_fsdp2(tiny_model(tiny_collator()))
    dtensors = {name: p.detach().to(torch.bfloat16).float() for name, p in pristine.named_parameters()}
    locals_ = {name: p.to_local().clone() for name, p in pristine.named_parameters()}
    with interpolate(model, 0.0, locals_):
        for name, value in _full(model).items():
            assert torch.equal(value, anchors[name])
    with interpolate(model, 0.0, dtensors):
        for name, value in _full(model).items():
            assert torch.equal(value, anchors[name].to(torch.bfloat16).float())
    assert dist.get_world_size() == 2


@pytest.mark.distributed
def test_anchors_may_be_sharded_already(dist_pool):
    dist_pool(2).run(_check_anchor_forms)


def test_weights_come_back_after_an_exception():
    model, anchors, tuned = _finetuned(sharded=False)
    with pytest.raises(RuntimeError, match="out of luck"), interpolate(model, 0.5, anchors):
        raise RuntimeError("out of luck")
    assert all(torch.equal(value, tuned[name]) for name, value in _full(model).items())


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), "0.5", True])
def test_alpha_out_of_range(alpha):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(WiseError, match="between 0"), interpolate(model, alpha, dict(model.named_parameters())):
        pass


def test_missing_and_misshapen_anchors_are_refused():
    model = torch.nn.Linear(2, 2)
    with (
        pytest.raises(WiseError, match=r"1 trained parameters.*'bias'"),
        interpolate(model, 0.5, {"weight": model.weight}),
    ):
        pass
    with interpolate(model, 0.5, {"weight": model.weight}, new_layers={"bias"}):
        pass
    bad = {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}
    with pytest.raises(WiseError, match=r"weight: the anchor has shape \(3, 2\)"), interpolate(model, 0.5, bad):
        pass
    model.requires_grad_(False)
    with pytest.raises(WiseError, match="no trained parameters"), interpolate(model, 0.5):
        pass
