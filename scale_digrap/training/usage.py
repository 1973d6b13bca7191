"""Which layers a step has used: those that autograd gave a gradient, in any micro-batch, on any rank.

A layer that was not used must stay as it is: no weight decay, no step count, no change of its moments, as torch's
optimizers do where ``grad is None``. Engines that shard hide it: FSDP2 and ZeRO reduce zeros for whatever has no
gradient, so that the ranks stay in step. Autograd itself is asked, therefore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

_WATCHED = "_scale_digrap_watched"


class Usage:
    """This rank's used layers since the last :meth:`take`.

    Args:
        parameters: the trained ones, by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._number = {name: index for index, name in enumerate(parameters)}
        self._parameters = dict(parameters)
        self._used: set[int] = set()
        self._only_pictures: set[int] = set()
        self.placeholder = False
        """The micro-batch's only picture is a placeholder (``VqaCollator.always_image``): layers that are there for
        pictures alone are run, and not used."""

    @property
    def names(self) -> list[str]:
        """Of the parameters, in order."""
        return list(self._number)

    def take(self) -> list[bool]:
        """For every parameter, whether it was used; begins anew."""
        used, self._used = self._used, set()
        return [index in used for index in range(len(self._number))]

    def _mark(self, index: int) -> Callable[[Any], None]:
        def mark(_: Any) -> None:
            if not (self.placeholder and index in self._only_pictures):
                self._used.add(index)

        return mark

    def watch_parameters(self) -> None:
        """Where the parameters themselves are autograd's leaves: ZeRO, and one process."""
        for name, parameter in self._parameters.items():
            parameter.register_hook(self._mark(self._number[name]))

    def watch_units(self, model: nn.Module) -> None:
        """Under FSDP2 the leaves are the gathered parameters, which are in the place of the shards during a unit's
        forward pass, the same objects every time."""
        for prefix, module in model.named_modules():
            if isinstance(module, FSDPModule):
                unit: Any = module
                unit.register_forward_pre_hook(self._unit_hook(f"{prefix}." if prefix else ""))

    def _unit_hook(self, prefix: str) -> Callable[[nn.Module, Any], None]:
        def hook(unit: nn.Module, _: Any) -> None:
            if not torch.is_grad_enabled():  # generating: a forward pass per token
                return
            for name, parameter in unit.named_parameters():
                number = self._number.get(prefix + name)
                # A unit within this one has its shards in place still.
                if number is not None and not isinstance(parameter, DTensor) and not hasattr(parameter, _WATCHED):
                    setattr(parameter, _WATCHED, True)
                    parameter.register_post_accumulate_grad_hook(self._mark(number))

        return hook

    def find_picture_layers(self, model: nn.Module) -> None:
        """Learn, in the first forward pass with a picture, which layers run for pictures alone: those of the modules
        that Transformers' ``get_image_features`` calls, a tower and its projector. A model without it has none."""
        spied = [module for module in model.modules() if hasattr(type(module), "get_image_features")]
        for module in spied:
            self._spy(module, spied)

    def _spy(self, module: Any, spied: list[nn.Module]) -> None:
        original = module.get_image_features

        def watched(*args: Any, **kwargs: Any) -> Any:
            ran: list[nn.Module] = []
            handle = nn.modules.module.register_module_forward_pre_hook(lambda inner, _: ran.append(inner))
            try:
                return original(*args, **kwargs)
            finally:
                handle.remove()
                self._add_picture_layers(ran)
                for other in spied:
                    vars(other).pop("get_image_features", None)

        module.get_image_features = watched

    def _add_picture_layers(self, ran: Iterable[nn.Module]) -> None:
        numbers = {id(parameter): self._number[name] for name, parameter in self._parameters.items()}
        for module in ran:
            self._only_pictures |= {numbers[id(p)] for p in module.parameters() if id(p) in numbers}


def local_zeros(gradients: list[torch.Tensor]) -> list[bool]:
    """Which of these local tensors hold nothing but zeros (an empty one does); one look at the device."""
    if not gradients:
        return []
    largest = [g.abs().amax() if g.numel() else g.new_zeros(()) for g in gradients]
    return [value == 0.0 for value in torch.stack([value.float() for value in largest]).tolist()]
