"""The parameters that an optimizer was given, and what stands in their place now.

Libraries that shard a model after the optimizer was made (Accelerate's FSDP2) put new tensors where the parameters
stood; DeepSpeed puts flat buffers there. The first can be followed by order and shape, the second cannot.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from scale_digrap.sharding.dtensor import is_distributed


class Given:
    """A parameter by name, without keeping it in memory: a library that replaces it means to free it.

    Attributes:
        name: the layer's name.
        shape: of the unsharded parameter.
        dtype: of the parameter.
    """

    def __init__(self, name: str, param: Tensor) -> None:
        self.name, self.shape, self.dtype = name, param.shape, param.dtype
        self._ref = weakref.ref(param)

    @property
    def param(self) -> Tensor | None:
        """The parameter, where it still exists."""
        return self._ref()

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor can be this parameter in another form: sharded, on another device."""
        return tensor.shape == self.shape and (is_distributed(tensor) or tensor.dtype == self.dtype)


def replaced(given: Sequence[Given], params: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    """(place, tensor) of the tensors that stand where another one was given."""
    known = {id(one.param) for one in given if one.param is not None}
    return [(place, param) for place, param in enumerate(params) if id(param) not in known]


def why_not(given: Sequence[Given], params: Sequence[Tensor], taken: float) -> str | None:
    """Why replaced tensors cannot be followed; ``None`` where they can.

    Args:
        given: what the optimizer was given.
        params: what stands there now.
        taken: steps taken with the tensors that were given.
    """
    if len(params) != len(given):
        return f"there are {len(params)} of them"
    for place, param in replaced(given, params):
        one = given[place]
        if not one.takes(param):
            now, then = f"{param.dtype} {tuple(param.shape)}", f"{one.dtype} {tuple(one.shape)}"
            return f"where {one.name!r} ({then}) stood, there is {now}"
    if taken:
        return f"it has taken {int(taken)} steps before"
    return None


def advice(given: Sequence[Given], params: Sequence[Tensor]) -> str:
    """What to do about tensors that cannot be followed, by what they are."""
    others = [param for _, param in replaced(given, params)]
    if any(is_distributed(param) for param in others):
        return (
            "the model was sharded after the optimizer was made. Make the optimizer of the sharded model's "
            "named_parameters(), or shard before the first step, with the same parameters in the same order"
        )
    flat = [param for param in others if param.dim() == 1 and param.dtype == torch.float32]
    if not params or len(flat) == len(others) or len(params) == len(given):
        return (
            "DeepSpeed's ZeRO steps flat partitions that cut through layers, where a layer-wise update would be "
            "silently wrong. After deepspeed.initialize(...), add: scale_digrap.deepspeed.attach(engine)"
        )
    return "make a new optimizer for them: it must know which layers it steps"
