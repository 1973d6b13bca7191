"""DeepSpeed's checkpoints on another number of ranks: what is dropped there is added, what is wrong is refused."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scale_digrap.deepspeed.engine import attached_layout, client_optimizer
from scale_digrap.deepspeed.support import DeepSpeedError
from scale_digrap.deepspeed.trust import load_plain, only_plain_pickles
from scale_digrap.optim.anchored import LAYER_STATE
from scale_digrap.optim.portable import load_portable as _load_portable
from scale_digrap.optim.portable import save_portable as _save_portable
from scale_digrap.runtime.text import read_text
from scale_digrap.sharding.zero import ZeroLayout

_ANCHOR = "anchor.pt"


def save_portable(engine: Any, folder: str | Path) -> None:
    """Write weights and optimizer state in the form that any engine reads on any number of ranks; collective.

    See :mod:`scale_digrap.optim.portable`. Frozen weights and the learning-rate schedule are not part of it.
    """
    _save_portable(client_optimizer(engine), folder)


def load_portable(engine: Any, folder: str | Path) -> None:
    """Read :func:`save_portable`'s folder, of this engine or another, and bring the model's weights up to date."""
    optimizer = client_optimizer(engine)
    _load_portable(optimizer, folder)
    refresh_model(engine)


def to_universal(source: str | Path, target: str | Path, *, workers: int = 4) -> None:
    """Convert a checkpoint of ``engine.save_checkpoint`` to a Universal Checkpoint, with the anchors in it.

    DeepSpeed's converter keeps the weights, the moments and what is in the parameter groups, where the per-layer
    scalars are; the anchors are added to what it writes. One process calls it; no GPU is needed.

    Args:
        source: the folder of one tag, ``DIR/TAG``.
        target: the folder to write, best ``DIR/TAG_universal``: load it by that tag with
            ``"checkpoint": {"load_universal": true}`` in the DeepSpeed configuration and :func:`load_checkpoint`.
        workers: processes of the converter.

    Raises:
        DeepSpeedError: not such a checkpoint; one of ``round_robin_gradients``, whose fragments DeepSpeed mis-names;
            or DeepSpeed's converter failed; or a file that holds more than DeepSpeed writes, of which nothing is run.
    """
    source, target = Path(source), Path(target)
    files = _rank_files(source)
    if not files:
        raise DeepSpeedError(f"{source} holds no ZeRO optimizer states: name the folder of one tag, DIR/TAG")
    anchors = _collect_anchors(files)
    command = [sys.executable, "-m", "scale_digrap.deepspeed.trust", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    command += ["--num_extract_workers", str(workers), "--num_merge_workers", str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = " ".join((done.stderr or done.stdout).strip().splitlines()[-1:])
        raise DeepSpeedError(f"DeepSpeed's conversion of {source} failed: {last}")
    for name, values in anchors.items():
        folder = target / "zero" / name
        weights = load_plain(folder / "fp32.pt")
        shape = (weights["param"] if isinstance(weights, dict) else weights).shape  # a bare tensor for stage 3
        if shape.numel() != values.numel():
            raise DeepSpeedError(f"the anchor of {name!r} has {values.numel()} elements, the layer {shape.numel()}")
        torch.save({"param": values.view(shape), "cat_dim": 0}, folder / _ANCHOR)


def load_checkpoint(engine: Any, folder: str | Path, tag: str | None = None, **kwargs: Any) -> tuple[Any, Any]:
    """``engine.load_checkpoint`` with clear refusals, and with the anchors of a Universal Checkpoint.

    Args:
        engine: attached.
        folder, tag, kwargs: as ``engine.load_checkpoint``.

    Returns:
        as ``engine.load_checkpoint``: the path (``None`` where nothing was found) and the client state.

    Raises:
        DeepSpeedError: saved on another number of ranks and not converted; or a Universal Checkpoint on ranks that
            hold only padding, on which DeepSpeed's loader fails; or a file that holds more than DeepSpeed writes, of
            which nothing is run.
    """
    layout = attached_layout(engine)
    universal = bool(engine.load_universal_checkpoint())
    if tag is None:
        latest = Path(folder) / ("latest_universal" if universal else "latest")
        tag = read_text(latest, 1 << 12).strip() if latest.is_file() else None
    here = Path(folder) / str(tag)
    if layout is not None and universal:
        _refuse_empty_ranks(engine, layout)
    elif layout is not None and tag is not None:
        ranks = len(_rank_files(here))
        if ranks and ranks != layout.world_size:
            raise DeepSpeedError(
                f"{here} was saved on {ranks} data-parallel ranks, these are {layout.world_size}: convert it with "
                "scale_digrap.deepspeed.to_universal, or save with scale_digrap.deepspeed.save_portable"
            )
    with only_plain_pickles():
        result = engine.load_checkpoint(str(folder), tag=tag, **kwargs)
    if layout is not None:
        client_optimizer(engine).adopt_loaded_state()
    if layout is not None and universal and result[0] is not None:
        _restore_anchors(engine, layout, here)
    return result


def _rank_files(folder: Path) -> list[Path]:
    return sorted(
        folder.glob("*zero_pp_rank_*_optim_states.pt"),
        key=lambda path: int(path.name.split("zero_pp_rank_")[1].split("_")[0]),
    )


def _collect_anchors(files: list[Path]) -> dict[str, Tensor]:
    """Every stored anchor, flattened and whole, by the layer's name in the model."""
    parts: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    for path in files:
        zero = load_plain(path)["optimizer_state_dict"]
        state = zero.get("base_optimizer_state") or zero["optimizer_state_dict"]
        own = state["param_groups"][0].get(LAYER_STATE)
        if own is None:
            continue  # another optimizer: nothing to add
        _check_fragments(path, own["pieces"], zero.get("param_slice_mappings"))
        if any("direction" in values for values in state["state"].values()):
            raise DeepSpeedError(
                f"{path} is of an optimizer that keeps more than DeepSpeed's converter carries (AdamFTP): use "
                "scale_digrap.deepspeed.save_portable"
            )
        for name, (number, start, numel, offset) in own["pieces"].items():
            anchor = state["state"][number].get("anchor")
            if anchor is not None and numel:
                parts[name].append((offset, anchor[start : start + numel].clone()))
    whole = {}
    for name, found in parts.items():
        found.sort(key=lambda part: part[0])
        if any(first + len(values) != second for (first, values), (second, _) in pairwise(found)):
            raise DeepSpeedError(f"the anchor of layer {name!r} has gaps: rank files of {files[0].parent} are missing")
        whole[name] = torch.cat([values for _, values in found])
    return whole


