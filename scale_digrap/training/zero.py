"""DeepSpeed ZeRO, stages 0 to 3, behind the same interface as FSDP2.

DeepSpeed owns the backward pass, the reduction of gradients, clipping and the step; what it wants is one loss per
micro-batch, already divided as the loop divides it. Full fine-tuning in bf16 is DeepSpeed's ``bf16``: bf16 parameters,
fp32 masters. Adapters are fp32 over a base in the compute precision under autocast, as with FSDP2.
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from scale_digrap import deepspeed as sdds
from scale_digrap.config import Config
from scale_digrap.deepspeed.engine import attached_layout
from scale_digrap.models.loading import LoadedModel, load_model, resolve_path
from scale_digrap.optim.anchored import AnchoredOptimizer
from scale_digrap.optim.portable import PortableState
from scale_digrap.runtime.files import write_whole
from scale_digrap.runtime.logs import reason
from scale_digrap.sharding import zero3
from scale_digrap.sharding.zero import ZeroLayout, ZeroTable, prove, read_table
from scale_digrap.training.engine import TrainingError, Update
from scale_digrap.training.optimizer import build_optimizer
from scale_digrap.training.ranks import Ranks
from scale_digrap.training.usage import Usage
from scale_digrap.zero_config import deepspeed_json

log = logging.getLogger(__name__)

_TAG = "deepspeed"
"""Folder of DeepSpeed's files inside a checkpoint."""


