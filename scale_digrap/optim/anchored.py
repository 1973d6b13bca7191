"""What optimizers with an anchor share: groups, anchors, per-layer scalars, and their way through a state dict.

An *anchor* θ0 is the pre-trained value of a layer. Subclasses say which scalars they keep for each layer; this class
holds them packed, so that a step is a handful of kernels for all layers, while ``state_dict`` sees plain 0-d tensors.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from scale_digrap.bounds import OPTION_BOUNDS, Bound
from scale_digrap.errors import ScaleDigrapError
from scale_digrap.optim.given import Given, advice, replaced, why_not
from scale_digrap.optim.options import check_foreign_keys, check_keywords, check_numbers
from scale_digrap.sharding import dtensor
from scale_digrap.sharding.layout import ShardLayout, layout_for

logger = logging.getLogger(__name__)

ANCHORS = ("initial", "zero")
ANCHOR_DTYPES = ("auto", "bfloat16", "float32")
# Keys that torch, its schedulers and common training code add to a group without being options of an optimizer.
_FOREIGN_KEYS = {"params", "param_names", "name", "initial_lr"}
_MAPPING = "mapping"
# Where an attached optimizer keeps its per-layer scalars in a state dict: the one place that every checkpoint path of
# the engines carries along.
LAYER_STATE = "layer_state"


class UnattachedError(ScaleDigrapError, RuntimeError):
    """``step()`` on tensors that an engine has put in place of the parameters."""


class StateError(ScaleDigrapError, ValueError):
    """State that a step cannot go on from: a client or a checkpoint has left it incomplete, or in another form."""


class AnchoredOptimizer(Optimizer):
    """Base of the optimizers that pull towards pre-trained weights; options as in :class:`scale_digrap.DiGraP`."""

    #: Per-layer float64 scalars that a subclass keeps in ``state[param]``, in this order.
    layer_scalars: tuple[str, ...] = ()
    #: What numbers the options may have, by option.
    bounds: Mapping[str, Bound] = OPTION_BOUNDS

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        process_group: dist.ProcessGroup | None = None,
        torch_options: Mapping[str, Any] | None = None,
    ) -> None:
        check_keywords(type(self).__name__, defaults, torch_options or {})
        self._given: list[Given] = []
        self._attached = False
        self._reset_caches()
        self._process_group = process_group
        self._anchor_tensors: dict[str, Tensor] = {}
        self._followed_anchors: dict[str, Tensor] = {}
        self._default_anchor = defaults["anchor"]
        super().__init__(params, {**defaults, "anchor": _anchor_kind(defaults["anchor"])})

    def _reset_caches(self) -> None:
        self._layout: ShardLayout | None = None
        self._names: list[str] = []
        self._group_of: list[int] = []
        self._packed = torch.empty(0)
        self._steps = torch.empty(0)
        self._shown: list[tuple[Sequence[str], list[Tensor], list[int], set[str]]] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Reached by unpickling and deepcopy, and by load_state_dict, which passes "state" and "param_groups" alone.
        fresh = "defaults" in state and "_process_group" not in self.__dict__
        if fresh:
            self._process_group, self._anchor_tensors, self._attached = None, {}, False
            self._followed_anchors = {}
            self._default_anchor = state["defaults"]["anchor"]
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch's default for pickles of its own
        if fresh:
            self._given = [Given(*pair) for number in range(len(self.param_groups)) for pair in self._named(number)]
        if not self._attached:
            self._reset_caches()
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    # -- groups --------------------------------------------------------------------------------------------------------

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` for an option out of range; subclasses add their own."""
        check_numbers({key: value for key, value in group.items() if key in self.defaults})
        if group["anchor"] not in (*ANCHORS, _MAPPING, None):
            raise ValueError(f"Invalid anchor: {group['anchor']!r} (use 'initial', 'zero', a mapping or None)")
        if group["anchor_dtype"] not in ANCHOR_DTYPES:
            raise ValueError(f"Invalid anchor_dtype: {group['anchor_dtype']!r} (use one of {', '.join(ANCHOR_DTYPES)})")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options default to the optimizer's. Keys that are no options are kept and not used.

        Raises:
            TypeError: not a dict.
            ValueError: a value out of range; a key that looks like a misspelt option; a mapping of anchors that lacks
                one of the group's names or has it in another shape; complex parameters.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        group = dict(param_group)
        check_foreign_keys(type(self).__name__, self.defaults, group, _FOREIGN_KEYS)
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
        self._given += [Given(*pair) for pair in self._named(before)]

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

    def _named(self, group: int) -> list[tuple[str, Tensor]]:
        """(layer name, parameter) of a group; parameters given without names are numbered."""
        params = self.param_groups[group]["params"]
        first = sum(len(other["params"]) for other in self.param_groups[:group])
        names = self.param_groups[group].get("param_names")
        if names is None or len(names) != len(params):
            names = [f"param_{first + i}" for i in range(len(params))]
        return list(zip(names, params, strict=True))

    def _trainable(self) -> Iterable[tuple[int, str, Tensor]]:
        """(group index, layer name, parameter) of everything that takes part in a step."""
        for index in range(len(self.param_groups)):
            for name, param in self._named(index):
                if param.requires_grad:
                    yield index, name, param

    @property
    def given_parameters(self) -> list[tuple[str, Tensor]]:
        """(name, parameter) as the optimizer was given them, also after an engine has put other tensors in place.

        Those that no longer exist are left out.
        """
        return [(one.name, one.param) for one in self._given if one.param is not None]

    def _follow_parameters(self) -> None:
        """Take over tensors that a library has put where the parameters stood, under their names.

        Raises:
            UnattachedError: they cannot be told to be the same layers.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        others = replaced(self._given, params)
        if not others and (params or not self._given):
            return
        old = [self._given[place].param if place < len(self._given) else None for place, _ in others]
        states = [self.state[param] if param is not None and param in self.state else {} for param in old]
        taken = max([float(state.get("step", 0)) for state in states], default=0.0)
        reason = why_not(self._given, params, taken)
        if reason is not None:
            raise UnattachedError(
                f"{type(self).__name__} was made for {len(self._given)} parameters, but has other tensors now "
                f"({reason}): {advice(self._given, params)}"
            )
        for (place, param), before, state in zip(others, old, states, strict=True):
            name, anchor = self._given[place].name, state.get("anchor")
            if anchor is not None and not anchor.is_meta:
                self._followed_anchors[name] = anchor
            if before is not None:
                self.state.pop(before, None)
            self._given[place] = Given(name, param)
        self._reset_caches()
        if not dist.is_initialized() or dist.get_rank() == 0:
            place, param = others[0]
            logger.info(
                "%s follows %d of %d parameters that were replaced after it was made, by their order and shapes; "
                "the first, %r, is a %s now",
                type(self).__name__, len(others), len(params), self._given[place].name, type(param).__name__,
            )  # fmt: skip

    def _zero_gradients(self) -> bool:
        """Whether no gradient says anything: engines take such a step to make the optimizer create its state."""
        grads = [param.grad for group in self.param_groups for param in group["params"] if param.grad is not None]
        return not any(bool(grad.any()) for grad in grads)

    # -- tensors that an engine has put in place of the parameters ----------------------------------------------------

    def attach(
        self,
        names: Sequence[str],
        group_of: Sequence[int],
        make_layout: Callable[[Sequence[bool]], ShardLayout],
    ) -> None:
        """Step the tensors of a layout in place of the parameters; ``scale_digrap.deepspeed.attach`` calls it.

        State is kept per tensor of the layout: flat moments, flat anchor. The per-layer scalars of all layers are kept
        by name, and travel in ``param_groups[0]`` of a state dict. State that was loaded before is taken over.

        Args:
            names: one name per layer.
            group_of: for each layer, the index of its parameter group.
            make_layout: called with one flag per layer, whether its row sums are wanted. A collective call.

        Raises:
            ValueError: as :meth:`init_state`.
        """
        self._reset_caches()
        self._check_names(names)
        by_rows = [self._by_rows(self.param_groups[index]) for index in group_of]
        self._names, self._group_of, self._layout = list(names), list(group_of), make_layout(by_rows)
        self._attached = True
        self._check_precision()
        self._init_tensors()
        saved = self._take_layer_state()
        if saved is None and any(float(self.state[tensor]["step"]) > 0 for tensor in self._layout.tensors):
            raise ValueError(f"the optimizer's state has no {LAYER_STATE!r}: it was written by another optimizer")
        self._pack(saved or {})

    @property
    def layout(self) -> ShardLayout | None:
        """Where the layers live; ``None`` before :meth:`init_state`."""
        return self._layout

    def adopt_loaded_state(self) -> None:
        """Take over at once what an engine's loader has put into the parameter groups; else the next step does.

        By then a scheduler may have set the learning rate, which is therefore restored only here.
        """
        saved = self._take_layer_state()
        if saved is not None:
            self._pack(saved)

    def _take_layer_state(self, *, keep_lr: bool = False) -> dict[str, dict[str, float]] | None:
        """Per-layer scalars that a checkpoint has put into the parameter groups, by layer name; options go back too."""
        found = [group.pop(LAYER_STATE) for group in self.param_groups if LAYER_STATE in group]
        if not found:
            return None
        saved = found[0]
        missing = sorted(set(self._names) - set(saved["layers"]))
        if missing:
            raise ValueError(f"the checkpoint lacks {len(missing)} of {len(self._names)} layers, first {missing[0]!r}")
        # Loading a Universal Checkpoint under ZeRO-3 writes the first group's options into every group.
        if len(saved["groups"]) == len(self.param_groups):
            for group, options in zip(self.param_groups, saved["groups"], strict=True):
                group.update({key: value for key, value in options.items() if not keep_lr or key != "lr"})
        return saved["layers"]

    def layer_state(self) -> dict[str, dict[str, float]]:
        """Every layer's scalars, ``step`` among them, by layer name; equal on all ranks."""
        columns = dict(zip(self.layer_scalars, self._packed.tolist(), strict=True)) | {"step": self._steps.tolist()}
        return {name: {key: column[i] for key, column in columns.items()} for i, name in enumerate(self._names)}

    def load_layer_state(self, layers: Mapping[str, Mapping[str, float]]) -> None:
        """Put back what :meth:`layer_state` told; tensors of the state are loaded by whoever calls this."""
        self._pack(layers)

    def _layer_state(self) -> dict[str, Any]:
        layers = self.layer_state()
        options = set(self.defaults) | {"initial_lr"}
        groups = [{key: value for key, value in group.items() if key in options} for group in self.param_groups]
        assert self._layout is not None
        return {"version": 1, "layers": layers, "groups": groups, "pieces": self._layout.pieces()}

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer``; an attached optimizer adds its per-layer scalars to the first group."""
        result = super().state_dict()
        if self._attached and result["param_groups"]:
            first, *rest = result["param_groups"]
            result["param_groups"] = [{**first, LAYER_STATE: self._layer_state()}, *rest]
        return result

    def _tensor_of(self, index: int) -> Tensor:
        """The tensor that holds a layer."""
        assert self._layout is not None
        return self._layout.tensors[self._layout.holders[index]]

    def _state_of(self, index: int) -> dict[str, Any]:
        return self.state[self._tensor_of(index)]

    # -- state ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_state(self) -> None:
        """Create all state of all parameters at once and capture the anchors; the first ``step()`` does it otherwise.

        Call it after sharding and after loading the pre-trained weights, and before loading a checkpoint of the
        optimizer. It is a collective call: every rank makes it. Calling it again does nothing.

        Raises:
            ValueError: a bf16 or fp16 parameter (a fine-tuning step is of the size of its rounding); an expanded one;
                parameters on several devices; an anchor that would be captured after training began; an
                ``anchor_dtype`` that does not hold an anchor exactly; two layers of one name.
            UnattachedError: an engine has put tensors in place of the parameters that cannot be followed.
        """
        if self._attached:
            saved = self._take_layer_state(keep_lr=True)
            if saved is not None:
                self._pack(saved)
            return
        trainable = list(self._trainable())
        before = None if self._layout is None else self._layout.tensors
        if before is not None and len(trainable) == len(before):  # noqa: SIM102
            if all(new is old for (_, _, new), old in zip(trainable, before, strict=True)):
                if self._state_replaced():
                    self._fill_state()
                return
        self._follow_parameters()
        self._group_of = [index for index, _, _ in trainable]
        names = [name for _, name, _ in trainable]
        self._check_names(names)
        self._names = names
        params = [param for _, _, param in trainable]
        by_rows = [self._by_rows(self.param_groups[index]) for index in self._group_of]
        self._check_precision(params)
        self._layout = layout_for(names, params, by_rows, self._process_group)
        self._shown = []
        self._fill_state()

    def _fill_state(self) -> None:
        """Create what is missing of the state, and take over what a client has put into it."""
        cleared = [name for i, name in enumerate(self._names) if self._shown and "step" not in self._state_of(i)]
        if cleared:
            logger.warning(
                "the state of %d layers was cleared, first %r: they begin anew, and an anchor of 'initial' is the "
                "weights of now; to begin anew with the old anchors, keep state[param]['anchor']",
                len(cleared), cleared[0],
            )  # fmt: skip
        self._init_tensors()
        self._pack({name: self._state_of(index) for index, name in enumerate(self._names)})
        self._followed_anchors = {}

    def _state_replaced(self) -> bool:
        """Whether a client has taken scalars away, or put others in their place, or emptied a layer's state.

        Tensors of the layers' size are read from the state in every step, whoever has put them there.
        """
        assert self._layout is not None
        for tensor, (keys, views, places, needed) in zip(self._layout.tensors, self._shown, strict=True):
            state = self.state.get(tensor)
            if state is None or not needed <= state.keys():
                return True
            if any(map(operator.is_not, map(state.get, keys), views)):
                return True
            if any(map(operator.ne, map(Tensor.data_ptr, views), places)):  # view.data was assigned
                return True
        return False

    def _init_tensors(self) -> None:
        """Create the missing state of every tensor: step, moments, anchor."""
        assert self._layout is not None
        self._init_anchors()
        for place, tensor in enumerate(self._layout.tensors):
            state = self.state[tensor]
            if not self._attached and state.keys() & {"step", "exp_avg", "exp_avg_sq"}:
                lost = [key for key in ("step", "exp_avg", "exp_avg_sq") if key not in state]
                if lost and float(state.get("step", 1)) > 0:
                    raise StateError(
                        f"the state of layer {self._names[place]!r} has no {' and no '.join(lost)}: put it back, or "
                        "clear the whole state of the layer to begin anew"
                    )
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
            for key in ("exp_avg", "exp_avg_sq"):
                if key not in state:
                    state[key] = torch.zeros_like(tensor, memory_format=torch.preserve_format)

    @staticmethod
    def _check_names(names: Sequence[str]) -> None:
        if len(set(names)) < len(names):
            twice = next(name for name in names if list(names).count(name) > 1)
            raise ValueError(f"two layers are named {twice!r}; give every layer its own name")

    def _by_rows(self, group: Mapping[str, Any]) -> bool:
        """Whether a group's layers need sums per row."""
        return False

    def _check_precision(self, params: Sequence[Tensor] | None = None) -> None:
        for index, name in enumerate(self._names):
            param = self._tensor_of(index) if params is None else params[index]
            if param.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"layer {name!r} is {param.dtype}: a fine-tuning step is of the size of its rounding. Keep"
                    " trainable parameters in float32 (from_pretrained(..., dtype=torch.float32)) and compute in low"
                    " precision with torch.autocast or FSDP's MixedPrecisionPolicy(param_dtype=torch.bfloat16)"
                )
            if dtensor.is_expanded(param):
                raise ValueError(
                    f"layer {name!r} is an expanded tensor: several of its elements are one place in memory, and no "
                    "update of them is right. Make the parameter of tensor.clone()"
                )

    def _init_anchors(self) -> None:
        """Capture the missing anchors, each in the narrowest dtype that holds its tensor exactly on every rank."""
        layout = self._layout
        assert layout is not None
        fresh: dict[int, Tensor] = {}
        for index, name in enumerate(self._names):
            kind, state = self._anchor_kind_of(index), self._state_of(index)
            if kind in (None, "zero") or "anchor" in state:
                continue
            if kind == _MAPPING:
                full = self._anchor_tensors[name]
                _check_anchor_shape(name, full, layout.layers[index].shape)
                fresh[index] = layout.local_of_full(index, full)
                continue
            if name in self._followed_anchors:  # captured before the parameter was sharded
                fresh[index] = layout.local_of_full(
                    index, self._followed_anchors[name].to(self._tensor_of(index).dtype)
                )
                continue
            if float(state.get("step", 0)) > 0:
                raise ValueError(
                    f"layer {name!r} has taken {int(state['step'])} steps and has no anchor: anchor='initial' would "
                    "capture trained weights. Load the pre-trained weights, call init_state(), then load the checkpoint"
                )
            fresh[index] = layout.local(index, self._tensor_of(index).detach())
        inexact = torch.zeros(len(self._names), dtype=torch.bool)
        for index, anchor in fresh.items():
            inexact[index] = not _fits_bf16(anchor)
        layout.any_(inexact)
        wide = {layout.holders[index] for index in fresh if inexact[index]}
        for index, anchor in fresh.items():
            asked = self.param_groups[self._group_of[index]]["anchor_dtype"]
            if asked == "bfloat16" and inexact[index]:
                raise ValueError(
                    f"the anchor of layer {self._names[index]!r} is not exact in bfloat16; use anchor_dtype='auto' or "
                    "'float32'"
                )
            narrow = asked == "bfloat16" or (asked == "auto" and layout.holders[index] not in wide)
            tensor, state = self._tensor_of(index), self._state_of(index)
            if "anchor" not in state:
                dtype = torch.bfloat16 if narrow else tensor.dtype
                state["anchor"] = torch.zeros_like(tensor, dtype=dtype, memory_format=torch.preserve_format)
            layout.local(index, state["anchor"]).copy_(anchor)

    def _anchor_kind_of(self, index: int) -> str | None:
        return self.param_groups[self._group_of[index]]["anchor"]

    @torch.no_grad()
    def _pack(self, scalars: Mapping[str, Mapping[str, Any]]) -> None:
        """Gather every layer's scalars into one tensor; where a layer has a tensor of its own, ``state`` shows views.

        Args:
            scalars: by layer name; what is missing is as for a new layer.
        """
        layout = self._layout
        assert layout is not None
        device = layout.local(0, self._tensor_of(0)).device if self._names else torch.device("cpu")
        packed = torch.zeros((len(self.layer_scalars), len(self._names)), dtype=torch.float64)
        missing: dict[tuple[str, ...], list[str]] = {}
        steps = torch.zeros(len(self._names), dtype=torch.float32)
        for index, name in enumerate(self._names):
            own = scalars.get(name, {})
            steps[index] = float(own.get("step", 0.0))
            lacks = [key for key in self.layer_scalars if key not in own]
            for row, key in enumerate(self.layer_scalars):
                packed[row, index] = float(own[key]) if key in own else self._missing_scalar(index, key)
            if lacks and steps[index] > 0:
                missing.setdefault(tuple(lacks), []).append(name)
        for lost, names in missing.items():
            logger.warning(
                "the state of %d layers with steps, first %r, does not hold %s: these are as for a new layer, and what "
                "the last step used (previous_…) is what the parameter groups say now",
                len(names), names[0], ", ".join(lost),
            )  # fmt: skip
        self._packed, self._steps = packed.to(device), steps.to(device)
        if self._attached:
            for tensor in layout.tensors:
                self.state[tensor]["step"] = torch.tensor(0.0)
            self._count_held(range(len(self._names)), steps.tolist())
        else:
            for index in range(len(self._names)):
                state = self._state_of(index)
                state["step"] = self._steps[index]
                for row, key in enumerate(self.layer_scalars):
                    state[key] = self._packed[row, index]
        self._after_pack()
        self._shown = []
        if not self._attached:
            keys = ["step", *self.layer_scalars]
            for index in range(len(self._names)):
                state = self._state_of(index)
                views = [state[key] for key in keys]
                self._shown.append((keys, views, [view.data_ptr() for view in views], set(state)))

    def _missing_scalar(self, index: int, key: str) -> float:
        """The value of a layer's scalar for which there is none, as for a new layer."""
        return 0.0

    def _count_held(self, layers: Iterable[int], steps: Sequence[float]) -> None:
        """Raise the steps of the tensors that hold these layers to those of the layers: checkpoint converters ask for
        them.

        Args:
            layers: numbers of layers.
            steps: of all layers, shape [layers].
        """
        layout = self._layout
        assert layout is not None
        most: dict[int, float] = {}
        for index in layers:
            holder = layout.holders[index]
            most[holder] = max(most.get(holder, 0.0), float(steps[index]))
        for holder, count in most.items():
            state = self.state[layout.tensors[holder]]
            state["step"] = torch.tensor(max(count, float(state["step"])))

    def _after_pack(self) -> None:
        """Subclasses rebuild what they derive from the state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; anchors and per-layer scalars keep the dtypes that they were saved in.

        ``torch.optim.Optimizer`` casts every floating-point state but ``step`` to the parameter's dtype and device,
        which would widen a bf16 anchor. A checkpoint without anchors leaves the live ones in place. An empty state
        dict, loaded where there is no state, creates none. A checkpoint that does not hold all scalars (an older one,
        AdamW's) is taken with a warning that says what starts anew.

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
                for name, value in own.get(key, {}).items():
                    if isinstance(value, Tensor) and name == "anchor":
                        value = value.to(device=param.device)
                    self.state[param][name] = value
                old = kept.get(param, {})
                if "anchor" in old and "anchor" not in self.state.get(param, {}):
                    self.state[param]["anchor"] = old["anchor"]
            if self._attached:
                self.adopt_loaded_state()
                return
            self._reset_caches()
            if not self.state:
                return
            try:
                self._follow_parameters()
            except UnattachedError:
                return  # an engine loads before attach(), which takes the state over
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