def _check_fragments(path: Path, pieces: dict[str, Any], mappings: Any) -> None:
    """DeepSpeed's own table against ours, which was proven by value."""
    theirs = {
        name: (number, part.start, part.numel)
        for number, group in enumerate(mappings or [])
        for name, part in group.items()
    }
    ours = {name: (number, start, numel) for name, (number, start, numel, _) in pieces.items() if numel}
    if mappings is not None and theirs != ours:
        wrong = next(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        raise DeepSpeedError(
            f"{path}: DeepSpeed's table of fragments does not say where layer {wrong!r} lies (it is wrong with "
            "round_robin_gradients), so that its Universal Checkpoint would mix layers up: use "
            "scale_digrap.deepspeed.save_portable, or train without round_robin_gradients"
        )


def _refuse_empty_ranks(engine: Any, layout: ZeroLayout) -> None:
    """DeepSpeed's loader of stages 1 and 2 fails on a rank that has only padding of some group."""
    if engine.zero_optimization_stage() == 3:
        return
    filled = {k for k, placed in zip(layout.holders, layout.placements, strict=True) if placed.numel}
    empty = torch.tensor([len(filled) < len(layout.tensors)])
    layout.any_(empty)
    if empty.item():
        raise DeepSpeedError(
            "some ranks hold only padding of a parameter group, and DeepSpeed cannot load a Universal Checkpoint: "
            "use scale_digrap.deepspeed.load_portable, fewer ranks, or larger groups"
        )


@torch.no_grad()
def _restore_anchors(engine: Any, layout: ZeroLayout, folder: Path) -> None:
    """Stage 3's loader knows three keys and leaves the rest alone."""
    optimizer = client_optimizer(engine)
    for index, name in enumerate(layout.model_names):
        path = folder / "zero" / name / _ANCHOR
        state = optimizer.state[layout.tensors[layout.holders[index]]]
        if "anchor" not in state or not path.is_file():
            continue
        values = load_plain(path)["param"]
        if state["anchor"].dtype == torch.bfloat16 != values.dtype:
            state["anchor"] = state["anchor"].to(values.dtype)
        layout.local(index, state["anchor"]).copy_(layout.local_of_full(index, values))


def refresh_model(engine: Any) -> None:
    """The model's weights from the fp32 ones that the optimizer steps, as at the end of a step; collective."""
    zero = engine.optimizer
    if zero is client_optimizer(engine):
        return
    kind = type(zero).__name__
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        for number in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        zero.invalidate_secondary_tensor()
    elif kind == "FP16_UnfusedOptimizer":
        for wide, narrow in zip(zero.fp32_groups, zero.fp16_groups, strict=True):
            torch._foreach_copy_([param.data for param in narrow], [param.data for param in wide])
    else:
        zero.update_lp_params()
    dist.barrier()