class ZeroEngine(Ranks):
    """See :class:`scale_digrap.training.engine.Engine`."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, always_distributed=True)
        _start_deepspeed(self.device)
        self.stage = config.sharding.zero.stage
        self.clip_norm = config.training.clip_norm
        self.keep_anchors = config.training.keep_anchors
        hpz = config.sharding.zero.hpz_partition_size
        if self.world_size % hpz:
            raise TrainingError(f"sharding.zero.hpz_partition_size={hpz} does not divide the {self.world_size} ranks")
        self.masters = False
        """bf16 parameters with fp32 masters."""
        self._engine: Any = None
        self._trained: list[nn.Parameter] = []
        self._bad_norms: list[float] | None = None
        self._usage: Usage | None = None

    # -- the model -----------------------------------------------------------------------------------------------------

    def load(self, config: Config, *, train: bool = True) -> LoadedModel:
        adapters = config.lora.enabled or _is_adapter(config)
        self.masters = self.precision == "bf16" and not adapters
        options: dict[str, Any] = {
            "lora": config.lora,
            "precision": self.precision,
            "seed": config.training.seed,
            "trained_dtype": torch.bfloat16 if self.masters else torch.float32,
        }
        if self.stage == 3 and self._reads_into_shards(config):
            # zero.Init makes parameters of the dtype of DeepSpeed's precision, here the base's
            with _zero_init(deepspeed_json(config, bf16=self.precision == "bf16")):
                loaded = load_model(config.model, **options)
        else:
            loaded = load_model(config.model, **options)
        loaded.collator.always_image = True
        if not train and self.stage == 3:
            import deepspeed

            settings = deepspeed_json(config, bf16=self.masters)
            self._engine, *_ = deepspeed.initialize(model=loaded.model, config=settings)  # its hooks gather the weights
        elif not train:
            loaded.model.to(self.device)
        return loaded

    def _reads_into_shards(self, config: Config) -> bool:
        """Weights that are not in the checkpoint, or are copied from it, need the whole model first."""
        if config.model.new_layers or config.lora.train or _is_adapter(config):
            return False
        return config.sharding.load_sharded

    def prepare(self, loaded: LoadedModel, config: Config) -> tuple[nn.Module, Optimizer]:
        optimizer = build_optimizer(loaded, config.optimizer, flat=True)
        settings = deepspeed_json(config, bf16=self.masters)
        if self.rank == 0:
            path = Path(config.run_dir) / "deepspeed.json"
            try:
                write_whole(path, json.dumps(settings, indent=2) + "\n")
            except OSError as error:  # it is for people to read
                log.warning("cannot write %s: %s", path, reason(error))
        self._engine, *_ = sdds.initialize(model=loaded.model, optimizer=optimizer, config=settings)
        self._trained = list(loaded.trained().values())
        self._usage = Usage(loaded.trained())
        self._usage.watch_parameters()
        self._usage.find_picture_layers(loaded.model)
        self._measure_bad_steps()
        return self._engine, optimizer

    def anchors(self, loaded: LoadedModel, optimizer: Optimizer) -> dict[str, torch.Tensor]:
        """Empty unless ``training.keep_anchors``: ZeRO's partitions cut through layers, so this is a copy.

        Pieces of ZeRO-3's parameters; for the other stages, whose parameters are whole, whole and in main memory.
        """
        if not self.keep_anchors or not isinstance(optimizer, AnchoredOptimizer):
            return {}
        parameters = loaded.trained()
        anchors = {}
        for name, anchor in sdds.full_tensors(self._engine, "anchor"):
            parameter = parameters[name]
            partitioned = zero3.is_partitioned(parameter)
            anchors[name] = zero3.cut(parameter, anchor).clone() if partitioned else anchor.cpu()
        return anchors

    # -- a step --------------------------------------------------------------------------------------------------------

    def compute(self) -> AbstractContextManager[Any]:
        if self.precision == "bf16" and not self.masters:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def backward(self, model: nn.Module, loss: torch.Tensor, *, last: bool, placeholder: bool = False) -> None:
        assert self._usage is not None
        self._usage.placeholder = placeholder
        self._engine.set_gradient_accumulation_boundary(last)
        # The loss is a share of the mean over all micro-batches and needs no division by their number.
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> Update:
        engine, parameters = self._engine, list(parameters)
        assert self._usage is not None
        used = [count > 0 for count in self.sum([float(flag) for flag in self._usage.take()])]
        layout = attached_layout(engine)
        if layout is not None:
            numbers = {layer.name: index for index, layer in enumerate(layout.layers)}
            layout.used = {numbers[name] for name, flag in zip(self._usage.names, used, strict=True) if flag}
        if engine.optimizer is optimizer:  # stage 0 in fp32: DeepSpeed neither checks nor tells the norm
            for parameter, flag in zip(parameters, used, strict=True):
                if not flag:
                    parameter.grad = None
            norm = _plain_norm(parameters)
            if not math.isfinite(norm):
                norms = self._layer_norms()
                engine.zero_grad()
                return Update(norm, True, norms)
            engine.step()
            return Update(norm, False)
        self._bad_norms = None
        engine.step()
        if not engine.was_step_applied():
            return Update(math.nan, True, self._bad_norms or ())
        return Update(float(engine.get_global_grad_norm()), False)

    def _measure_bad_steps(self) -> None:
        """DeepSpeed throws the gradients of a bad step away inside its own step: what is measured is measured there."""
        wrapper = self._engine.optimizer
        name = next((name for name in ("_update_scale", "clear_hp_grads") if hasattr(wrapper, name)), None)
        if name is None:  # another version of DeepSpeed: reports go without norms
            return
        original = getattr(wrapper, name)

        def measured(*args: Any, **kwargs: Any) -> Any:
            if wrapper.overflow and self._bad_norms is None:
                self._bad_norms = self._layer_norms()
            return original(*args, **kwargs)

        setattr(wrapper, name, measured)

    @torch.no_grad()
    def _layer_norms(self) -> list[float]:
        """L2 norm of every trained parameter's gradient, one parameter at a time, equal on all ranks. Collective."""
        from deepspeed.utils import safe_get_full_grad

        gradients = (safe_get_full_grad(parameter) for parameter in self._trained)
        squares = [0.0 if g is None else float(g.norm()) ** 2 / self.world_size for g in gradients]
        return [math.sqrt(square) for square in self.sum(squares)]

    def finish(self, model: nn.Module) -> None:
        pass  # every step ends with the updated parameters in place

    def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is None:
            return
        wrapper, parameters = engine.optimizer, list(engine.module.parameters())
        engine.destroy()
        engine.optimizer = engine.basic_optimizer = engine.client_optimizer = None
        if self.stage == 3:
            # Functions that it put on every parameter keep parameter, model and optimizer alive together, in cycles
            # through autograd that Python's collector does not see: what takes memory goes by hand.
            vars(wrapper).clear()
            for parameter in parameters:
                for tensor in (parameter, parameter.ds_tensor):
                    tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def portable(self, optimizer: Optimizer) -> PortableState:
        if isinstance(optimizer, AnchoredOptimizer) or self._engine.optimizer is optimizer:
            return PortableState(optimizer)
        return PortableState(optimizer, self._layout()[1])

    def _layout(self) -> tuple[ZeroTable, ZeroLayout]:
        """Where the trained parameters lie in the flat masters, for an optimizer that does not know."""
        table = read_table(self._engine)
        names_of = {id(parameter): name for name, parameter in self._engine.module.named_parameters()}
        names = [names_of[id(parameter)] for parameter in table.params]
        prove(table, names)
        return table, ZeroLayout(table, names, [False] * len(names), self._engine.optimizer)

    def weights_changed(self, model: nn.Module) -> None:
        sdds.refresh_model(self._engine)

    @torch.no_grad()
    def full_state(self, model: nn.Module, *, trained_only: bool) -> dict[str, torch.Tensor]:
        """One layer at a time: no rank has the whole model on its device."""
        values: dict[int, torch.Tensor] = {}  # by parameter, because tied ones have two names

        def keep(tensor: torch.Tensor, value: torch.Tensor) -> None:
            # A clone: rank 0 must not hold a whole flat buffer by way of a view.
            values[id(tensor)] = value.detach().cpu().clone() if self.rank == 0 else torch.empty(0)

        for parameter, value in self._masters() if self.masters else ():
            keep(parameter, value)
        state: dict[str, torch.Tensor] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if trained_only and not tensor.requires_grad:
                continue
            if id(tensor) not in values:
                keep(tensor, zero3.full(tensor) if zero3.is_partitioned(tensor) else tensor)
            state[name] = values[id(tensor)]
        return state

    def _masters(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Every trained parameter with its whole fp32 master, one at a time, for any optimizer."""
        table, layout = self._layout()
        for index, parameter in enumerate(table.params):
            yield parameter, layout.full(index, table.flats[table.holders[index]])


def _is_adapter(config: Config) -> bool:
    return (Path(resolve_path(config.model.path)) / "adapter_config.json").is_file()


def _plain_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Global L2 norm of whole gradients, which are equal on all ranks."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return 0.0
    norms = torch.stack(torch._foreach_norm(gradients))
    return math.sqrt(float(norms.double().square().sum()))


@contextmanager
def _zero_init(settings: dict[str, Any]) -> Iterator[None]:
    """Within the block, Transformers builds and loads models in ZeRO-3's shards.

    It holds the object by a weak reference that any model built later would see too, so it must not outlive the block.
    """
    from transformers.integrations import HfDeepSpeedConfig

    switch = HfDeepSpeedConfig(settings)
    try:
        yield
    finally:
        del switch


def _is_news(record: logging.LogRecord) -> bool:
    """DeepSpeed warns of every optimizer that is not its own; these are tested with it."""
    return "ZeRO with an untested optimizer" not in record.getMessage()


def _start_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed for the device, and hand it the process group that exists.

    Raises:
        TrainingError: it has been imported for another kind of device.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # its own guess is another where CUDA is there and not used
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    name = get_accelerator()._name
    if name != device.type:
        raise TrainingError(
            f"DeepSpeed was started for {name!r} in this process, training.device means {device.type!r}: unset "
            f"DS_ACCELERATOR, or train in a process of its own"
        )
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_news)
    # DeepSpeed calls torch's collectives by names that newer versions of torch replace.
    warnings.filterwarnings("ignore", message="`torch.distributed..*` is deprecated", category=FutureWarning)
    sdds.skip_cpu_communication_op()
    os.environ.setdefault("LOCAL_RANK", "0")  # a run without a launcher
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
