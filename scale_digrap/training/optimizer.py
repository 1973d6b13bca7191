"""The optimizer of a run: which parameters, with which anchors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scale_digrap.config import OptimizerConfig
from scale_digrap.models.loading import LoadedModel
from scale_digrap.models.select import match_names
from scale_digrap.optim.layerwise import GRAD, HAS_GRAD, LayerwiseAdamW
from scale_digrap.optim.telemetry import LayerStats
from scale_digrap.sharding import zero3
from scale_digrap.sharding.dtensor import local
from scale_digrap.training.engine import Engine, TrainingError


class AdamW(LayerwiseAdamW):
    """``torch.optim.AdamW``, layer by layer in whatever tensors hold the layers: in ZeRO's flat partitions a layer then
    has a step count of its own, and stays as it is in a step that does not use it."""

    layer_scalars = ()

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {**options, "anchor": None, "anchor_dtype": "auto"})

    def _layer_math(self, sums: Tensor, row_sums: Tensor) -> tuple[Callable[[], None], Tensor]:
        live = sums[HAS_GRAD] > 0
        finite = torch.isfinite(sums[GRAD]).all()

        def commit() -> None:
            self._steps.add_(live)
            self._last = {"sums": sums}

        return commit, torch.stack([torch.zeros_like(sums[GRAD]), live.double(), finite.double().expand(len(live))])

    def layer_stats(self) -> dict[str, LayerStats]:
        """None: no layer has an anchor."""
        return {}


def parameter_groups(loaded: LoadedModel, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups of (name, parameter) pairs with their ``anchor`` (initial, zero, or None) and ``weight_decay``. Frozen
    parameters are in none.

    Raises:
        TrainingError: nothing is trained.
        SelectionError: a pattern of ``optimizer.no_decay`` that matches no trained parameter.
    """
    exempt = set(undecayed(loaded, config))
    by_kind: dict[tuple[str | None, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in loaded.trained().items():
        anchor: str | None = config.anchor
        if name in loaded.new_layers or config.anchor == "none":
            anchor = None
        elif config.anchor == "auto":
            anchor = "zero" if name in loaded.adapters else "initial"
        elif config.anchor == "initial" and name in loaded.adapters:
            raise TrainingError(f"optimizer.anchor=initial anchors the adapter {name!r} at its random value: use auto")
        by_kind.setdefault((anchor, name not in exempt), []).append((name, parameter))
    if not by_kind:
        raise TrainingError("no parameter is trained: relax model.freeze")
    return [
        {"params": params, "anchor": anchor, "weight_decay": config.weight_decay if decayed else 0.0}
        for (anchor, decayed), params in by_kind.items()
    ]


def undecayed(loaded: LoadedModel, config: OptimizerConfig) -> list[str]:
    """The trained parameters that ``optimizer.weight_decay`` leaves alone, by name.

    Raises:
        SelectionError: a pattern of ``optimizer.no_decay`` that matches none.
    """
    trained = loaded.trained()
    chosen = set(match_names(config.no_decay, trained, key="optimizer.no_decay"))
    if not config.decay_norms_and_biases:
        chosen |= {name for name, parameter in trained.items() if len(zero3.full_shape(parameter)) < 2}
    return [name for name in trained if name in chosen]


def build_optimizer(loaded: LoadedModel, config: OptimizerConfig, *, flat: bool = False) -> Optimizer:
    """The configured method over the trained parameters; the engine has its anchors captured.

    Args:
        loaded, config: the run's.
        flat: the engine puts other tensors in the place of the parameters, which hold several layers each.
    """
    groups = parameter_groups(loaded, config)
    common: dict[str, Any] = {
        "lr": config.lr,
        "betas": tuple(config.betas),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw":
        by_decay: dict[float, list[tuple[str, nn.Parameter]]] = {}
        for group in groups:
            by_decay.setdefault(group["weight_decay"], []).extend(group["params"])
        plain = [{"params": params, "weight_decay": decay} for decay, params in by_decay.items()]
        if flat:
            return AdamW(plain, **common)
        # On a CPU, torch's default for sharded parameters is a Python loop, ten times slower than its fused kernel.
        fused = plain[0]["params"][0][1].device.type in ("cpu", "cuda")  # type: ignore[index]
        return _with_state(torch.optim.AdamW(plain, fused=fused or None, **common))
    from scale_digrap import AdamFTP, AdamL2SP, AdamSPD, DiGraP

    if config.name == "ftp":
        return AdamFTP(groups, gamma_lr=config.gamma_lr, k=config.gamma_k, anchor_dtype=config.anchor_dtype, **common)
    if config.name in ("spd", "l2sp"):
        method = AdamSPD if config.name == "spd" else AdamL2SP
        if config.strength is not None:
            common["strength"] = config.strength
        return method(groups, anchor_dtype=config.anchor_dtype, **common)
    return DiGraP(
        groups,
        omega_lr=config.omega_lr,
        omega_betas=(config.omega_betas[0], config.omega_betas[1]),
        omega_max=config.omega_max,
        normalization=config.normalization,
        project_when=config.project_when,
        anchor_dtype=config.anchor_dtype,
        **common,
    )


@torch.no_grad()
def _with_state(optimizer: torch.optim.AdamW) -> torch.optim.AdamW:
    """Create all state at once, as its first step would: a layer that no step has used yet has state in checkpoints."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            device = parameter.device if group["fused"] else torch.device("cpu")
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
    return optimizer


@torch.no_grad()
def capture_anchors(loaded: LoadedModel, engine: Engine) -> dict[str, torch.Tensor]:
    """A copy of the pre-trained value of every trained parameter that has one and is no adapter, sharded like it
    (of a parameter of ZeRO-3, the elements that are here).

    bfloat16 where that is exact on every rank, as DiGraP keeps its anchors.
    """
    trained = {
        name: zero3.piece(parameter) if zero3.is_partitioned(parameter) else parameter.detach()
        for name, parameter in loaded.trained().items()
        if name not in loaded.new_layers and name not in loaded.adapters
    }
    narrow = {name: value.to(torch.bfloat16, copy=True) for name, value in trained.items()}
    inexact = [
        float(not torch.equal(local(narrow[name]).to(value.dtype), local(value))) for name, value in trained.items()
    ]
    inexact = engine.sum(inexact) if inexact else []
    return {
        name: narrow[name] if count == 0 else value.clone()
        for (name, value), count in zip(trained.items(), inexact, strict=True)
    }


def keeps_anchors(optimizer: Optimizer) -> bool:
    """Whether the optimizer itself holds pre-trained weights."""
    return count_anchors(optimizer) > 0


def count_anchors(optimizer: Optimizer) -> int:
    """For how many parameters the optimizer holds the pre-trained value."""
    groups = [group for group in optimizer.param_groups if group.get("anchor") not in (None, "zero")]
    return sum(len(group["param_names"]) for group in groups)


def held_anchors(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """The anchors that an optimizer holds, by parameter name (no copies); zero anchors are not among them."""
    anchors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            # .get: reading optimizer.state[...] would create an entry, and a checkpoint would then load into nothing
            anchor = optimizer.state.get(parameter, {}).get("anchor")
            if anchor is not None:
                anchors[name] = anchor
    return anchors


def layer_summary(optimizer: Optimizer) -> dict[str, float]:
    """Mean conflict rate over the anchored layers, and mean ω of DiGraP; empty for AdamW or without anchors."""
    stats = getattr(optimizer, "layer_stats", None)
    layers = [] if stats is None else list(stats().values())
    if not layers:
        return {}
    summary = {"conflict_rate": sum(layer.conflict_rate for layer in layers) / len(layers)}
    omegas = [layer.omega for layer in layers if not math.isnan(layer.omega)]
    return summary | ({"omega_mean": sum(omegas) / len(omegas)} if omegas else {})
