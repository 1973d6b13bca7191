"""``initialize`` and ``attach``: a client optimizer learns where its layers lie, and when a training step begins."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_digrap.deepspeed.support import DeepSpeedError, check_config, check_engine, read_config
from scale_digrap.deepspeed.watch import GradientWatch
from scale_digrap.optim.anchored import AnchoredOptimizer
from scale_digrap.sharding.zero import ZeroLayout, prove, read_table
from scale_digrap.sharding.zero3 import full_shape

log = logging.getLogger(__name__)


def skip_cpu_communication_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory communication op, on machines without an accelerator.

    The build takes minutes at the first ``init_distributed``, and one that is killed leaves a lock on which every later
    run sleeps. gloo does its work. Call it before ``deepspeed.init_distributed`` and ``deepspeed.initialize``.
    """
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def initialize(
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Mapping[str, Any] | str | Path,
    **kwargs: Any,
) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` followed by :func:`attach`, for a client optimizer of this package or any other.

    Args:
        model, kwargs: as ``deepspeed.initialize``.
        optimizer: its anchors are captured here, from the model's weights: load the pre-trained ones first.
        config: DeepSpeed's, a dictionary or a JSON file. The two switches that DeepSpeed asks of a client optimizer
            are set where they are missing.

    Returns:
        engine, DeepSpeed's optimizer wrapper, data loader, learning-rate scheduler.

    Raises:
        DeepSpeedError: a configuration that cannot work, before anything is built; see also :func:`attach`.
    """
    import deepspeed

    skip_cpu_communication_op()
    settings = read_config(config)
    settings.setdefault("zero_allow_untested_optimizer", True)
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    if isinstance(optimizer, AnchoredOptimizer):
        check_config(settings)
    result = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, **kwargs)
    attach(result[0])
    _tell_clipping(result[0], settings)
    return result


def _tell_clipping(engine: Any, settings: Mapping[str, Any]) -> None:
    """DeepSpeed clips by default (0.19.8: at 1.0), which neither torch nor FSDP2 does: say so where nobody asked."""
    if "gradient_clipping" in settings:
        return
    norm = float(engine.gradient_clipping() or 0.0)
    if norm > 0.0 and engine.global_rank == 0:
        log.warning(
            "DeepSpeed clips gradients at a global norm of %g, its default: the configuration does not say "
            "gradient_clipping (0 does not clip)",
            norm,
        )


def attach(engine: Any) -> None:
    """Tell the engine's client optimizer where its layers lie in ZeRO's partitions, and capture the anchors.

    Call it once, right after ``deepspeed.initialize`` and before ``engine.load_checkpoint``; a collective call. It
    proves its table of segments by value and by coverage over the ranks. Does nothing for other optimizers.

    Args:
        engine: a ``DeepSpeedEngine``, stage 0 to 3.

    Raises:
        DeepSpeedError: a feature under which the layers cannot be told, or which was never tried with this optimizer.
        ZeroLayoutError: the partitions are not laid out as known here.
        ValueError: as ``AnchoredOptimizer.init_state``.
    """
    optimizer = client_optimizer(engine)
    if not isinstance(optimizer, AnchoredOptimizer):
        return
    check_engine(engine)
    if engine.optimizer is optimizer:  # stage 0 in fp32: the parameters themselves
        optimizer.init_state()
        return
    table = read_table(engine)
    given = {id(param): name for name, param in optimizer.given_parameters}
    in_model = {id(param): name for name, param in engine.module.named_parameters()}
    for param in table.params:
        if id(param) not in given:
            raise DeepSpeedError(
                f"the engine trains {in_model.get(id(param), 'a parameter')!r} of shape {tuple(full_shape(param))}, "
                f"which {type(optimizer).__name__} was not given: build the optimizer from the parameters of the model "
                "that goes to deepspeed.initialize"
            )
    model_names = [in_model.get(id(param), given[id(param)]) for param in table.params]
    unnamed = all(name == f"param_{i}" for i, (name, _) in enumerate(optimizer.given_parameters))
    names = model_names if unnamed else [given[id(param)] for param in table.params]
    prove(table, names)
    group_of = [table.flat_groups[k] for k in table.holders]
    optimizer.attach(names, group_of, lambda by_rows: ZeroLayout(table, names, by_rows, engine.optimizer, model_names))
    stage3 = engine.zero_optimization_stage() == 3
    _guard_step(engine.optimizer, optimizer, GradientWatch(engine.optimizer, table.params) if stage3 else None)


def client_optimizer(engine: Any) -> Any:
    """The optimizer that was given to ``deepspeed.initialize``."""
    wrapper = engine.optimizer
    return getattr(wrapper, "optimizer", wrapper)


def attached_layout(engine: Any) -> ZeroLayout | None:
    """Where the layers lie in the engine's partitions; ``None`` for other optimizers and for stage 0 in fp32."""
    optimizer = client_optimizer(engine)
    layout = optimizer.layout if isinstance(optimizer, AnchoredOptimizer) else None
    return layout if isinstance(layout, ZeroLayout) else None


@torch.no_grad()
def full_tensors(engine: Any, key: str) -> Iterator[tuple[str, Tensor]]:
    """Every layer's unsharded tensor, one at a time, on every rank: memory for one layer. A collective call.

    Args:
        engine: with an attached optimizer.
        key: ``"param"`` (the fp32 weights that the optimizer steps), ``"anchor"``, ``"exp_avg"`` or ``"exp_avg_sq"``.

    Yields:
        layer name, tensor of the unsharded shape on the engine's device in the state's dtype. Layers without the key
        (a zero anchor) are left out.

    Raises:
        DeepSpeedError: the optimizer is not attached.
    """
    optimizer = client_optimizer(engine)
    layout = optimizer.layout if isinstance(optimizer, AnchoredOptimizer) else None
    if layout is None:
        raise DeepSpeedError(f"{type(optimizer).__name__} keeps no layers: attach a DiGraP optimizer first")
    for index, layer in enumerate(layout.layers):
        holder = layout.tensors[layout.holders[index]]
        tensor = holder if key == "param" else optimizer.state[holder].get(key)
        if tensor is not None:
            yield layer.name, layout.full(index, tensor)


# -- one training step -------------------------------------------------------------------------------------------------


def _guard_step(zero: Any, optimizer: AnchoredOptimizer, watch: GradientWatch | None) -> None:
    """Tell the layout when a training step begins and ends: the optimizer itself is called once per partition."""
    original = zero.step

    def step(*args: Any, **kwargs: Any) -> Any:
        optimizer.init_state()
        layout = optimizer.layout
        assert isinstance(layout, ZeroLayout)
        layout.begin(optimizer.param_groups, watch.take() if watch else None)
        result = original(*args, **kwargs)
        layout.end()
        return result

    step.attached = True  # type: ignore[attr-defined]
    zero.step = step
