"""Parameters, gradients and state that are not contiguous, or not even dense: every update is of the values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scale_digrap.optim import functional
from tests.optim.test_changing_options import TWINS

SHAPES = ((6, 5), (4, 3, 2, 2), (7,), (), (0, 3), (1, 8))


def transposed(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape[::-1]).permute(tuple(reversed(range(len(shape)))))


def channels_last(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape).to(memory_format=torch.channels_last) if len(shape) == 4 else transposed(shape)


def sliced(shape: tuple[int, ...]) -> Tensor:
    """Every other element of a larger tensor: not dense."""
    return torch.zeros(*shape, 2)[..., 0]


def offset(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(math.prod(shape) + 5)[5:].view(shape)


LAYOUTS: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "contiguous": torch.zeros,
    "transposed": transposed,
    "channels-last": channels_last,
    "sliced": sliced,
    "offset": offset,
}


def expanded(values: Tensor) -> Tensor:
    """A gradient of one number, as of ``p.sum()``."""
    return values.flatten()[0].expand(values.shape) if values.numel() else values


def values(index: int, t: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * t + index)
    return torch.randn(SHAPES[index], generator=generator) * 0.3 + (-1.0 if t > 3 and t % 2 else 1.0)


def train(name: str, layout: str, grad_layout: str, state_layout: str | None = None) -> list[Tensor]:
    method, _, own = TWINS[name]
    parameters = []
    for index, shape in enumerate(SHAPES):
        tensor = LAYOUTS[layout](shape)
        tensor.copy_(values(index, 0))
        parameters.append(nn.Parameter(tensor))
    strides = [parameter.stride() for parameter in parameters]
    optimizer: Any = method([(f"p{i}", p) for i, p in enumerate(parameters)], lr=0.02, weight_decay=0.05, **own)
    for t in range(1, 10):
        for index, parameter in enumerate(parameters):
            if grad_layout == "expanded":
                parameter.grad = expanded(values(index, t))
            else:
                gradient = LAYOUTS[grad_layout](SHAPES[index])
                parameter.grad = gradient.copy_(values(index, t))
        optimizer.step()
        if t == 5 and state_layout is not None:
            for index, parameter in enumerate(parameters):
                for key, value in optimizer.state[parameter].items():
                    if value.shape == parameter.shape and parameter.dim():
                        other = LAYOUTS[state_layout](SHAPES[index]).to(value.dtype)
                        optimizer.state[parameter][key] = other.copy_(value)
    assert [parameter.stride() for parameter in parameters] == strides
    return [parameter.detach().clone(memory_format=torch.contiguous_format) for parameter in parameters]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Equal but for the order in which sums are taken."""
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kernel", ["fused", "foreach"])
@pytest.mark.parametrize("name", TWINS)
def test_any_strides_train_as_contiguous_ones(name, kernel, monkeypatch):
    if kernel == "foreach":
        monkeypatch.setattr(functional, "_FUSED_DEVICES", frozenset())
    expected = train(name, "contiguous", "contiguous")
    uniform = train(name, "contiguous", "expanded")
    assert not same(expected, uniform)
    for layout in LAYOUTS:
        for grad_layout in LAYOUTS:
            assert same(train(name, layout, grad_layout), expected), (layout, grad_layout)
        assert same(train(name, layout, "expanded"), uniform), layout
    for layout in ("contiguous", "transposed", "sliced"):
        for state_layout in LAYOUTS:
            assert same(train(name, layout, "offset", state_layout), expected), (layout, state_layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_an_anchor_any_strides_are_adamw_of_a_loop(layout):
    """torch's own fused kernel fails this test."""
    method, _, own = TWINS["digrap"]
    pairs = []
    for index, shape in enumerate(SHAPES):
        ours = LAYOUTS[layout](shape).copy_(values(index, 0))
        pairs.append((nn.Parameter(ours), nn.Parameter(values(index, 0).double())))
    optimizer: Any = method([one for one, _ in pairs], lr=0.02, weight_decay=0.05, anchor=None, **own)
    loop = torch.optim.AdamW([other for _, other in pairs], lr=0.02, weight_decay=0.05, foreach=False, fused=False)
    for t in range(1, 10):
        for index, (one, other) in enumerate(pairs):
            one.grad, other.grad = transposed(SHAPES[index]).copy_(values(index, t)), values(index, t).double()
        optimizer.step()
        loop.step()
    for one, other in pairs:
        torch.testing.assert_close(one.detach().double(), other.detach(), rtol=1e-5, atol=1e-6)


def test_state_lies_as_its_parameter_does():
    method, _, own = TWINS["ftp"]
    parameter = nn.Parameter(channels_last((4, 3, 2, 2)))
    optimizer: Any = method([parameter], **own)
    optimizer.init_state()
    for key in ("exp_avg", "exp_avg_sq", "anchor", "direction"):
        assert optimizer.state[parameter][key].stride() == parameter.stride(), key


def test_an_expanded_parameter_is_refused():
    method, _, own = TWINS["l2sp"]
    parameter = nn.Parameter(torch.zeros(1, 5).expand(3, 5))
    optimizer: Any = method([("tie.weight", parameter)], **own)
    parameter.grad = torch.ones(3, 5)
    with pytest.raises(ValueError, match=r"'tie.weight' is an expanded tensor.*clone\(\)"):
        optimizer.step()
