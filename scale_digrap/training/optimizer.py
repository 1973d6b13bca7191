"""The optimizer of a run: which parameters, with which anchors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from scale_digrap.config import OptimizerConfig
from scale_digrap.models.loading import LoadedModel
from scale_digrap.sharding import zero3
from scale_digrap.sharding.dtensor import local
from scale_digrap.training.engine import Engine, TrainingError


def parameter_groups(loaded: LoadedModel, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups of (name, parameter) pairs with their ``anchor``: initial, zero, or None. Frozen parameters are in none.

    Raises:
        TrainingError: nothing is trained.
    """
    by_anchor: dict[str | None, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in loaded.trained().items():
        anchor: str | None = config.anchor
        if name in loaded.new_layers or config.anchor == "none":
            anchor = None
        elif config.anchor == "auto":
            anchor = "zero" if name in loaded.adapters else "initial"
        elif config.anchor == "initial" and name in loaded.adapters:
            raise TrainingError(f"optimizer.anchor=initial anchors the adapter {name!r} at its random value: use auto")
        by_anchor.setdefault(anchor, []).append((name, parameter))
    if not by_anchor:
        raise TrainingError("no parameter is trained: relax model.freeze")
    return [{"params": params, "anchor": anchor} for anchor, params in by_anchor.items()]


def build_optimizer(loaded: LoadedModel, config: OptimizerConfig) -> Optimizer:
    """The configured method over the trained parameters; the engine has its anchors captured."""
    groups = parameter_groups(loaded, config)
    common: dict[str, Any] = {
        "lr": config.lr,
        "betas": tuple(config.betas),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw":
        named = [pair for group in groups for pair in group["params"]]
        # On a CPU, torch's default for sharded parameters is a Python loop, ten times slower than its fused kernel.
        fused = named[0][1].device.type in ("cpu", "cuda")
        return torch.optim.AdamW(named, fused=fused or None, **common)
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
