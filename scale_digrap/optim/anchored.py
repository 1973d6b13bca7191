"""What optimizers with an anchor share: groups, anchors, per-layer scalars, and their way through a state dict.

An *anchor* θ0 is the pre-trained value of a layer. Subclasses say which scalars they keep for each layer; this class
holds them packed, so that a step is a handful of kernels for all layers, while ``state_dict`` sees plain 0-d tensors.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from scale_digrap.sharding.layout import ShardLayout, layout_for

ANCHORS = ("initial", "zero")
ANCHOR_DTYPES = ("auto", "bfloat16", "float32")
# Keys that torch, its schedulers and common training code add to a group without being options of an optimizer.
_FOREIGN_KEYS = {"params", "param_names", "name", "initial_lr"}
_MAPPING = "mapping"


class AnchoredOptimizer(Optimizer):
    """Base of the optimizers that pull towards pre-trained weights; options as in :class:`scale_digrap.DiGraP`."""

    #: Per-layer float64 scalars that a subclass keeps in ``state[param]``, in this order.
    layer_scalars: tuple[str, ...] = ()

    def __init__(self, params: Any, defaults: dict[str, Any], process_group: dist.ProcessGroup | None = None) -> None:
        self._reset_caches()
        self._process_group = process_group
        self._anchor_tensors: dict[str, Tensor] = {}
        self._default_anchor = defaults["anchor"]
        super().__init__(params, {**defaults, "anchor": _anchor_kind(defaults["anchor"])})

    def _reset_caches(self) -> None:
        self._layout: ShardLayout | None = None
        self._params: list[Tensor] = []
        self._names: list[str] = []
        self._group_of: list[int] = []
        self._packed = torch.empty(0)
        self._steps = torch.empty(0)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Reached by unpickling and deepcopy, and by load_state_dict, which passes "state" and "param_groups" alone.
        if "defaults" in state and "_process_group" not in self.__dict__:
            self._process_group, self._anchor_tensors = None, {}
            self._default_anchor = state["defaults"]["anchor"]
        super().__setstate__(state)
        self._reset_caches()
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    # -- groups --------------------------------------------------------------------------------------------------------

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` for an option out of range; subclasses add their own."""
        if not float(group["lr"]) >= 0.0:
            raise ValueError(f"Invalid learning rate: {group['lr']}")
        for key in [key for key in group if key.endswith("betas")]:
            for index, beta in enumerate(group[key]):
                if not 0.0 <= beta < 1.0:
                    raise ValueError(f"Invalid {key}[{index}]: {beta} (must be in [0, 1))")
        if not group["eps"] >= 0.0:
            raise ValueError(f"Invalid epsilon value: {group['eps']}")
        if not group["weight_decay"] >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
        if group["anchor"] not in (*ANCHORS, _MAPPING, None):
            raise ValueError(f"Invalid anchor: {group['anchor']!r} (use 'initial', 'zero', a mapping or None)")
        if group["anchor_dtype"] not in ANCHOR_DTYPES:
            raise ValueError(f"Invalid anchor_dtype: {group['anchor_dtype']!r} (use one of {', '.join(ANCHOR_DTYPES)})")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options default to the optimizer's.

        Raises:
            ValueError: an unknown option or a value out of range; a mapping of anchors that lacks one of the group's
                names or has it in another shape; complex parameters.
        """
        group = dict(param_group)
        for key in set(group) - set(self.defaults) - _FOREIGN_KEYS:
            near = difflib.get_close_matches(key, self.defaults, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(self.defaults))}"
            raise ValueError(f"unknown option {key!r} in a parameter group{hint}")
        anchor = group.get("anchor", self._default_anchor)
        group["anchor"] = _anchor_kind(anchor)
        dtype = group.get("anchor_dtype", self.defaults["anchor_dtype"])
        group["anchor_dtype"] = str(dtype).removeprefix("torch.")
        self._check_group({**self.defaults, **group})
        before = len(self.param_groups)
        super().add_param_group(group)
        try:
            self._check_params(self.param_groups[-1], anchor)
        except ValueError:
            del self.param_groups[before:]
            raise

    def _check_params(self, group: dict[str, Any], anchor: Any) -> None:
        names = group.get("param_names")
        for index, param in enumerate(group["params"]):
            if param.is_complex():
                name = names[index] if names else index
                raise ValueError(f"parameter {name} is complex ({param.dtype}); only real parameters are supported")
        if not isinstance(anchor, Mapping):
            return
        if names is None:
            raise ValueError("a mapping of anchors needs named parameters: pass model.named_parameters()")
        missing = [name for name in names if name not in anchor]
        if missing:
            raise ValueError(
                f"the anchor mapping lacks {len(missing)} of {len(names)} layers, among them {missing[0]!r}"
            )
        for name, param in zip(names, group["params"], strict=True):
            if not getattr(param, "_fsdp_flattened", False):
                _check_anchor_shape(name, anchor[name], param.shape)
            self._anchor_tensors[name] = anchor[name]

    def _trainable(self) -> Iterable[tuple[int, str, Tensor]]:
        """(group index, layer name, parameter) of everything that takes part in a step."""
        number = 0
        for index, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for position, param in enumerate(group["params"]):
                if param.requires_grad:
                    yield index, names[position] if names else f"param_{number}", param
                number += 1

    # -- state ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_state(self) -> None:
        """Create all state of all parameters at once and capture the anchors; the first ``step()`` does it otherwise.

        Call it after sharding and after loading the pre-trained weights, and before loading a checkpoint of the
        optimizer. It is a collective call: every rank makes it. Calling it again does nothing.

        Raises:
            ValueError: a bf16 or fp16 parameter (a fine-tuning step is of the size of its rounding); parameters on
                several devices; an anchor that would be captured after training began; an ``anchor_dtype`` that does
                not hold an anchor exactly; two layers of one name.
        """
        trainable = list(self._trainable())
        known = len(trainable) == len(self._params) and self._layout is not None
        if known and all(new is old for (_, _, new), old in zip(trainable, self._params, strict=True)):
            return
        self._group_of = [index for index, _, _ in trainable]
        self._names = [name for _, name, _ in trainable]
        self._params = [param for _, _, param in trainable]
        self._check_precision()
        if len(set(self._names)) < len(self._names):
            twice = next(name for name in self._names if self._names.count(name) > 1)
            raise ValueError(f"two layers are named {twice!r}; give every layer its own name")
        by_rows = [self._by_rows(self.param_groups[index]) for index in self._group_of]
        self._layout = layout_for(self._names, self._params, by_rows, self._process_group)
        self._init_anchors()
        for param in self._params:
            state = self.state[param]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
            for key in ("exp_avg", "exp_avg_sq"):
                if key not in state:
                    state[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
            for key in self.layer_scalars:
                if key not in state:
                    state[key] = torch.zeros((), dtype=torch.float64)
        self._pack()

    def _by_rows(self, group: Mapping[str, Any]) -> bool:
        """Whether a group's layers need sums per row."""
        return False

    def _check_precision(self) -> None:
        for name, param in zip(self._names, self._params, strict=True):
            if param.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"layer {name!r} is {param.dtype}: a fine-tuning step is of the size of its rounding. Keep"
                    " trainable parameters in float32 (from_pretrained(..., dtype=torch.float32)) and compute in low"
                    " precision with torch.autocast or FSDP's MixedPrecisionPolicy(param_dtype=torch.bfloat16)"
                )

    def _init_anchors(self) -> None:
        """Capture the missing anchors, each in the narrowest dtype that holds it exactly on every rank."""
        assert self._layout is not None
        fresh: dict[int, Tensor] = {}
        for index, (name, param) in enumerate(zip(self._names, self._params, strict=True)):
            kind, state = self._anchor_kind_of(index), self.state[param]
            if kind in (None, "zero") or "anchor" in state:
                continue
            if kind == _MAPPING:
                full = self._anchor_tensors[name]
                _check_anchor_shape(name, full, self._layout.layers[index].shape)
                fresh[index] = self._layout.shard_like(index, param, full)
                continue
            if float(state.get("step", 0)) > 0:
                raise ValueError(
                    f"layer {name!r} has taken {int(state['step'])} steps and has no anchor: anchor='initial' would "
                    "capture trained weights. Load the pre-trained weights, call init_state(), then load the checkpoint"
                )
            fresh[index] = param.detach()  # copied below, in its final dtype: no fp32 copy of the model in between
        inexact = torch.zeros(len(self._params), dtype=torch.bool)
        for index, anchor in fresh.items():
            inexact[index] = not _fits_bf16(ShardLayout.local(anchor))
        self._layout.any_(inexact)
        for index, anchor in fresh.items():
            asked = self.param_groups[self._group_of[index]]["anchor_dtype"]
            if asked == "bfloat16" and inexact[index]:
                raise ValueError(
                    f"the anchor of layer {self._names[index]!r} is not exact in bfloat16; use anchor_dtype='auto' or "
                    "'float32'"
                )
            narrow = asked == "bfloat16" or (asked == "auto" and not inexact[index])
            dtype = torch.bfloat16 if narrow else self._params[index].dtype
            self.state[self._params[index]]["anchor"] = anchor.to(dtype, copy=True)

    def _anchor_kind_of(self, index: int) -> str | None:
        return self.param_groups[self._group_of[index]]["anchor"]

    @torch.no_grad()
    def _pack(self) -> None:
        """Gather every layer's scalars into one tensor and leave 0-d views of it in ``state``."""
        assert self._layout is not None
        device = ShardLayout.local(self._params[0]).device if self._params else torch.device("cpu")
        shape = (len(self.layer_scalars), len(self._params))
        packed = torch.zeros(shape, dtype=torch.float64)
        steps = torch.zeros(len(self._params), dtype=torch.float32)
        for index, param in enumerate(self._params):
            state = self.state[param]
            steps[index] = float(state["step"])
            for row, key in enumerate(self.layer_scalars):
                packed[row, index] = float(state[key])
        self._packed, self._steps = packed.to(device), steps.to(device)
        for index, param in enumerate(self._params):
            self.state[param]["step"] = self._steps[index]
            for row, key in enumerate(self.layer_scalars):
                self.state[param][key] = self._packed[row, index]
        self._after_pack()

    def _after_pack(self) -> None:
        """Subclasses rebuild what they derive from the state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; anchors and per-layer scalars keep the dtypes that they were saved in.

        ``torch.optim.Optimizer`` casts every floating-point state but ``step`` to the parameter's dtype and device,
        which would widen a bf16 anchor. A checkpoint without anchors leaves the live ones in place.

        Raises:
            ValueError: as ``torch.optim.Optimizer``; or the checkpoint has taken steps, holds no anchors, and none are
                live to use instead.
        """
        kept = {param: dict(state) for param, state in self.state.items()}
        own: dict[Any, dict[str, Any]] = {}

        def set_aside(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            rest: dict[Any, Any] = {}
            for key, state in loaded["state"].items():
                own[key] = {k: v for k, v in state.items() if k == "anchor" or k in self.layer_scalars}
                rest[key] = {k: v for k, v in state.items() if k not in own[key]}
            own["ids"] = [i for group in loaded["param_groups"] for i in group["params"]]  # type: ignore[assignment]
            return {**loaded, "state": rest}

        def put_back(_: Optimizer) -> None:
            ids = own.pop("ids")
            params = [param for group in self.param_groups for param in group["params"]]
            for key, param in zip(ids, params, strict=True):
                if key not in own:
                    continue
                state, old = self.state[param], kept.get(param, {})
                for name, value in own[key].items():
                    if isinstance(value, Tensor) and name == "anchor":
                        value = value.to(device=param.device)
                    state[name] = value
                if "anchor" not in state and "anchor" in old:
                    state["anchor"] = old["anchor"]
            self._reset_caches()
            self.init_state()

        # Ours run next to the parameters: after every hook of the user's on the way in, before them on the way out.
        hooks = (
            self.register_load_state_dict_pre_hook(set_aside),
            self.register_load_state_dict_post_hook(put_back, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()


def _anchor_kind(anchor: Any) -> Any:
    """The group's entry: mappings stay out of ``param_groups``, which are written to checkpoints."""
    return _MAPPING if isinstance(anchor, Mapping) else anchor


def _check_anchor_shape(name: str, anchor: Tensor, shape: torch.Size) -> None:
    if anchor.shape != shape:
        raise ValueError(f"the anchor of layer {name!r} has shape {tuple(anchor.shape)}, the layer has {tuple(shape)}")


def _fits_bf16(values: Tensor) -> bool:
    """Whether every element survives a round trip through bfloat16, looked at in pieces: no copy of a large layer."""
    flat = values.reshape(-1) if values.is_contiguous() else values.flatten()
    return all(torch.equal(part.to(torch.bfloat16).to(part.dtype), part) for part in flat.split(1 << 22))
