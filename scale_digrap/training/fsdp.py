"""FSDP2: parameters, gradients and optimizer state sharded over the data-parallel ranks.

One process runs the same code on an unsharded model. Full fine-tuning reads the checkpoint straight into the shards
(Transformers' ``distributed_config``); a LoRA model is put together first, because adapters must lie in the FSDP unit
of the layer they adapt, and sharded afterwards (its frozen base is memory-mapped, not copied).
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer

from scale_digrap.config import Config
from scale_digrap.models.loading import (
    LOAD_ERRORS,
    LoadedModel,
    load_error,
    load_model,
    resolve_path,
)
from scale_digrap.models.select import match_names
from scale_digrap.optim.anchored import AnchoredOptimizer
from scale_digrap.optim.layerwise import LayerwiseAdamW
from scale_digrap.optim.portable import PortableState
from scale_digrap.sharding.dtensor import local, shard_count
from scale_digrap.training.engine import TrainingError, Update
from scale_digrap.training.optimizer import build_optimizer, held_anchors
from scale_digrap.training.ranks import Ranks
from scale_digrap.training.usage import Usage, local_zeros

log = logging.getLogger(__name__)

_TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


class FsdpEngine(Ranks):
    """See :class:`scale_digrap.training.engine.Engine`."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.clip_norm = config.training.clip_norm
        self._usage: Usage | None = None
        self.replicas = config.sharding.dp_replicate_size
        if self.world_size % self.replicas:
            raise TrainingError(
                f"sharding.dp_replicate_size={self.replicas} does not divide the {self.world_size} ranks"
            )

    # -- the model -----------------------------------------------------------------------------------------------------

    def load(self, config: Config, *, train: bool = True) -> LoadedModel:
        options: dict[str, Any] = {
            "lora": config.lora,
            "precision": self.precision,
            "seed": config.training.seed,
        }
        if self.world_size == 1:
            loaded = load_model(config.model, **options)
            loaded.model.to(self.device)
        elif self._reads_into_shards(config):
            plan = self._distributed_config(config)
            loaded = load_model(config.model, **options, load_kwargs={"distributed_config": plan})
        else:
            loaded = load_model(config.model, **options)
            self._shard(loaded.model, config)
        if self.world_size > 1:
            self._configure_units(loaded.model, config)
        return loaded

    def _reads_into_shards(self, config: Config) -> bool:
        """Adapters and weights that are not in the checkpoint need the whole model before it is sharded."""
        if config.lora.enabled or config.model.new_layers or not config.sharding.load_sharded:
            return False
        if (Path(resolve_path(config.model.path)) / "adapter_config.json").is_file():
            return False
        return bool(getattr(_skeleton(config), "fsdp_plan", None))

    def _distributed_config(self, config: Config) -> Any:
        from transformers.distributed import DistributedConfig

        plan = None
        if config.sharding.wrap:
            names = [name for name, _ in _skeleton(config).named_modules() if name]
            chosen = match_names(config.sharding.wrap, names, key="sharding.wrap", full=True)
            plan = dict.fromkeys(chosen, "free_full_weight")
        return DistributedConfig(
            fsdp_size=self.world_size // self.replicas,
            dp_replicate_size=self.replicas,
            fsdp_plan=plan,
            fsdp_mixed_precision=self.precision == "bf16",
        )

    def _shard(self, model: nn.Module, config: Config) -> None:
        """``fully_shard`` every block of the language model, then the rest as the root unit."""
        policy = MixedPrecisionPolicy()
        if self.precision == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        mesh = self._mesh()
        for unit in _units(model, config.sharding.wrap):
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        for module in model.modules():
            if hasattr(module, "generation_config"):
                # What Transformers' generate() looks at to keep the ranks in step.
                module._is_fsdp_managed_module = True  # type: ignore[assignment]

    def _mesh(self) -> DeviceMesh:
        if self.replicas == 1:
            return init_device_mesh(self.device.type, (self.world_size,), mesh_dim_names=("fsdp",))
        shape = (self.replicas, self.world_size // self.replicas)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("dp_replicate", "fsdp"))

    def _configure_units(self, model: nn.Module, config: Config) -> None:
        assert isinstance(model, FSDPModule)
        model.set_reshard_after_forward(config.sharding.reshard_after_forward)
        # Logits are a view of a padded tensor in some families; nobody here changes them in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        # A rank whose batch has no image gives its vision tower no gradient; without this its reduce-scatter would have
        # another size than that of the other ranks, which is a hang with NCCL and an abort with gloo.
        if hasattr(model, "set_reduce_scatter_unused_params"):
            model.set_reduce_scatter_unused_params(True)
        elif self.rank == 0:
            log.warning(
                "this torch (%s) cannot reduce gradients that only some ranks have: give every batch of every rank an "
                "image, or use torch >= 2.13",
                torch.__version__,
            )

    def prepare(self, loaded: LoadedModel, config: Config) -> tuple[nn.Module, Optimizer]:
        optimizer = build_optimizer(loaded, config.optimizer)
        if self.world_size > 1:
            self._usage = Usage(loaded.trained())
            self._usage.watch_units(loaded.model)
        if isinstance(optimizer, AnchoredOptimizer):
            optimizer.init_state()
        return loaded.model, optimizer

    def anchors(self, loaded: LoadedModel, optimizer: Optimizer) -> dict[str, torch.Tensor]:
        return held_anchors(optimizer)

    # -- a step --------------------------------------------------------------------------------------------------------

    def compute(self) -> AbstractContextManager[Any]:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def backward(self, model: nn.Module, loss: torch.Tensor, *, last: bool, placeholder: bool = False) -> None:
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        loss.backward()

    def step(self, optimizer: Any, parameters: Iterable[nn.Parameter]) -> Update:
        parameters = list(parameters)
        used = None if self._usage is None else self._usage.take()
        if self.clip_norm is None and isinstance(optimizer, LayerwiseAdamW):
            # DiGraP's own sums hold the norm and who has a gradient, and it leaves out non-finite steps itself: no
            # extra collective.
            if used is not None:
                self._drop_zeros(parameters, used)
            before = optimizer.skipped_steps
            optimizer.step()
            skipped = optimizer.skipped_steps > before
            grad_norm = math.nan if skipped else optimizer.grad_norm()
        else:
            grad_norm = self._agree(parameters, used)
            skipped = not math.isfinite(grad_norm)
            if not skipped:
                if self.clip_norm is not None and grad_norm > self.clip_norm:
                    self.scale_gradients(parameters, self.clip_norm / (grad_norm + 1e-6))
                optimizer.step()
        layer_norms = self.layer_norms(parameters) if skipped else ()
        optimizer.zero_grad(set_to_none=True)
        return Update(grad_norm, skipped, layer_norms)

    def finish(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def close(self) -> None:
        pass

    @torch.no_grad()
    def _drop_zeros(self, parameters: Sequence[nn.Parameter], used: Sequence[bool]) -> None:
        """Take the gradient from layers that this rank has not used and no other rank has added to, as far as this
        shard tells. An optimizer that sums over the ranks sees a layer that any rank has used all the same, and a shard
        without a gradient counts as zeros."""
        unused = [
            (p, local(p.grad)) for p, flag in zip(parameters, used, strict=True) if not flag and p.grad is not None
        ]
        for (parameter, _), zero in zip(unused, local_zeros([gradient for _, gradient in unused]), strict=True):
            if zero:
                parameter.grad = None

    @torch.no_grad()
    def _agree(self, parameters: Sequence[nn.Parameter], used: Sequence[bool] | None) -> float:
        """The global norm; with the same sum over the ranks, the same layers have a gradient on all of them: those that
        any has used."""
        norm, counts = self._norm_and_sums(parameters, [float(flag) for flag in used or ()])
        for parameter, count in zip(parameters, counts, strict=used is not None):
            if count == 0:
                parameter.grad = None
            else:
                self.finish_gradients([parameter])
        return norm

    def finish_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every one of these parameters a gradient, zeros where it has none."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def grad_norm(self, parameters: Iterable[nn.Parameter]) -> float:
        """Global L2 norm of all gradients, equal on all ranks."""
        return self._norm_and_sums(parameters, [])[0]

    @torch.no_grad()
    def _norm_and_sums(self, parameters: Iterable[nn.Parameter], flags: list[float]) -> tuple[float, list[float]]:
        """The global L2 norm of all gradients, and the sums over the ranks of some numbers, in one reduction."""
        # Each rank counts an element with weight 1 / (number of ranks that hold it), so that one sum over all ranks is
        # right for any mixture of meshes and placements; clip_grad_norm_ refuses mixed meshes.
        by_copies: dict[float, list[torch.Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                copies = self.world_size / shard_count(parameter.grad)
                by_copies.setdefault(copies, []).append(local(parameter.grad))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for copies, gradients in by_copies.items():
            norms = torch.stack(torch._foreach_norm(gradients))
            total += norms.double().square().sum() / copies
        packed = torch.cat([total.view(1), torch.tensor(flags, dtype=torch.float64).to(self.device)])
        if self.world_size > 1:
            dist.all_reduce(packed)
        square, *sums = packed.tolist()
        return math.sqrt(square), sums

    @torch.no_grad()
    def layer_norms(self, parameters: Iterable[nn.Parameter]) -> list[float]:
        """L2 norm of every gradient, 0 where there is none, equal on all ranks."""
        parameters = list(parameters)
        squares = [0.0] * len(parameters)
        present = [(i, p.grad) for i, p in enumerate(parameters) if p.grad is not None]
        norms = torch.stack(torch._foreach_norm([local(gradient) for _, gradient in present])).tolist()
        for (index, gradient), norm in zip(present, norms, strict=True):
            squares[index] = norm**2 / (self.world_size / shard_count(gradient))
        return [math.sqrt(square) for square in self.sum(squares)]

    @torch.no_grad()
    def scale_gradients(self, parameters: Iterable[nn.Parameter], factor: float) -> None:
        """Multiply all gradients by a number."""
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def portable(self, optimizer: Optimizer) -> PortableState:
        return PortableState(optimizer)

    def weights_changed(self, model: nn.Module) -> None:
        pass  # the optimizer steps the model's own parameters

    def full_state(self, model: nn.Module, *, trained_only: bool) -> dict[str, torch.Tensor]:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
        state: dict[str, Any] = get_model_state_dict(model, options=options)
        return state


def _units(model: Any, wrap: Sequence[str]) -> list[nn.Module]:
    """The modules that become FSDP units of their own, children before parents."""
    if wrap:
        names = [name for name, _ in model.named_modules() if name]
        chosen = match_names(wrap, names, key="sharding.wrap", full=True)
        return [model.get_submodule(name) for name in sorted(chosen, key=lambda name: -name.count("."))]
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise TrainingError(
            f"cannot tell the blocks of the language model in {type(model).__name__}: name them with sharding.wrap, "
            f"for example sharding.wrap=['.*language_model\\.layers\\.\\d+']"
        )
    return list(layers)


def _skeleton(config: Config) -> nn.Module:
    """The model without weights, for its module names and its FSDP plan."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    path = resolve_path(config.model.path)
    try:
        model_config = AutoConfig.from_pretrained(path, revision=config.model.revision, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(model_config, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise load_error("the architecture", path, error) from error
